"""A picture of twice the sides against one filled pixel by pixel."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from interpreted import in_interpreter
from tolerances import DTYPES

from sparvar_kernels.path import doubled

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FP32, BF16, FP16 = DTYPES


def check(shape=(2, 12, 5, 7), dtype=FP16, device="cpu") -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    out = doubled(x.to(device))
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
    want = torch.full((*shape[:2], 2 * shape[2], 2 * shape[3]), torch.nan, dtype=dtype)
    for i in range(want.shape[2]):
        for j in range(want.shape[3]):
            want[:, :, i, j] = x[:, :, i // 2, j // 2]
    assert torch.equal(out.cpu(), want), (shape, dtype)


CASES = (
    {}, {"dtype": BF16}, {"dtype": FP32}, {"shape": (1, 32, 16, 16)}, {"shape": (1, 4, 40, 13)}, {"shape": (1, 130, 2, 3)},
    {"shape": (3, 1, 1, 3)}, {"shape": (1, 160, 9, 8)}, {"shape": (1, 8, 1, 1)},
)  # fmt: skip


def run(device="cpu") -> int:  # type: ignore[no-untyped-def]
    for case in CASES:
        check(**case, device=device)
    return len(CASES)


def test_on_a_cpu():
    assert run() == len(CASES)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    assert in_interpreter("test_doubled", "t.run()") == len(CASES)


@pytest.mark.parametrize(("x", "reason"), [
    (torch.zeros(2, 8, 4), r"want \[B, C, H, W\]"), (torch.zeros(2, 8, 4, 4).double(), "float64"),
    (torch.zeros(2, 8, 4, 4), "channels_last"), (torch.zeros(2, 8, 4, 4, device="meta"), "x: got"),
    (torch.zeros(2, 8, 4, 4, requires_grad=True), "no backward"),
])  # fmt: skip
def test_refuses_in_one_line(x, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        doubled(x)
    assert "\n" not in str(caught.value)


def test_an_empty_batch_is_an_empty_picture():
    assert doubled(torch.zeros(0, 4, 2, 2)).shape == (0, 4, 4, 4)


@needs_triton
@pytest.mark.slow
def test_real_sizes_compile_without_a_spill_and_with_wide_accesses():
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.path.triton.doubled import doubled_build
    from sparvar_kernels.path.triton.group_norm import Cut

    for channels, side, dtype, capability in ((128, 512, BF16, (9, 0)), (160, 512, FP16, (8, 0)), (640, 64, FP16, (12, 0))):
        text = machine_code(compile_for(doubled_build(Cut(1, channels, side * side, True), dtype), capability))
        takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert takes["STACK"] == takes["LOCAL"] == 0 and takes["REG"] <= 128, (channels, capability, takes)
        wide = [m for m in re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]*)", text) if "128" in m.split(".")]
        assert len(wide) >= 5, (channels, capability)


@pytest.mark.gpu
def test_on_a_gpu():
    assert run("cuda") == len(CASES)
    x = torch.randn(1, 160, 300, 256, device="cuda").half().contiguous(memory_format=torch.channels_last)
    assert torch.equal(doubled(x), torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
