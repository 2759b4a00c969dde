"""CS4A's decision pass in Triton: softmax mass of every key for every query tile, then the best keys as lists.

Two kernels. `mass_kernel` recomputes the scores of the sampled queries against the known log-sum-exp of the dense pass and
sums probabilities over each tile. `select_kernel` finds, per tile, the mass above which the listed keys fill the list (a
binary search over the bits of a non-negative float) and writes the keys in ascending order. No sort, no host round trip.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mass_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, lse_ptr, mass_ptr, rows_ptr, heads_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_lb, stride_lh,
    num_heads, num_tiles, num_keys, mass_keys, keys_each, scale_log2e,
    EACH: tl.constexpr, SAMPLES: tl.constexpr, IEEE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (chunk of keys, group of BLOCK_M // SAMPLES tiles, batch x head); rows_ptr [T, EACH] int32 query numbers."""
    GROUP: tl.constexpr = BLOCK_M // SAMPLES
    i_bh = tl.program_id(2)
    i_b, i = (i_bh // num_heads).to(tl.int64), i_bh % num_heads
    i_head = tl.load(heads_ptr + i).to(tl.int64)
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tile = tl.program_id(1) * GROUP + offs_m // SAMPLES
    sample = offs_m % SAMPLES
    real = (tile < num_tiles) & (sample < EACH)
    rows = tl.load(rows_ptr + tile * EACH + sample, mask=real, other=0)
    in_d = offs_d < HEAD_DIM
    q_at = q_ptr + i_b * stride_qb + i_head * stride_qh + rows[:, None] * stride_qn + offs_d[None, :]
    q = tl.load(q_at, mask=real[:, None] & in_d[None, :], other=0.0)
    # rows that are not real get an infinite log-sum-exp: their probabilities are 0
    lse = tl.load(lse_ptr + i_b * stride_lb + i_head * stride_lh + rows, mask=real, other=float("inf")) * 1.4426950408889634
    k_base = k_ptr + i_b * stride_kb + i_head * stride_kh
    out_tile = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    out_base = mass_ptr + (i_bh.to(tl.int64) * num_tiles + out_tile[:, None]) * mass_keys
    start = tl.program_id(0) * keys_each
    end = tl.minimum(start + keys_each, num_keys)
    for begin in range(start, end, BLOCK_N):
        at = begin + offs_n
        keys = tl.load(k_base + at[:, None] * stride_kn + offs_d[None, :], mask=(at < end)[:, None] & in_d[None, :], other=0.0)
        if IEEE:
            s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        else:
            s = tl.dot(q, tl.trans(keys))
        p = tl.exp2(s * scale_log2e - lse[:, None])
        summed = tl.sum(tl.reshape(p, [GROUP, SAMPLES, BLOCK_N]), 1)
        keep = (out_tile < num_tiles)[:, None] & (at < end)[None, :]
        tl.store(out_base + at[None, :], summed.to(mass_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _levels(mass_at, first_at, offs, real, HAS_FIRST: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mass as integers in the same order; the bits of a non-negative float are one. -1 where there is no key."""
    mass = tl.load(mass_at + offs, mask=real, other=0.0)
    if EXACT:
        level = mass.to(tl.int32, bitcast=True)
    else:
        level = mass.to(tl.int16, bitcast=True).to(tl.int32)
    if HAS_FIRST:
        ahead = tl.load(first_at + offs, mask=real, other=0)
        level = tl.where(ahead != 0, (1 << 31) - 1 if EXACT else (1 << 15) - 1, level)
    return tl.where(real, level, -1)


@triton.jit
def _emit(out, table_ptr, offs, taken, place, most, CHILDREN: tl.constexpr):  # type: ignore[no-untyped-def]
    for child in tl.static_range(CHILDREN):
        inside = taken > child
        key = tl.load(table_ptr + offs * most + child, mask=inside, other=0)
        tl.store(out + place + child, key, mask=inside)


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    mass_ptr, keys_ptr, first_ptr, source_ptr, table_ptr, weight_ptr,
    list_at, head_step, batch_step, row_step, num_heads, num_tiles, num_keys, mass_keys, width, most,
    EXACT: tl.constexpr, HAS_FIRST: tl.constexpr, CHILDREN: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Program (list row, batch x head): list row r takes the mass of tile source[r].

    Key j of the decision scale stands for weight[j] keys, table[j, :weight[j]]; the heaviest fill `width` places, equal
    mass in order of position; the last one may be cut. first [T, num_keys] int8: keys that go ahead of all others.
    A row is worked on as MAIN + TAIL keys, powers of two, so that 4,121 keys do not cost as much as 8,192.
    """
    i_row, i_bh = tl.program_id(0), tl.program_id(1)
    tile = tl.load(source_ptr + i_row)
    mass_at = mass_ptr + (i_bh.to(tl.int64) * num_tiles + tile) * mass_keys
    first_at = first_ptr + tile * num_keys
    offs, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    level = _levels(mass_at, first_at, offs, offs < num_keys, HAS_FIRST, EXACT)
    level_r = _levels(mass_at, first_at, rest, rest < num_keys, HAS_FIRST, EXACT)
    weight = tl.load(weight_ptr + offs, mask=offs < num_keys, other=0)
    weight_r = tl.load(weight_ptr + rest, mask=rest < num_keys, other=0)
    # The largest level whose keys still fill the list, bit by bit. Of a bf16 row 2**-16 of its largest mass is as good as
    # nothing, which leaves 11 bits.
    bound = tl.full([], 0, tl.int32)
    BITS: tl.constexpr = 31 if EXACT else 11
    if not EXACT:
        floor = tl.maximum(tl.maximum(tl.max(level), tl.max(level_r)) - (1 << BITS) + 1, 0)
        level = tl.where(level < 0, -1, tl.maximum(level - floor, 0))
        level_r = tl.where(level_r < 0, -1, tl.maximum(level_r - floor, 0))
    for bit in tl.static_range(BITS):
        trial = bound | (1 << (BITS - 1 - bit))
        filled = tl.sum(tl.where(level >= trial, weight, 0)) + tl.sum(tl.where(level_r >= trial, weight_r, 0))
        bound = tl.where(filled >= width, trial, bound)
    left = width - tl.sum(tl.where(level > bound, weight, 0)) - tl.sum(tl.where(level_r > bound, weight_r, 0))
    equal, equal_r = tl.where(level == bound, weight, 0), tl.where(level_r == bound, weight_r, 0)
    before = tl.cumsum(equal) - equal
    taken = tl.where(level > bound, weight, tl.maximum(tl.minimum(left - before, equal), 0))
    before_r = tl.sum(equal) + tl.cumsum(equal_r) - equal_r
    taken_r = tl.where(level_r > bound, weight_r, tl.maximum(tl.minimum(left - before_r, equal_r), 0))
    i_b, i = (i_bh // num_heads).to(tl.int64), i_bh % num_heads
    out = keys_ptr + list_at + i_b * batch_step + i * head_step + i_row * row_step
    _emit(out, table_ptr, offs, taken, tl.cumsum(taken) - taken, most, CHILDREN)
    _emit(out, table_ptr, rest, taken_r, tl.sum(taken) + tl.cumsum(taken_r) - taken_r, most, CHILDREN)
