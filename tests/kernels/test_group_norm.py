"""Group norm + SiLU of pictures against an fp64 oracle written here: a group at a time, by the definition."""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from interpreted import in_interpreter
from tolerances import DTYPES, assert_rounded_once
from torch import Tensor

from sparvar_kernels.path import group_norm_silu

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FP32, BF16, FP16 = DTYPES


def wanted(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float64)
    own = x.shape[1] // groups
    for b in range(x.shape[0]):
        for g in range(groups):
            numbers = x[b, g * own : (g + 1) * own].double()
            mean = numbers.sum() / numbers.numel()
            away = numbers - mean
            out[b, g * own : (g + 1) * own] = away / torch.sqrt((away * away).sum() / numbers.numel() + eps)
    for c in range(x.shape[1]):
        out[:, c] *= 1 if weight is None else weight[c].double()
        out[:, c] += 0 if bias is None else bias[c].double()
    return out / (1 + torch.exp(-out)) if silu else out


class Poisoned:
    """New memory is filled with NaN, so that what nobody wrote shows."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]


def check(
    shape=(2, 12, 5, 7), groups=4, dtype=BF16, out_dtype=None, last=True, silu=True, affine=True, vectors=FP32, mean=0.5,
    eps=1e-6, device="cpu", tolerance=0.0, add=None,
) -> None:  # fmt: skip
    """mean: of the picture, whose deviation is 1; tolerance: beyond one rounding, as a share of the largest; add: its dtype."""
    g = torch.Generator().manual_seed(sum(shape) + groups)
    x = (torch.randn(shape, generator=g) + mean).to(dtype).to(device)
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    weight, bias = (torch.randn(shape[1], generator=g).to(vectors).to(device) if affine else None for _ in range(2))
    added = None if add is None else torch.randn(shape[1], generator=g).to(add).to(device)
    options = {"silu": silu, "out_dtype": out_dtype, "add": added}
    before = x.clone()
    with Poisoned():
        y = group_norm_silu(x, groups, weight, bias, eps, **options)
        again = group_norm_silu(x, groups, weight, bias, eps, **options)
    what = f"{shape} {groups} {dtype} {out_dtype} {last} {silu} {affine} {add}"
    assert torch.equal(x, before) and torch.equal(y, again), what
    assert y.dtype == (out_dtype or dtype) and y.is_contiguous(memory_format=layout), what
    sums = x.cpu()
    if added is not None:  # the bias and the sum, each rounded
        sums = (sums.double() + added.cpu().to(dtype).double()[:, None, None]).to(dtype)
    want = wanted(sums, groups, weight if weight is None else weight.cpu(), bias if bias is None else bias.cpu(), eps, silu)
    if tolerance:
        assert float((y.cpu().double() - want).abs().max()) <= tolerance * float(want.abs().max()), what
    else:
        assert_rounded_once(y.cpu(), want, what)


CASES = (
    *({"dtype": a, "out_dtype": b, "last": last} for last in (True, False) for a, b in (
        (FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16), (FP16, FP32))),
    {"shape": (1, 160, 9, 8), "groups": 32, "dtype": FP32, "silu": False}, {"shape": (1, 48, 4, 5), "groups": 8},
    *({"shape": (1, 15, 3, 5), "groups": 3, "dtype": FP32, "last": last, "affine": last} for last in (True, False)),
    *({"shape": (1, 4, 40, 130), "groups": 2, "last": last, "dtype": FP32} for last in (True, False)),  # several parts
    {"shape": (1, 8, 64, 128), "groups": 4}, {"shape": (1, 130, 2, 3), "groups": 10}, {"shape": (3, 1, 1, 3), "groups": 1},
    {"shape": (1, 7, 4, 4), "groups": 7, "vectors": BF16}, {"shape": (1, 4, 1, 1), "groups": 1, "eps": 0.5, "vectors": FP16},
    *({"shape": (1, 4, 40, 130), "groups": 2, "dtype": FP32, "mean": 1000.0, "last": last, "tolerance": 2e-4}
      for last in (True, False)),
    *({"dtype": dtype, "add": add, "last": last} for last, dtype, add in (
        (True, FP16, FP32), (False, FP16, BF16), (True, FP32, FP16))),
    *({"shape": (1, 4, 40, 130), "groups": 2, "dtype": FP16, "add": FP32, "last": last} for last in (True, False)),
)  # fmt: skip


def run(cases=CASES) -> int:  # type: ignore[no-untyped-def]
    for case in cases:
        check(**case)
    return len(cases)


def test_on_a_cpu():
    assert run() == len(CASES)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    some = "t.CASES[1:10:3] + t.CASES[10:]"  # of the first ten, which are every dtype in both formats, three
    assert in_interpreter("test_group_norm", f"t.run({some})") == len(CASES) - 7


def test_an_empty_batch_is_an_empty_picture():
    assert group_norm_silu(torch.zeros(0, 4, 2, 2), 2).shape == (0, 4, 2, 2)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"x": torch.zeros(2, 8, 4)}, r"want \[B, C, H, W\]"), ({"x": torch.zeros(2, 8, 4, 4).double()}, "float64"),
    ({"x": torch.zeros(2, 8, 4, 8)[..., ::2]}, "contiguous"), ({"x": torch.zeros(2, 4, 8, 4).transpose(1, 2)}, "contiguous"),
    ({"x": torch.zeros(2, 8, 1, 1).expand(2, 8, 4, 4)}, "contiguous"), ({"groups": 3}, "divisor"), ({"groups": 0}, "divisor"),
    ({"weight": torch.zeros(4)}, "weight"), ({"bias": torch.zeros(8).double()}, "bias"), ({"out_dtype": torch.int8}, "out_dtype"),
    ({"bias": torch.zeros(16)[::2]}, "contiguous"), ({"weight": torch.zeros(8, requires_grad=True)}, "no backward"),
    ({"weight": torch.zeros(8, device="meta")}, "weight"), ({"add": torch.zeros(4)}, "add"),
])  # fmt: skip
def test_refuses_in_one_line(changes, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        group_norm_silu(**{"x": torch.zeros(2, 8, 4, 4), "groups": 4, **changes})
    assert "\n" not in str(caught.value)


CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
# (channels, side, channels_last, input, output): what the decoders of Infinity, VAR and HART launch
REAL = (
    (128, 1024, True, BF16, BF16), (256, 512, True, BF16, BF16), (512, 128, True, BF16, BF16), (160, 256, True, FP16, FP16),
    (640, 64, True, FP16, FP16), (128, 1024, True, FP32, BF16), (128, 1024, False, BF16, BF16), (512, 64, False, FP32, FP32),
)  # fmt: skip


@needs_triton
@pytest.mark.slow
def test_real_sizes_compile_without_a_spill_and_with_wide_accesses():
    compile_all(REAL[::3])


def compile_all(shapes=REAL, capabilities=None) -> None:  # type: ignore[no-untyped-def]
    """capabilities: of each shape; None for one, another for each."""
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.path.triton.group_norm import Cut, group_norm_builds

    for i, (channels, side, last, x, out) in enumerate(shapes):
        builds = group_norm_builds(Cut(1, channels, side * side, last), 32, x, out, FP32, FP32, add=FP32 if i % 2 else None)
        for build, capability in product(builds, capabilities or [CAPABILITIES[(i + 2) % 5]]):
            text = machine_code(compile_for(build, capability))
            takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
            assert takes["STACK"] == takes["LOCAL"] == 0 and takes["REG"] <= 128, (build, capability, takes)
            wide = [m for m in re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]*)", text) if "128" in m.split(".")]
            wanted = {"part_moments_kernel": 1, "group_moments_kernel": 0, "group_norm_silu_kernel": 2}[build.function.__name__]
            assert len(wide) >= wanted, (build, capability)


@pytest.mark.gpu
def test_on_a_gpu():
    for case in CASES:
        check(**case, device="cuda")
    for channels, side, last, x, out in REAL:
        for add in (None, FP32):
            check((1, channels, side // 4 + 3, side // 4), 32, x, out, last, device="cuda", add=add)


@pytest.mark.gpu
def test_in_a_graph():
    x = torch.randn(1, 64, 33, 32, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    group_norm_silu(x, 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_norm_silu(x, 32)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, group_norm_silu(x, 32))
