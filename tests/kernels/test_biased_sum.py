"""The sum at the end of a residual block against one written here, number by number in fp64 and rounded where PyTorch rounds."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from interpreted import hold, hold_in_interpreter
from tolerances import DTYPES

from sparvar_kernels.path import biased_sum

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FP32, BF16, FP16 = DTYPES


def check(shape=(2, 12, 5, 7), dtype=FP16, last=True, x_bias=None, bias=FP32, device="cpu") -> None:  # type: ignore[no-untyped-def]
    """x_bias, bias: their dtypes."""
    g = torch.Generator().manual_seed(sum(shape))
    layout = torch.channels_last if last else torch.contiguous_format
    x, update = (torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    biases = [None if kind is None else torch.randn(shape[1], generator=g).to(kind) for kind in (x_bias, bias)]
    sums = []
    for t, b in zip((x, update), biases, strict=True):
        sums.append(t.double())
        for c in range(shape[1]) if b is not None else ():
            sums[-1][:, c] += float(b[c].to(dtype))
        sums[-1] = sums[-1].to(dtype).double()
    given = [t if t is None else t.to(device) for t in (x, update, *biases)]
    out = biased_sum(*given)
    assert out is given[1] and torch.equal(given[0].cpu(), x)
    assert torch.equal(out.cpu(), (sums[0] + sums[1]).to(dtype)), (shape, dtype, last, x_bias, bias)


CASES = (
    *({"dtype": dtype, "last": last, "x_bias": x_bias, "bias": bias} for dtype, last, x_bias, bias in (
        (BF16, True, None, FP32), (FP16, False, FP32, FP16), (FP32, True, FP32, None), (FP16, True, BF16, FP32),
        (BF16, False, None, None))),
    {"shape": (1, 32, 16, 16), "x_bias": FP32}, {"shape": (1, 4, 40, 130), "last": False}, {"shape": (1, 130, 2, 3)},
    {"shape": (3, 1, 1, 3), "x_bias": FP32}, {"shape": (1, 160, 9, 8), "dtype": FP16},
)  # fmt: skip


def test_on_a_cpu():
    assert hold(check, CASES) == len(CASES)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    assert hold_in_interpreter("test_biased_sum") == len(CASES) - 2


@pytest.mark.parametrize(("changes", "reason"), [
    ({"x": torch.zeros(2, 8, 4)}, r"want \[B, C, H, W\]"), ({"x": torch.zeros(2, 8, 4, 4).double()}, "x: got torch.float64"),
    ({"update": torch.zeros(2, 8, 4, 5)}, "update"), ({"update": torch.zeros(2, 8, 4, 4).half()}, "float16"),
    ({"x": torch.zeros(2, 8, 4, 8)[..., ::2]}, "x: got strides"),
    ({"update": torch.zeros(2, 8, 4, 8)[..., ::2]}, "update: got strides"),
    ({"x": torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)}, "memory format of x"),
    ({"bias": torch.zeros(4)}, "bias"), ({"x_bias": torch.zeros(16)[::2]}, "x_bias"),
    ({"bias": torch.zeros(8, requires_grad=True)}, "no backward"), ({"bias": torch.zeros(8, device="meta")}, "bias"),
])  # fmt: skip
def test_refuses_in_one_line(changes, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        biased_sum(**{"x": torch.zeros(2, 8, 4, 4), "update": torch.zeros(2, 8, 4, 4), **changes})
    assert "\n" not in str(caught.value)


def test_an_empty_batch_is_an_empty_picture():
    assert biased_sum(torch.zeros(0, 4, 2, 2), torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)


@needs_triton
@pytest.mark.slow
def test_real_sizes_compile_without_a_spill_and_with_wide_accesses():
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.path.triton.biased_sum import biased_sum_build
    from sparvar_kernels.path.triton.group_norm import Cut

    cases = ((128, 1024, BF16, FP32, (9, 0)), (160, 512, FP16, None, (8, 0)), (640, 64, FP16, FP32, (12, 0)))
    for channels, side, dtype, x_bias, capability in cases:
        build = biased_sum_build(Cut(1, channels, side * side, True), dtype, x_bias, FP32)
        text = machine_code(compile_for(build, capability))
        takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert takes["STACK"] == takes["LOCAL"] == 0 and takes["REG"] <= 128, (channels, capability, takes)
        wide = [m for m in re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]*)", text) if "128" in m.split(".")]
        assert len(wide) >= 3, (channels, capability)


@pytest.mark.gpu
def test_on_a_gpu():
    assert hold(check, CASES, device="cuda") == len(CASES)
    for channels, side in ((128, 1024), (160, 256), (640, 64)):
        check((1, channels, side + 3, side), FP16, x_bias=FP32, device="cuda")
