"""A variant that somebody else wrote: registered, stored in a policy, run by the backends, held against its own oracle."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from interpreted import in_interpreter
from tolerances import assert_close

from sparvar_kernels import AttentionProblem, Policy, Rule, ScaleSchedule, SparseAttention, Tile
from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.geometry.scales import partition
from sparvar_kernels.variants import VARIANTS, register, variant_from_dict, variant_to_dict
from sparvar_kernels.variants.lists import KeyLists
from sparvar_kernels.variants.protocol import Variant

SCHEDULE = ScaleSchedule(((1, 1), (3, 4), (7, 9)), prefix=2)


@register
@dataclass(frozen=True)
class Strided:
    """Every `step`-th key."""

    step: int
    tile: Tile
    kind: ClassVar[str] = "strided"
    meaning: ClassVar[int] = 1
    reads: ClassVar[str] = "fixed lists"
    decision_scale: ClassVar[None] = None
    residual: ClassVar[bool] = False

    def why_not(self, schedule, scale_index):
        return f"strided: step={self.step}, want >= 1" if self.step < 1 else None

    def at_decision(self, schedule, scale_index):
        return self

    def ranks(self, schedule, scale_index):
        return 0

    def lists(self, schedule, scale_index, device, ranked=None):
        tiles = partition(schedule.grids[scale_index], self.tile, device)
        keys = torch.arange(0, schedule.num_keys(scale_index), self.step, dtype=torch.int32, device=device)
        return KeyLists(tiles, keys.expand(1, 1, len(tiles.rows), -1).contiguous())

    def describe(self):
        return f"strided {self.step} {self.tile}"

    def oracle(self, q, k, v, problem, decision):
        seen = [j for j in range(problem.num_keys) if j % self.step == 0]
        return torch.softmax(q.double() @ k[:, :, seen].double().transpose(-1, -2), -1) @ v[:, :, seen].double()


def result(kernel: str) -> list[float]:
    """Relative errors of two heads, the other one dense."""
    p = AttentionProblem(SCHEDULE, 2, 2, 3, 32)
    q, k, v = p.make_inputs(0)
    variant = Strided(3, Tile(4, 4))
    launches = {s: Launch(kernel, TritonConfig(16, 32, 4, 1) if kernel == "triton" else None) for s in range(3)}
    attend = SparseAttention(Policy(("ADA",), (Rule(2, "A", variant),)), SCHEDULE, launches=launches)
    got, want = attend(q, k, v, 0, 2), variant.oracle(q, k, v, p, None)
    return [float((got[:, h].double() - want[:, h]).norm() / want[:, h].norm()) for h in (0, 2)]


def test_it_runs_and_is_stored():
    variant = Strided(3, Tile(4, 4))
    assert isinstance(variant, Variant) and max(result("cpu")) < 1e-5
    assert variant_from_dict(variant_to_dict(variant), "variant") == variant
    policy = Policy.uniform(1, 2, {2: Strided(0, Tile(4, 4))})
    assert policy.why_not(SCHEDULE, 1, 2) == "rules[0]: strided: step=0, want >= 1"
    p = AttentionProblem(SCHEDULE, 2, 1, 2, 16)
    attend = SparseAttention(Policy.uniform(1, 2, {2: variant}), SCHEDULE)
    q, k, v = p.make_inputs(1)
    assert_close(attend(q, k, v, 0, 2), variant.oracle(q, k, v, p, None), "fp32")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_it_runs_on_triton():
    assert max(in_interpreter("test_own_variant", "t.result('triton')")) < 1e-5


def test_what_is_no_variant_is_refused():
    @dataclass(frozen=True)
    class Half:
        kind: ClassVar[str] = "half"

    with pytest.raises(ValueError, match="has no meaning"):
        register(Half)
    with pytest.raises(ValueError, match="'strided' is taken"):
        register(dataclass(frozen=True)(type("Other", (Strided,), {"__annotations__": {}})))
    assert VARIANTS["strided"] is Strided and "half" not in VARIANTS
