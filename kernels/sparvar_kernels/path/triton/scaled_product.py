"""A product of 8-bit rows with everything behind it in its epilogue: both scales, bias, GELU, one rounding."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.scaled_rows import NAMES
from sparvar_kernels.path.triton.launch import PathBuild
from sparvar_kernels.path.triton.scaled_rows import EIGHT

BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
OPTIONS = {"num_warps": 8, "num_stages": 3}


@triton.jit
def scaled_product_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, weight_ptr, row_scales_ptr, scales_ptr, bias_ptr, out_ptr, many,
    N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, block of rows): those that share rows run side by side."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < many, n < N
    row_at, weight_at = m.to(tl.int64)[:, None] * K, n[None, :] * K
    SUMS: tl.constexpr = tl.int32 if rows_ptr.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(rows_ptr + row_at + k[None, :], mask=inside_m[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight_ptr + weight_at + k[:, None], mask=inside_n[None, :] & (k < K)[:, None], other=0.0)
        # into fp32 after every block: Hopper's own sums of 8-bit floats keep 14 bits
        sums = tl.dot(x, w, sums, input_precision="ieee", max_num_imprecise_acc=BLOCK_K, out_dtype=SUMS)
    y = sums.to(tl.float32) * tl.load(row_scales_ptr + m, mask=inside_m, other=0.0)[:, None]
    y *= tl.load(scales_ptr + n, mask=inside_n, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    out_at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def scaled_product_build(
    out: torch.dtype,
    inputs: int,
    outputs: int,
    bias: bool = True,
    gelu: bool = False,
    fmt: str = "e4m3",
    aligned: bool = True,
) -> PathBuild:
    """What a call launches; aligned: addresses are multiples of 16 bytes, both sides of the weight multiples of 16."""
    types = {"rows_ptr": EIGHT[fmt], "weight_ptr": EIGHT[fmt], "row_scales_ptr": "*fp32", "scales_ptr": "*fp32"}
    types |= {"bias_ptr": f"*{TYPES[out]}", "out_ptr": f"*{TYPES[out]}", "many": "i32"}
    constants = {"N": outputs, "K": inputs, "BIAS": bias, "GELU": gelu, **BLOCKS}
    return PathBuild.of(scaled_product_kernel, types, constants, OPTIONS, aligned)


@lru_cache(maxsize=4096)
def scaled_product_launch(
    rows: Form, weight: Form, scales: tuple[Form, Form], bias: Form, out: torch.dtype, gelu: bool, device: torch.device
) -> tuple[Launcher, tuple[int, int, int], int]:
    """The binary for tensors of this form, how many programs it is, and the count of rows."""
    assert rows is not None and weight is not None
    outputs, inputs = weight[0]
    many = rows[0][:-1].numel()
    lying = not any(t[3] for t in (rows, weight, *scales, bias) if t is not None)
    build = scaled_product_build(
        out, inputs, outputs, bias is not None, gelu, NAMES[weight[2]], lying and not (inputs | outputs) % ALIGNMENT
    )
    grid = -(-outputs // BLOCKS["BLOCK_N"]), -(-many // BLOCKS["BLOCK_M"]), 1
    return launcher(build, device), grid, many
