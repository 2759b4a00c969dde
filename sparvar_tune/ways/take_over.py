"""The second layer alone: a policy that was searched on other silicon, timed and certified on this one.

What may be dropped depends on the model; how it runs fastest depends on the GPU. So a policy is searched once per model and
preset; another GPU takes it over from that profile, times launches, draws the held-out pictures itself, and writes its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sparvar_tune.adapters import Adapter
from sparvar_tune.catalog.gpus import GPUS, Gpu, nearest_first
from sparvar_tune.measure.pairs import held_out_pairs
from sparvar_tune.policy_search.certify import compare_on, confidence_of, evidence, generation
from sparvar_tune.profile import schema, store
from sparvar_tune.profile.describe import describe, describe_evidence
from sparvar_tune.runtime.tuned import launch_of
from sparvar_tune.ways.search_here import SEARCHED, NothingMeetsTheBound, Request, make_profile, workload
from sparvar_tune.ways.time_only import Shop, time_launches

ATTEMPT = 0  # at certification; a search that comes after it goes on with the next


def find_policy(name: str, weights_sha256: str | None, gpu: Gpu, folders: Sequence[Path]) -> tuple[schema.Profile, Path] | None:
    """The profile `name` of the nearest other silicon whose policy was searched there, on these weights (None: any), or None.

    Raises ProfileError for a damaged file.
    """
    for other in nearest_first(gpu, GPUS.values()):
        for folder in folders if other.slug != gpu.slug else ():
            path = folder / other.slug / name
            if path.is_file():
                found = store.load(path)
                if found.policy_source == SEARCHED and weights_sha256 in (None, found.workload.weights_sha256):
                    return found, path
    return None


def transfer(
    request: Request,
    adapter: Adapter,
    source: schema.Profile,
    shop: Shop,
    say: Callable[[str], None],
    status: Callable[[str], None],
) -> schema.Profile:
    """The certified profile of `source`'s policy on this machine's GPU.

    Raises NothingMeetsTheBound where its pictures miss the bound here or it is not faster than dense.
    """
    begun, policy = time.monotonic(), source.policy
    say(f"policy of {source.silicon.gpu} ({source.created}): {describe(policy)}")
    shape = workload(request, adapter)
    found = time_launches(policy, shape, request.gpu, shop, say, status)
    launches = {row.scale_index: launch_of(row) for row in found.rows}
    drawn = held_out_pairs(adapter.num_classes, request.pairs, ATTEMPT)
    seen = compare_on(adapter, policy, launches, drawn, status, more=request.constraint.more)
    proof, shortfall = evidence(seen, adapter, policy, request.constraint, confidence_of(ATTEMPT))
    gain = generation(seen, adapter)
    say(f"[{time.monotonic() - begun:4.0f} s] {describe_evidence(proof)}; {gain.speedup.median:.2f}x")
    if shortfall > 0 or gain.speedup.low <= 1:
        what = f"{shortfall:.2f} dB short" if shortfall > 0 else f"{gain.speedup.low:.2f}x at the low end, no gain"
        raise NothingMeetsTheBound(f"the policy searched on {source.silicon.gpu} does not do here ({what}): give --search")
    source_words = f"searched on {source.silicon.gpu} ({source.created}), certified again here"
    return make_profile(request, adapter, policy, source_words, seen, proof, launches, found, found.tried)
