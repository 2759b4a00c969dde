"""Gathered attention in Triton: one program per (query tile, batch and head), online softmax over its listed keys.

Rows of K and V are fetched by an int32 list, so a list may hold any keys in any order. Correct first; the fast
variants of this kernel are measured separately. Runs on any NVIDIA GPU Triton supports and in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparvar_kernels.configs import TritonConfig
from sparvar_kernels.lists import KeyLists
from sparvar_kernels.problem import AttentionProblem


@triton.jit
def _gathered_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, counts_ptr, rows_ptr, row_counts_ptr, heads_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_lt, stride_cb, stride_ch,
    num_heads, rows_per_tile, width, scale_log2e,
    HAS_COUNTS: tl.constexpr, IEEE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_tile, i_part, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b = (i_bh // num_heads).to(tl.int64)
    i_list = (i_bh % num_heads).to(tl.int64)
    i_h = tl.load(heads_ptr + i_list).to(tl.int64)
    offs_m = i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < HEAD_DIM
    in_m = offs_m < tl.load(row_counts_ptr + i_tile)
    rows = tl.load(rows_ptr + i_tile * rows_per_tile + offs_m, mask=in_m, other=0).to(tl.int64)  # [BLOCK_M]
    q_at = q_ptr + i_b * stride_qb + i_h * stride_qh + rows[:, None] * stride_qn + offs_d[None, :]
    q = tl.load(q_at, mask=in_m[:, None] & in_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    k_base = k_ptr + i_b * stride_kb + i_h * stride_kh
    v_base = v_ptr + i_b * stride_vb + i_h * stride_vh
    list_base = keys_ptr + i_b * stride_lb + i_list * stride_lh + i_tile.to(tl.int64) * stride_lt
    count = width
    if HAS_COUNTS:
        count = tl.load(counts_ptr + i_b * stride_cb + i_list * stride_ch + i_tile)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, count, BLOCK_N):
        in_n = begin + offs_n < count
        listed = tl.load(list_base + begin + offs_n, mask=in_n, other=0).to(tl.int64)  # [BLOCK_N]
        in_nd = in_n[:, None] & in_d[None, :]
        k = tl.load(k_base + listed[:, None] * stride_kn + offs_d[None, :], mask=in_nd, other=0.0)
        if IEEE:
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            s = tl.dot(q, tl.trans(k))
        s = tl.where(in_n[None, :], s * scale_log2e, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_base + listed[:, None] * stride_vn + offs_d[None, :], mask=in_nd, other=0.0)
        if IEEE:
            acc = acc * shrink[:, None] + tl.dot(p, v, input_precision="ieee")
        else:
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = new_top

    out = acc / total[:, None]
    out_at = out_ptr + i_b * stride_ob + i_h * stride_oh + rows[:, None] * stride_on + offs_d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_d[None, :])


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: KeyLists, heads: Sequence[int], out: Tensor,
    problem: AttentionProblem, config: TritonConfig,
) -> None:  # fmt: skip
    """Writes out[:, heads] of out [B, H, Nq, D]; q [B, H, Nq, D], k, v [B, H, Nk, D] with unit stride along D."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    num_tiles, rows_per_tile = lists.tiles.rows.shape
    keys = lists.keys if lists.keys.stride(-1) == 1 else lists.keys.contiguous()
    counts = keys if lists.counts is None else lists.counts.contiguous()
    table = _head_table(tuple(heads), str(q.device))

    def shared(t: Tensor, axis: int) -> int:
        return 0 if t.shape[axis] == 1 else t.stride(axis)

    grid = (num_tiles, triton.cdiv(rows_per_tile, config.block_m), q.shape[0] * len(heads))
    _gathered_kernel[grid](
        q, k, v, out, keys, counts, lists.tiles.rows, lists.tiles.counts, table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        shared(keys, 0), shared(keys, 1), keys.stride(2), shared(counts, 0), shared(counts, 1),
        len(heads), rows_per_tile, keys.shape[-1], problem.softmax_scale * 1.4426950408889634,
        HAS_COUNTS=lists.counts is not None, IEEE=q.dtype == torch.float32, HEAD_DIM=q.shape[-1],
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[-1])), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


_HEAD_TABLES: dict[tuple[tuple[int, ...], str], Tensor] = {}


def _head_table(heads: tuple[int, ...], device: str) -> Tensor:
    """The head numbers on the device, made once: a copy to the device at every call would stall the launch."""
    if (heads, device) not in _HEAD_TABLES:
        _HEAD_TABLES[heads, device] = torch.tensor(heads, dtype=torch.int32, device=device)
    return _HEAD_TABLES[heads, device]
