"""q/k norm + learned scale + rotation + append to the cache, in one pass over what the qkv product wrote."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

NO_TURN, INTERLEAVED, HALVES, ROTATE_HALF = range(4)
TURNS = {"interleaved": INTERLEAVED, "halves": HALVES, "rotate_half": ROTATE_HALF}
WARPS = 4
HEADS_EACH = (4, 3, 2, 1)  # heads that share what a program reads of a table of whole channels: the first of these that divides


@triton.jit
def _halves(base, rows, inside, stride, DIM: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two members of every pair, [BLOCK_L, HALF] fp32 each: places 2i and 2i + 1, or i and i + DIM / 2."""
    if TURN == 1:
        offs = tl.arange(0, 2 * HALF)
        both = tl.load(base + rows[:, None] * stride + offs[None, :], mask=inside[:, None] & (offs < DIM)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
    else:
        offs = tl.arange(0, HALF)
        mask = inside[:, None] & (offs < DIM // 2)[None, :]
        at = base + rows[:, None] * stride + offs[None, :]
        first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + DIM // 2, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _write(base, rows, inside, stride, first, second, DIM: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds once, and writes what `_halves` read."""
    first, second = first.to(base.dtype.element_ty), second.to(base.dtype.element_ty)
    if TURN == 1:
        offs = tl.arange(0, 2 * HALF)
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * HALF])
        tl.store(base + rows[:, None] * stride + offs[None, :], both, mask=inside[:, None] & (offs < DIM)[None, :])
    else:
        offs = tl.arange(0, HALF)
        mask = inside[:, None] & (offs < DIM // 2)[None, :]
        at = base + rows[:, None] * stride + offs[None, :]
        tl.store(at, first, mask=mask)
        tl.store(at + DIM // 2, second, mask=mask)


@triton.jit
def append_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, k_ptr, v_ptr, query_ptr, scale_ptr, table_ptr,
    stride_ib, stride_il, stride_ip, stride_ih, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_qb, stride_ql, stride_qh, stride_tb, stride_tl, length, start, eps,
    NORMALISE: tl.constexpr, SCALED: tl.constexpr, TURN: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_L: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (group of HEADS heads, block of tokens, row of the batch).

    A program's tokens are neighbours in the cache, and its heads are neighbours in the product's output.
    """
    i_b, i_group = tl.program_id(2).to(tl.int64), tl.program_id(0)
    token = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = token < length
    rows = token.to(tl.int64)
    first = tl.cast(start, tl.int64)
    if TURN == 1 or TURN == 2:  # (cos, sin) of each pair
        cos, sin = _halves(table_ptr + i_b * stride_tb, rows, inside, stride_tl, DIM, HALF, 1)
        cos_2, sin_2 = cos, sin
    if TURN == 3:  # of each channel
        at_table = table_ptr + i_b * stride_tb
        cos, sin = _halves(at_table, rows, inside, stride_tl, DIM, HALF, 1)
        cos_2, sin_2 = _halves(at_table + DIM, rows, inside, stride_tl, DIM, HALF, 1)
    for i in range(0, HEADS):
        head = (i_group * HEADS + i).to(tl.int64)
        at = qkv_ptr + i_b * stride_ib + head * stride_ih
        q_1, q_2 = _halves(at, rows, inside, stride_il, DIM, HALF, TURN)
        k_1, k_2 = _halves(at + stride_ip, rows, inside, stride_il, DIM, HALF, TURN)
        v_1, v_2 = _halves(at + 2 * stride_ip, rows, inside, stride_il, DIM, HALF, TURN)
        at_v = v_ptr + i_b * stride_vb + head * stride_vh + first * stride_vn
        _write(at_v, rows, inside, stride_vn, v_1, v_2, DIM, HALF, TURN)
        if SCALED:
            factor = tl.load(scale_ptr + head)
        if NORMALISE:
            q_norm = tl.sqrt(tl.sum(q_1 * q_1 + q_2 * q_2, 1))
            k_norm = tl.sqrt(tl.sum(k_1 * k_1 + k_2 * k_2, 1))
            k_by = 1.0 / tl.maximum(k_norm, eps)
            k_1, k_2 = k_1 * k_by[:, None], k_2 * k_by[:, None]
            q_by = 1.0 / tl.maximum(q_norm, eps)
            if SCALED:
                q_by = q_by * factor
            q_1, q_2 = q_1 * q_by[:, None], q_2 * q_by[:, None]
        elif SCALED:
            q_1, q_2 = q_1 * factor, q_2 * factor
        if TURN > 0:
            q_1, q_2 = q_1 * cos - q_2 * sin, q_2 * cos_2 + q_1 * sin_2
            k_1, k_2 = k_1 * cos - k_2 * sin, k_2 * cos_2 + k_1 * sin_2
        at_k = k_ptr + i_b * stride_kb + head * stride_kh + first * stride_kn
        _write(at_k, rows, inside, stride_kn, k_1, k_2, DIM, HALF, TURN)
        at_q = query_ptr + i_b * stride_qb + head * stride_qh
        _write(at_q, rows, inside, stride_ql, q_1, q_2, DIM, HALF, TURN)


def append_build(
    dtype: torch.dtype, head_dim: int, heads: int, length: int, *, normalise: bool, scaled: bool, turn: int, aligned: bool = True
) -> PathBuild:
    """What a call launches; aligned: all addresses and strides are multiples of 16 elements or bytes."""
    types = {f"{name}_ptr": f"*{TYPES[dtype]}" for name in ("qkv", "k", "v", "query")} | {
        "scale_ptr": "*fp32",
        "table_ptr": "*fp32",
    }
    types |= {name: "i64" if name.endswith("b") else "i32" for name in append_kernel.arg_names if name.startswith("stride_")}
    types |= {"length": "i32", "start": "i32", "eps": "fp32"}
    constants = {
        "NORMALISE": normalise, "SCALED": scaled, "TURN": turn, "DIM": head_dim,
        "HALF": max(1, triton.next_power_of_2(head_dim) // 2), "BLOCK_L": block_l(head_dim, length),
        "HEADS": heads_each(heads, turn),
    }  # fmt: skip
    return PathBuild.of(append_kernel, types, constants, {"num_warps": WARPS, "num_stages": 1}, aligned)


def block_l(head_dim: int, length: int) -> int:
    """Tokens of a program: 16 of 128 numbers, as many as a thread holds with 16-byte accesses; fewer where there are few."""
    return min(max(16 * 128 // triton.next_power_of_2(head_dim), 4), 4 if length <= 64 else 64)


def heads_each(heads: int, turn: int) -> int:
    """Half a table or none is read so quickly that more programs gain more: 3 to 8 % on an H100."""
    return next(n for n in HEADS_EACH if heads % n == 0) if turn == ROTATE_HALF else 1


@lru_cache(maxsize=4096)
def append_launch(
    qkv: Form, cache_k: Form, cache_v: Form, query: Form, q_scale: Form, rotation: Form, normalise: bool, turn: int,
    device: torch.device,
) -> tuple[Launcher, tuple[int, int, int], tuple[int, ...]]:  # fmt: skip
    """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
    assert qkv is not None and cache_k is not None and cache_v is not None and query is not None
    (batch, length, _, heads, dim), dtype = qkv[0], qkv[2]
    table = (0, 0)
    if rotation is not None:
        per_row, at = len(rotation[0]) == 4 and rotation[0][0] > 1, rotation[1]
        table = (at[0] if per_row else 0, at[-3])
    strides = (*qkv[1][:4], *cache_k[1][:3], *cache_v[1][:3], *query[1][:3], *table)
    addresses = [t[3] for t in (qkv, cache_k, cache_v, query, rotation) if t is not None]
    aligned = gcd(*strides) % ALIGNMENT == 0 and not any(addresses) and (q_scale is None or q_scale[3] == 0)
    build = append_build(dtype, dim, heads, length, normalise=normalise, scaled=q_scale is not None, turn=turn, aligned=aligned)
    constants = dict(build.constants)
    grid = (heads // constants["HEADS"], -(-length // constants["BLOCK_L"]), batch)
    return launcher(build, device), grid, (*strides, length)
