"""Attention to a row's text: few keys, so a program has them all pass by."""

from __future__ import annotations

import math
from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

LOG2E = math.log2(math.e)


@triton.jit
def text_attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, kv_ptr, starts_ptr, out_ptr, stride_qb, stride_qn, stride_qh, stride_kn, stride_kp, stride_kh,
    stride_ob, stride_on, stride_oh, length, scale_log2e,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head, row): it walks over its row's text."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, dims = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside, dim_inside = rows < length, dims < HEAD_DIM
    at = row * stride_qb + head * stride_qh + rows.to(tl.int64)[:, None] * stride_qn + dims[None, :]
    q = tl.load(q_ptr + at, mask=inside[:, None] & dim_inside[None, :], other=0.0)
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        here = keys < end
        key_at = keys.to(tl.int64)[:, None] * stride_kn + head * stride_kh + dims[None, :]
        mask = here[:, None] & dim_inside[None, :]
        k = tl.load(kv_ptr + key_at, mask=mask, other=0.0)
        v = tl.load(kv_ptr + key_at + stride_kp, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
        scores = tl.where(here[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = new_best
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = row * stride_ob + head * stride_oh + rows.to(tl.int64)[:, None] * stride_on + dims[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & dim_inside[None, :])


def text_attention_build(dtype: torch.dtype, head_dim: int, length: int, aligned: bool = True) -> PathBuild:
    """What a call launches."""
    types = {f"{name}_ptr": f"*{TYPES[dtype]}" for name in ("q", "kv", "out")} | {"starts_ptr": "*i32"}
    types |= {
        name: "i64" if name.endswith("b") else "i32" for name in text_attention_kernel.arg_names if name.startswith("stride_")
    }
    types |= {"length": "i32", "scale_log2e": "fp32"}
    single = dtype == torch.float32
    block_m = 16 if length <= 16 else 64
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": max(triton.next_power_of_2(head_dim), 16), "BLOCK_M": block_m,
        "BLOCK_N": 32 if single else 64,
    }  # fmt: skip
    warps = 8 if single and block_m > 16 else 4  # no target spills 64 x 128 sums; of bf16, 8 warps take 1.6 times as long
    return PathBuild.of(text_attention_kernel, types, constants, {"num_warps": warps, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def text_attention_launch(
    q: Form, kv: Form, starts: Form, out: Form, device: torch.device
) -> tuple[Launcher, tuple[int, int, int], tuple[int, ...]]:
    """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
    assert q is not None and kv is not None and starts is not None and out is not None
    batch, length, heads, dim = q[0]
    strides = (*q[1][:3], *kv[1][:3], *out[1][:3])
    aligned = gcd(*strides) % ALIGNMENT == 0 and not any(t[3] for t in (q, kv, starts, out))
    build = text_attention_build(q[2], dim, length, aligned)
    return launcher(build, device), (-(-length // dict(build.constants)["BLOCK_M"]), heads, batch), (*strides, length)
