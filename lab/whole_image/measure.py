"""One model's measurements, yielded piece by piece so that a run that is cut short has lost only the piece it was at."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import sparvar_tune
from lab.whole_image.hart import PublicHart
from lab.whole_image.host import host
from lab.whole_image.infinity import PublicInfinity
from lab.whole_image.ladder import Rung, climb, cudnn, flash, peak_bytes, using, wall_ms
from lab.whole_image.layers import compare
from lab.whole_image.peers import open_peer, peer_ways
from lab.whole_image.var import PublicVar
from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.geometry.scales import Tile
from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import Csla
from sparvar_tune import adapters, fused
from sparvar_tune.cli.machine_checks import triton_cache_folder
from sparvar_tune.generation import CacheBudget, Precision, PruneTokens, scaled_product
from sparvar_tune.policy_search.menu import paper_policy, paper_sinks, paper_windows
from sparvar_tune.profile.machine import version_of
from sparvar_tune.runtime.load import load_profile

CSLA_FROM = 4  # windows at this many last scales
DROPPED = 3  # last scales without the unconditional half
SCALED_FROM = 6  # products of 8-bit floats at this many last scales


def attention_of(parts: Any, driven: Any, which: str | Policy) -> SparseAttention:
    """The shipped "profile" of this GPU and number of images, or "windows": CSLA 8x8 with the paper's windows in every head.

    Where no profile is for this schedule, as at 2048, the paper's policy with default launches. A policy that is given has those.
    """
    schedule = driven.schedule
    launches: dict[int, Launch] = {}
    if isinstance(which, Policy):
        policy = which
    elif which == "profile":
        tuned = load_profile(driven.slug, images=driven.images)
        if tuned.profile is not None and tuned.profile.workload.schedule == schedule:
            return tuned.sparse_attention(parts.logit_bound)
        policy = paper_policy(schedule, parts.layers, parts.heads)
    else:
        last = range(len(schedule) - CSLA_FROM, len(schedule))
        window = Csla(paper_windows(schedule), paper_sinks(schedule), Tile(8, 8))
        policy = Policy.uniform(parts.layers, parts.heads, dict.fromkeys(last, window))
        fetchers = 4 if parts.head_dim == 128 else 0  # as the kernel table's best
        config = TritonConfig(block_m=64, block_n=64, num_warps=4, num_stages=5, fetchers=fetchers)
        launches = {s: Launch("triton", config) for s in last}
    return SparseAttention(
        policy, schedule, softmax_scale=parts.softmax_scale, logit_bound=parts.logit_bound, launches=launches
    )  # fmt: skip


def thinned(parts: Any, driven: Any) -> Iterator[tuple[str, Policy, int]]:
    """(name, policy, last scales left out) of the published methods that leave out tokens and know this model and schedule.

    FastVAR's own form for Infinity leaves out the last two scales besides; both are here.
    """
    schedule, heads = driven.schedule, ("A" * parts.heads,) * parts.layers
    if parts.family in ("infinity", "hart"):
        policy = Policy(heads, (), (PruneTokens.published(parts.family, schedule, parts.layers),))
        yield "FastVAR", policy, 0
        if parts.family == "infinity":
            yield "FastVAR, last two scales left out", policy, 2
    if driven.slug in ("infinity-2b", "infinity-8b"):
        budget = CacheBudget.published(driven.slug)
        if budget.why_not(schedule, parts.layers) is None:
            yield "ScaleKV", Policy(heads, (), (budget,)), 0


class Ways:
    """The ways of one live model. Paths are put on once and switched, so that their graphs stay."""

    def __init__(self, driven: Any) -> None:
        self.driven = driven
        self.family, self.parts = adapters.recognise(driven.model)
        self.paths: list[fused.FusedPath] = []
        self.held: list[Any] = []

    def public(self, name: str, backend: Callable[[], Any]) -> Rung:
        return self._way(name, lambda: backend())

    def attention(self, name: str, which: str) -> Rung:
        attend = attention_of(self.parts, self.driven, which)
        return self._way(name, lambda: adapters.apply(self.driven.model, attend))

    def fused(
        self, name: str, which: str | Policy | None, graphs: bool = True, drop: bool = False, skipped: int = 0,
        scaled: bool = False,
    ) -> Rung:  # fmt: skip
        """drop: the unconditional half at the last scales; skipped: so many last scales. Its path is beneath those hooks. scaled:
        products of 8-bit floats in every layer.
        """
        attend = None if which is None else attention_of(self.parts, self.driven, which)
        if scaled:
            assert attend is not None
            step = Precision(max(0, len(attend.schedule) - SCALED_FROM), ((0, self.parts.layers - 1),))
            attend = SparseAttention(
                replace(attend.policy, steps=(*attend.policy.steps, step)), attend.schedule, softmax_scale=attend.softmax_scale,
                logit_bound=attend.logit_bound, launches=attend.launches,
            )  # fmt: skip
        path = fused.attach(self.parts, fused.stack_of(self.parts), attend, graphs)
        path.enabled = False
        self.paths.append(path)
        first = len(self.driven.schedule) - DROPPED

        def on() -> Any:
            path.enabled = True
            if skipped:
                return adapters.skip_scales(self.driven.model, len(self.driven.schedule) - skipped)
            return adapters.drop_unconditional(self.driven.model, first) if drop else None

        return self._way(name, on, warm=2 if graphs else 0)  # switched on, its decoder is put on and captured again

    def _way(self, name: str, begin: Callable[[], Any], warm: int = 0) -> Rung:
        def on() -> None:
            held = begin()
            if hasattr(held, "__enter__"):
                held.__enter__()
            self.held.append(held)

        def off() -> None:
            held = self.held.pop()
            if hasattr(held, "__exit__"):
                held.__exit__(None, None, None)
            for path in self.paths:
                path.enabled = False

        return Rung(name, on, off, warm)


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    begun = time.monotonic()
    scaled_product.FAST_SUMS = args.fast_sums
    here = host()
    cache = triton_cache_folder()
    cold = not cache.is_dir() or not any(cache.iterdir())
    tuned = load_profile(args.model, images=args.images) if args.first or args.ahead else None
    if tuned is not None and args.ahead:
        tuned.compile()
    driven = _open(args)
    torch.cuda.synchronize()
    loaded = torch.cuda.memory_allocated()
    say(f"{args.model}: {loaded / 2**30:.1f} GiB of weights made in {time.monotonic() - begun:.0f} s")
    yield {
        "model": args.model, "images": args.images, "tokens": driven.schedule.num_keys(len(driven.schedule) - 1),
        "grids": [list(g) for g in driven.schedule.grids], "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": version_of("triton"), "weights_bytes": loaded, "first_only": args.first, "ahead": args.ahead,
        "cold": cold, **here,
    }  # fmt: skip
    if getattr(args, "peer", None):
        yield {"peer": args.peer}
        yield {"ways": climb(driven.draw, peer_ways(args.peer), args.rounds, args.profiled, driven.decoding, say)}
        return
    if args.first:
        assert tuned is not None
        begun = time.perf_counter()
        applied = sparvar_tune.apply(driven.model, tuned, "fused")
        wall_ms(driven.draw)
        at_first = (time.perf_counter() - begun) * 1e3
        then = [wall_ms(driven.draw) for _ in range(3)]
        say(f"apply and first picture {at_first:.0f} ms, then {then}")
        path: Any = applied._change
        yield {
            "apply_and_first_ms": at_first, "next_ms": then, "captured_bytes": path.fused.work.captured_bytes,
            "reason": applied.why_not_fused or applied.why_dense,
        }  # fmt: skip
        return
    ways = Ways(driven)
    best = ways.fused("path, graphs, profile", "profile")
    made = [
        ways.public("public, FlashAttention-2", flash), ways.public("public, cuDNN", cudnn),
        ways.attention("public, our attention (profile)", "profile"),
        ways.fused("path, no graphs, dense", None, graphs=False), ways.fused("path, graphs, dense", None), best,
        ways.fused("path, graphs, CSLA 8x8", "windows"), ways.fused("path, graphs, profile, half dropped", "profile", drop=True),
        ways.fused("path, graphs, CSLA 8x8, half dropped", "windows", drop=True),
        ways.fused("path, graphs, profile, 8-bit products", "profile", scaled=True),
        ways.fused("path, graphs, profile, 8-bit products, half dropped", "profile", drop=True, scaled=True),
        ways.fused("path, graphs, CSLA 8x8, 8-bit products", "windows", scaled=True),
        ways.fused("path, graphs, CSLA 8x8, 8-bit products, half dropped", "windows", drop=True, scaled=True),
    ]  # fmt: skip
    for name, policy, skipped in thinned(ways.parts, driven):
        made.append(ways.fused(f"path, graphs, {name}", policy, skipped=skipped))
    chosen = {way.name: way for way in made if not args.only or way.name.startswith(tuple(args.only))}
    with flash():
        wall_ms(driven.draw)
        public_peak = peak_bytes(driven.draw)
    say(f"public code: peak {public_peak / 2**30:.2f} GiB")
    found: dict[str, Any] = {}
    if args.apart:
        for name in [name for name in chosen if name.startswith("public")]:
            found |= climb(driven.draw, {name: chosen.pop(name)}, args.rounds, args.profiled, driven.decoding, say)
        torch.cuda.empty_cache()
        yield {"apart": True, "ways": found}
    with using(best):
        for _ in range(3):
            driven.draw()
        ours_peak = peak_bytes(driven.draw)
    work = ways.paths[0].work
    assert work is not None, ways.paths[0].reason
    say(f"ours: peak {ours_peak / 2**30:.2f} GiB, graphs hold {work.captured_bytes / 2**30:.2f} GiB")
    yield {"peak_bytes": {"public": public_peak, "ours": ours_peak}, "captured_bytes": work.captured_bytes}
    if args.layers:
        last = len(ways.parts.blocks) - 1
        with flash():
            yield {"layers": compare(driven, (0, last // 2, last), say)}
    yield {"ways": found | climb(driven.draw, chosen, args.rounds, args.profiled, driven.decoding, say)}


def _open(args: argparse.Namespace) -> Any:
    if getattr(args, "peer", None):
        return open_peer(args.peer, args.checkout, args.model, args.images)
    if args.command == "infinity":
        return PublicInfinity(args.checkout, args.model, args.images, args.large)
    return {"var": PublicVar, "hart": PublicHart}[args.command](args.checkout, args.model, args.images)
