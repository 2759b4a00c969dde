"""What the meanings of variants and backends stand for, as digests of key lists and tables: `python tests/golden/meanings.py`.

Writes meanings.json beside it. Run it when a digest changed because keys are chosen or ordered otherwise, and raise the
`meaning` of that variant or backend in the same change: profiles tuned before are then refused where they use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from sparvar_kernels import AttentionProblem, Cs4a, Csla, Dense, NearFar, Pooled, Reuse, ScaleSchedule, Tile
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.registry import KERNELS
from sparvar_kernels.backends.triton.work import APART
from sparvar_kernels.geometry.scales import partition
from sparvar_kernels.policy import Policy, plan_layers
from sparvar_kernels.variants import VARIANTS
from sparvar_kernels.variants.cs4a.planner import rank_keys, source_tiles, window_first
from sparvar_kernels.variants.near_far.planner import keys_and_means
from sparvar_kernels.variants.pooled.planner import pool_keys

FILE = Path(__file__).with_name("meanings.json")
EVEN = ScaleSchedule(((1, 1), (2, 2), (4, 4), (8, 8), (12, 12), (16, 16)))
ODD = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11), (13, 10)), prefix=5)


def digest(*tensors: torch.Tensor | None) -> str:
    h = hashlib.sha256()
    for t in tensors:
        if t is None:
            h.update(b"none")
            continue
        h.update(repr((tuple(t.shape), str(t.dtype))).encode() + t.contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def variants() -> Iterator[tuple[str, ScaleSchedule, object]]:
    for name, schedule in (("even", EVEN), ("odd", ODD)):
        windows = (-1, -1, 1, 3, 5, 7)
        yield f"{name} exact", schedule, Csla(windows, 2, Tile(4, 4))
        yield f"{name} raster", schedule, Csla(windows, 2, Tile(0, 24))
        yield f"{name} block128", schedule, Csla(windows, 2, Tile(0, 128), "block128")
        yield f"{name} residual", schedule, Csla(windows, 2, Tile(8, 4), decision_scale=3)
        yield f"{name} place", schedule, Cs4a(3, 0.4, Tile(4, 4))
        yield f"{name} place, window, sample", schedule, Cs4a(3, 0.5, Tile(4, 6), window=3, sample=3)
        yield f"{name} index", schedule, Cs4a(3, 0.6, Tile(0, 24), "index", bands=(3, 3), residual=False)
        yield f"{name} pooled", schedule, Pooled(2, 2)
        yield f"{name} near-far", schedule, NearFar(4, 0, Tile(4, 4))
        yield f"{name} near-far, wider", schedule, NearFar(5, 1, Tile(3, 5))
        yield f"{name} reuse", schedule, Reuse(3)
        yield f"{name} dense", schedule, Dense()


def integers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Made without torch's generator, whose numbers may change with its version; all different, so that no tie decides."""
    n = 1
    for side in shape:
        n *= side
    return ((torch.arange(n, dtype=torch.int64) * 7919 + seed * 104729) % 1000003).double().view(shape)


def small_inputs(schedule: ScaleSchedule, s: int) -> tuple:
    """q, k, v and the problem they are of."""
    p = AttentionProblem(schedule, s, 1, 1, 4, "fp64")
    return *(integers((1, 1, n, 4), i) / 1e6 for i, n in enumerate((p.num_queries, p.num_keys, p.num_keys))), p


def of_variant(schedule: ScaleSchedule, variant) -> str:
    """Its lists, or what it computes, at the last scale and at the one before."""
    parts: list[torch.Tensor | None] = []
    for s in (4, 5):
        there = variant.at_decision(schedule, s)
        if variant.reads in ("fixed lists", "keys and means"):
            lists = variant.lists(schedule, s, "cpu")
            # what fills a list behind its count is no key of it
            width = lists.keys.shape[-1]
            at = torch.arange(width) < (width if lists.counts is None else lists.counts[..., None])
            parts += [torch.where(at, lists.keys, -1), lists.counts, lists.tiles.rows, lists.tiles.counts]
        elif variant.reads == "ranked lists":
            tiles = 1 + int(source_tiles(schedule, s, variant).max())
            mass = integers((1, 1, tiles, schedule.num_keys(variant.decision_scale)), s).float()
            first = window_first(schedule, there)
            ranked = rank_keys(mass, variant.ranks(schedule, s), None if first is None else first[:tiles])
            parts += [ranked, variant.lists(schedule, s, "cpu", ranked).keys, source_tiles(schedule, s, variant)]
            rows, own = partition(schedule.grids[variant.decision_scale], there.tile).sampled(variant.sample)
            parts.append(torch.where(own, rows, -1))  # the queries whose mass ranks
        elif variant.reads == "means":
            parts += [(t * 1e6).round().long() for t in pool_keys(*small_inputs(schedule, s), variant)]
        if variant.reads == "keys and means":
            parts += [(t * 1e6).round().long() for t in keys_and_means(*small_inputs(schedule, s), variant)]
        parts.append(torch.tensor([variant.ranks(schedule, s), int(variant.residual)]))
    return digest(*parts)


def of_triton() -> dict[str, str]:
    """The launch tables and fixed lists of the GPU's planner, made on the CPU."""
    layers, found = KERNELS["triton"].load(), {}
    for name, schedule, variant in variants():
        if variant.reads in APART:
            continue
        problems = [AttentionProblem(schedule, s, 2, 3, 64, "bf16") for s in range(6)]
        plans = plan_layers(Policy.uniform(1, 3, {5: variant}), schedule)[0]
        layer = layers.Layer(plans, problems, [TritonConfig()] * 6, "cpu")
        for s in range(6):
            layer.prepare(s)
        stages = [layer.stages[key][0] for key in sorted(layer.stages, key=repr)]
        found[name] = digest(*(t for stage in stages for t in (stage.table, stage.keys)))
    return found


def measured() -> dict[str, object]:
    """{kind: {"meaning", "digests"}} of every variant of ours and of every backend with a planner of its own."""
    out: dict[str, dict[str, object]] = {}
    for name, schedule, variant in variants():
        row = out.setdefault(variant.kind, {"meaning": VARIANTS[variant.kind].meaning, "digests": {}})
        row["digests"][name] = of_variant(schedule, variant)  # type: ignore[index]
    out["triton"] = {"meaning": KERNELS["triton"].meaning, "digests": of_triton()}
    return out


if __name__ == "__main__":
    FILE.write_text(json.dumps(measured(), indent=1, sort_keys=True) + "\n")
