"""The product of 8-bit rows with its epilogue, against fp64 on the rows' own numbers."""

from __future__ import annotations

import importlib
import math
import re
from importlib.util import find_spec

import pytest
import torch
from interpreted import in_interpreter

from sparvar_kernels.path import ScaledRows, scaled_product, scaled_rows
from sparvar_kernels.path.scaled_rows import FORMATS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SMALL = ({}, {"then": "gelu"}, {"shape": (2, 3, 48), "bias": False}, {"shape": (1, 16), "outputs": 144, "dtype": "float16"})
INT8 = (
    {"fmt": "int8"}, {"fmt": "int8", "then": "gelu"}, {"fmt": "int8", "shape": (2, 3, 48), "bias": False},
    {"fmt": "int8", "shape": (1, 16), "outputs": 144, "dtype": "float16"}, {"fmt": "int8", "shape": (32,)},
)  # fmt: skip
LARGE = (
    {"shape": (3, 333, 256), "outputs": 1024, "then": "gelu"}, {"shape": (999, 1024), "outputs": 256},
    {"shape": (130, 2048), "outputs": 400, "dtype": "bfloat16"}, {"fmt": "int8", "shape": (3, 333, 256), "outputs": 1024},
    {"fmt": "int8", "shape": (130, 2048), "outputs": 400, "dtype": "bfloat16", "then": "gelu"},
)  # fmt: skip
OTHER = (
    {"shape": (4, 20)},
    {"outputs": 5},
    {"shape": (0, 32)},
    {"fmt": "int8", "shape": (4, 20), "outputs": 5},
    {"fmt": "int8", "shape": (0, 32)},
)  # no kernel takes them


def check(shape=(5, 32), outputs=32, dtype="float32", bias=True, then="none", fmt="e4m3", device="cpu") -> float:
    """The largest error over the largest value."""
    g = torch.Generator().manual_seed(sum(shape) + outputs)
    out = getattr(torch, dtype)
    x = scaled_rows(torch.randn(shape, generator=g) * 3, fmt=fmt).rows, torch.rand(*shape[:-1], 1, generator=g)
    w = scaled_rows(torch.randn(outputs, shape[-1], generator=g), fmt=fmt).rows, torch.rand(outputs, 1, generator=g) / 100
    b = torch.randn(outputs, generator=g).to(out) if bias else None
    got = scaled_product(
        ScaledRows(*(t.to(device) for t in x)),
        ScaledRows(*(t.to(device) for t in w)),
        None if b is None else b.to(device),
        out,
        then,
    )
    assert got.dtype == out and got.shape == (*shape[:-1], outputs)
    want = (x[0].double() * x[1].double()) @ (w[0].double() * w[1].double()).t()
    want = want if b is None else want + b.double()
    if then == "gelu":
        want = 0.5 * want * (1 + torch.erf(want / math.sqrt(2)))
    return float((got.cpu().double() - want).abs().amax() / want.abs().amax()) if got.numel() else 0.0


def worst(jobs=SMALL, device="cpu") -> float:
    """Over all, in roundings of the dtype: of sums in fp32 a thousandth of that of bf16."""
    ulp = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}
    return max(check(**job, device=device) / ulp[job.get("dtype", "float32")] for job in jobs)


def test_on_a_cpu():
    assert worst(SMALL + INT8 + LARGE + OTHER) <= 1


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    assert in_interpreter("test_scaled_product", "t.worst(t.SMALL[:2])") <= 1
    assert in_interpreter("test_scaled_product", "t.worst(t.INT8)") <= 1
    assert (
        in_interpreter("test_scaled_product", "t.worst(({'shape': (130, 272), 'outputs': 144, 'bias': False},) + t.SMALL[3:])")
        <= 1
    )


@pytest.mark.gpu
def test_on_a_gpu():
    assert worst(INT8, "cuda") <= 1, "whole numbers add up exactly"
    assert worst(SMALL + LARGE + OTHER, "cuda") <= 250  # 5e-4: tensor cores keep fewer bits of a sum on the way
    x, w = scaled_rows(torch.ones(70_000, 64, device="cuda")), scaled_rows(torch.ones(64, 64, device="cuda"))
    assert torch.allclose(scaled_product(x, w), torch.full((), 64.0, device="cuda"))


@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_is_not_hidden(fmt):
    x = torch.ones(3, 16)
    x[1, 2] = math.nan
    out = scaled_product(scaled_rows(x, fmt=fmt), scaled_rows(torch.ones(16, 16), fmt=fmt), then="gelu")
    assert out.isnan().all(1).tolist() == [False, True, False] and bool(out[::2].isfinite().all())


@pytest.mark.parametrize(("change", "said"), [
    ({"then": "relu"}, "want none or gelu"), ({"out_dtype": torch.float64}, "out_dtype"), ({"bias": torch.ones(3)}, "bias"),
    ({"bias": torch.ones(16).bfloat16()}, "bias: got torch.bfloat16"), ({"rows": torch.ones(2, 32)}, "x.rows: got torch.float32"),
    ({"rows": torch.ones(2, 32, dtype=torch.int8)}, "x.rows: got torch.int8, want torch.float8"),
    ({"inputs": 48}, "x.rows: got"), ({"scales": torch.ones(2)}, "x.scales"), ({"rows": "turned"}, "contiguous"),
])  # fmt: skip
def test_wrong_inputs_are_one_line(change, said):
    x, w = scaled_rows(torch.ones(2, 32)), scaled_rows(torch.ones(16, change.pop("inputs", 32)))
    rows = change.pop("rows", x.rows)
    rows = scaled_rows(torch.ones(32, 2)).rows.t() if isinstance(rows, str) else rows
    with pytest.raises(ValueError, match=said) as refused:
        scaled_product(ScaledRows(rows, change.pop("scales", x.scales)), w, **change)
    assert "\n" not in str(refused.value)


@needs_triton
@pytest.mark.slow
def test_compiles_without_a_spill():
    """Without a GPU: tensor cores take the 8-bit numbers themselves."""
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code
    from sparvar_kernels.path.triton.scaled_product import scaled_product_build

    for capability, gelu, fmt, takes_them in (
        ((8, 9), False, "e4m3", "QMMA"), ((9, 0), True, "e4m3", "QGMMA"),
        ((8, 0), False, "int8", "IMMA"), ((9, 0), True, "int8", "IGMMA"),
    ):  # fmt: skip
        text = machine_code(compile_for(scaled_product_build(torch.float32, 256, 1024, gelu=gelu, fmt=fmt), capability))
        takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert takes["STACK"] == takes["LOCAL"] == 0, takes
        assert takes_them in text


def test_sums_of_whole_numbers_are_exact_with_instructions_for_them_and_without(monkeypatch):
    """The largest that there are, so that sums of 16 bits on the way would show, and more than fp32 holds exactly."""
    module = importlib.import_module("sparvar_kernels.path.scaled_product")
    rows, weight = (torch.full((n, 4096), 127, dtype=torch.int8) for n in (3, 5))
    rows[1, ::2], weight[2] = -127, -127
    rows[2, 0] = 126
    want = (rows.long() @ weight.long().t()).float()
    for has in (module.multiplies_int8(), False):
        monkeypatch.setattr(module, "multiplies_int8", lambda: has)  # noqa: B023
        assert torch.equal(module.sums_of(rows, weight), want)
