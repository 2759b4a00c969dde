"""Four phases made one picture, against one filled pixel by pixel."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from interpreted import hold, hold_in_interpreter
from tolerances import DTYPES

from sparvar_kernels.path import interleaved

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FP32, BF16, FP16 = DTYPES


def check(shape=(2, 12, 5, 7), dtype=FP16, bias=FP32, device="cpu") -> None:  # type: ignore[no-untyped-def]
    """shape: of the picture at half the sides."""
    batch, channels, height, width = shape
    g = torch.Generator().manual_seed(sum(shape))
    phases = torch.randn(batch, 4 * channels, height + 1, width + 1, generator=g).to(dtype)
    beside = None if bias is None else torch.randn(channels, generator=g).to(bias)
    out = interleaved(
        phases.contiguous(memory_format=torch.channels_last).to(device), None if beside is None else beside.to(device)
    )
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
    want = torch.full((batch, channels, 2 * height, 2 * width), torch.nan, dtype=dtype)
    for y in range(2 * height):
        for x in range(2 * width):
            own = (2 * (y % 2) + x % 2) * channels
            pixel = phases[:, own : own + channels, (y + 1) // 2, (x + 1) // 2]
            want[:, :, y, x] = pixel if beside is None else (pixel.float() + beside.to(dtype).float()).to(dtype)
    assert torch.equal(out.cpu(), want), (shape, dtype, bias)


CASES = (
    {}, {"dtype": BF16}, {"dtype": FP32}, {"bias": None}, {"dtype": BF16, "bias": BF16}, {"shape": (1, 32, 16, 16)},
    {"shape": (1, 4, 40, 13)}, {"shape": (1, 130, 2, 3)}, {"shape": (3, 1, 1, 3)}, {"shape": (1, 160, 9, 8), "dtype": BF16},
    {"shape": (1, 8, 1, 1)}, {"shape": (1, 16, 3, 5), "bias": FP16},
)  # fmt: skip


def test_on_a_cpu():
    assert hold(check, CASES) == len(CASES)


@pytest.mark.gpu
def test_on_a_gpu():
    assert hold(check, CASES, device="cuda") == len(CASES)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    assert hold_in_interpreter("test_interleaved") == len(CASES) - 3


GOOD = torch.zeros(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("phases", "bias", "reason"), [
    (torch.zeros(2, 8, 4), None, r"want \[B, C, H, W\]"), (GOOD.double(), None, "float64"),
    (torch.zeros(2, 8, 4, 4), None, "channels_last"), (torch.zeros(2, 8, 4, 4, device="meta"), None, "phases: got"),
    (GOOD.clone().requires_grad_(), None, "no backward"), (torch.zeros(2, 6, 3, 3), None, r"4 C, H \+ 1, W \+ 1"),
    (torch.zeros(2, 8, 0, 3), None, r"4 C, H \+ 1, W \+ 1"), (GOOD, torch.zeros(8), r"bias: got \(8,\), want \(2,\)"),
    (GOOD, torch.zeros(2).double(), "bias: got torch.float64"), (GOOD, torch.zeros(4)[::2], "bias: got strides"),
    (GOOD, torch.zeros(2, device="meta"), "bias: got"),
])  # fmt: skip
def test_refuses_in_one_line(phases, bias, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        interleaved(phases, bias)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("phases", "shape"), [((0, 8, 3, 4), (0, 2, 4, 6)), ((1, 8, 1, 4), (1, 2, 0, 6))])
def test_no_pixels_are_an_empty_picture(phases, shape):
    assert interleaved(torch.zeros(phases).contiguous(memory_format=torch.channels_last)).shape == shape


@needs_triton
@pytest.mark.slow
def test_real_sizes_compile_without_a_spill_and_with_wide_accesses():
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.path.triton.group_norm import Cut
    from sparvar_kernels.path.triton.interleaved import interleaved_build

    for channels, side, dtype, capability in ((128, 512, BF16, (9, 0)), (160, 512, FP16, (8, 0)), (640, 64, FP16, (12, 0))):
        build = interleaved_build(Cut(1, channels, side * side, True), dtype, FP32)
        text = machine_code(compile_for(build, capability))
        takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert takes["STACK"] == takes["LOCAL"] == 0 and takes["REG"] <= 128, (channels, capability, takes)
        wide = [m for m in re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]*)", text) if "128" in m.split(".")]
        assert len(wide) >= 4, (channels, capability)
