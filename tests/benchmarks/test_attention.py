"""Speed of the sparse variants against dense: `pytest tests/benchmarks --benchmark-enable -m ''` on any machine.

On a CPU the last scale of pocketvar; on a GPU (marker gpu) the last scale of Infinity-8B. Each case first agrees with its
oracle on a small problem in tests/test_variants.py; what is timed here is checked for finiteness only.
"""

from __future__ import annotations

import pytest
import torch

from sparvar_kernels import AttentionProblem, Cs4a, Csla, Policy, Pooled, Reuse, ScaleSchedule, SparseAttention, Tile

SCHEDULE = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
WINDOWS = (-1,) * 8 + (1, 1, 3, 5, 7)
VARIANTS = {
    "dense": None,
    "csla 8x16": Csla(WINDOWS, 5, Tile(8, 16)),
    "csla paper": Csla(WINDOWS, 5, Tile(0, 128), "block128"),
    "cs4a 10% 8x8": Cs4a(10, 0.1, Tile(8, 8)),
    "cs4a 10% 8x16": Cs4a(10, 0.1, Tile(8, 16)),
    "cs4a paper": Cs4a(10, 0.2, Tile(0, 192), "index", bands=(7, 9)),
    "pooled 2x2": Pooled(9, 2),
    "pooled 4x4": Pooled(9, 4),
    "reuse": Reuse(10),
}


def bench(benchmark, name: str, device: str, batch: int, heads: int, dim: int, dtype: str) -> None:
    variant = VARIANTS[name]
    attend = SparseAttention(Policy.uniform(1, heads, {12: variant} if variant else {}), SCHEDULE, logit_bound=20.0)
    before, last = (AttentionProblem(SCHEDULE, s, batch, heads, dim, dtype, 1.0, 20.0) for s in (10, 12))
    attend(*before.make_inputs(0, device), layer=0, scale_index=10)
    q, k, v = last.make_inputs(1, device)

    def call() -> torch.Tensor:
        out = attend(q, k, v, 0, 12)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    out = benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    assert bool(torch.isfinite(out if out is not None else call()).all())


@pytest.mark.parametrize("name", VARIANTS)
def test_last_scale_of_pocketvar(benchmark, name):
    bench(benchmark, name, "cpu", 1, 4, 64, "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_last_scale_of_infinity_8b(benchmark, name):
    bench(benchmark, name, "cuda", 2, 28, 128, "bf16")
