"""Rows scaled for a product of 8-bit numbers, against the formats' definitions."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec

import eight_bits
import pytest
import torch
from interpreted import in_interpreter

from sparvar_kernels.path import scaled_rows
from sparvar_kernels.path.scaled_rows import E4M3, FORMATS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
JOBS = (
    {}, {"shape": (1, 1)}, {"shape": (3, 5, 7)}, {"shape": (2, 129), "dtype": "bfloat16"}, {"shape": (5, 96), "dtype": "float16"},
    {"shape": (4, 33), "first": "gelu", "dtype": "bfloat16"}, {"shape": (4, 40), "first": "silu"}, {"size": 1e-30},
    {"size": 1e30}, {"fmt": "int8"}, {"fmt": "int8", "shape": (2, 129), "dtype": "bfloat16"}, {"fmt": "int8", "size": 1e-30},
    {"fmt": "int8", "shape": (4, 33), "first": "gelu", "dtype": "float16"}, {"fmt": "int8", "shape": (4, 40), "first": "silu"},
)  # fmt: skip


def check(shape=(6, 48), dtype="float32", first="none", size=1.0, fmt="e4m3", device="cpu") -> float:
    """The share of numbers that are not the oracle's; where an exponential comes first a few may be rounded otherwise."""
    g = torch.Generator().manual_seed(sum(shape))
    x, up = ((torch.randn(shape, generator=g) * size).to(getattr(torch, dtype)) for _ in range(2))
    x.view(-1, shape[-1])[0] = 0  # a row of zeros stays one
    made = scaled_rows(x.to(device), first, up.to(device) if first == "silu" else None, fmt)
    assert made.rows.dtype == FORMATS[fmt].dtype and made.rows.shape == x.shape and made.scales.shape == (*x.shape[:-1], 1)
    want = x.double()
    if first == "gelu":
        want = 0.5 * want * (1 + torch.tanh(math.sqrt(2 / math.pi) * (want + 0.044715 * want**3)))
    if first == "silu":
        want = want / (1 + torch.exp(-want)) * up.double()
    rows, scales = eight_bits.scaled(want.to(x.dtype).reshape(-1, shape[-1]), fmt)
    got = made.rows.cpu().float().double().reshape(rows.shape)
    torch.testing.assert_close(
        made.scales.cpu().double().reshape(scales.shape), scales, rtol=1e-2 if first != "none" else 1e-7, atol=0
    )
    return float((got != rows).double().mean())


def worst() -> float:
    return max(check(**job) - (0.05 if job.get("first") else 0.0) for job in JOBS)


def test_the_format():
    """Every value, every middle between two, and what lies around them, as PyTorch's own cast has it."""
    table = eight_bits.values()
    assert len(table) == 127 and float(table[-1]) == 448
    middles = (table[1:] + table[:-1]) / 2
    x = torch.cat([table, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)])
    x = torch.cat([x, -x])
    assert torch.equal(eight_bits.rounded(x), x.float().to(E4M3).double())


def test_on_a_cpu():
    assert worst() <= 0


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter():
    assert in_interpreter("test_scaled_rows", "t.worst()") <= 0


@pytest.mark.gpu
def test_on_a_gpu():
    assert max(check(**job, device="cuda") - (0.05 if job.get("first") else 0.0) for job in JOBS) <= 0
    x = torch.randn(64, 14336, device="cuda").bfloat16()
    for fmt in FORMATS:
        on_gpu, here = scaled_rows(x, fmt=fmt), scaled_rows(x.cpu(), fmt=fmt)
        assert torch.equal(on_gpu.rows.view(torch.uint8).cpu(), here.rows.view(torch.uint8))
        assert torch.equal(on_gpu.scales.cpu(), here.scales)
    for bad in (math.nan, math.inf, -math.inf):
        assert not_finite(bad, "int8", "cuda") == not_finite(bad, "e4m3", "cuda") == [False, True, False]


def not_finite(bad: float, fmt: str, device: str = "cpu") -> list[bool]:
    """Which of three rows, the middle one with a number that is not finite, hold a NaN."""
    x = torch.ones(3, 4, device=device)
    x[1, 2] = bad
    made = scaled_rows(x, fmt=fmt)
    return (made.rows.float() * made.scales).isnan().any(1).tolist()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad, fmt):
    assert not_finite(bad, fmt) == [False, True, False]


def test_ties_go_to_the_even_whole_number():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 3.49, -126.5]])
    made = scaled_rows(row, fmt="int8")
    assert float(made.scales) == 1 and made.rows.tolist() == [[127, 0, 2, 2, 0, -2, 126, 3, -126]]


@pytest.mark.parametrize(("given", "said"), [
    ({"x": torch.ones(2, 3).double()}, "x"), ({"x": torch.ones(3, 2).t()}, "contiguous"),
    ({"x": torch.ones(2, 0)}, "C of 1..32768"),
    ({"first": "relu"}, "want none, gelu or silu"), ({"first": "silu"}, "want one exactly with silu"),
    ({"fmt": "int4"}, "want e4m3 or int8"),
    ({"up": torch.ones(2, 3)}, "want one exactly with silu"), ({"first": "silu", "up": torch.ones(2, 4)}, "up"),
])  # fmt: skip
def test_wrong_inputs_are_one_line(given, said):
    with pytest.raises(ValueError, match=said) as refused:
        scaled_rows(**{"x": torch.ones(2, 3), **given})
    assert "\n" not in str(refused.value)


@needs_triton
@pytest.mark.slow
def test_compiles_without_a_spill():
    """Without a GPU: rows of Infinity-8B and HART, converted by the hardware's own rounding, 16 bytes at a time."""
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.path.triton.scaled_rows import scaled_rows_build

    for capability, channels, first, fmt in (
        ((8, 9), 3584, "none", "e4m3"), ((9, 0), 14336, "gelu", "e4m3"), ((12, 0), 4096, "silu", "e4m3"),
        ((8, 0), 3584, "none", "int8"), ((9, 0), 14336, "gelu", "int8"),
    ):  # fmt: skip
        text = machine_code(compile_for(scaled_rows_build(torch.bfloat16, channels, first, fmt), capability))
        takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert takes["STACK"] == takes["LOCAL"] == 0 and takes["REG"] <= 64, takes
        narrow = [m for m in re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]*)", text) if "128" not in m]
        assert ("E4M3" in text) == (fmt == "e4m3") and len(narrow) == 1  # the scale


def test_every_number_of_the_format_and_every_middle_between_two():
    """Each is kept, and each middle goes to the even one."""
    grid = torch.cat((torch.arange(8) / 512, *((1 + torch.arange(8) / 8) * 2.0 ** (e - 7) for e in range(1, 16))))[:-1]
    row = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))  # its largest is 448: the factor is 1
    rows, scales = scaled_rows(torch.cat((row, -row)))
    evens = torch.stack((grid[:-1], grid[1:]))[torch.arange(len(grid) - 1) % 2, torch.arange(len(grid) - 1)]
    want = torch.cat((grid, evens))
    assert float(scales) == 1 and torch.equal(rows.float(), torch.cat((want, -want)))
