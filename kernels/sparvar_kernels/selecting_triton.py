"""CS4A's decision pass in Triton: softmax mass of every key for every query tile, then the best keys as lists.

Two kernels. `mass_kernel` recomputes the scores of the sampled queries against the known log-sum-exp of the dense pass and
sums probabilities over each tile. `select_kernel` finds, per tile, the mass above which the listed keys fill the list (a
binary search over the bits of a non-negative float) and writes the keys in ascending order. No sort, no host round trip.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparvar_kernels.binary import TYPES, Build, launcher, pointer
from sparvar_kernels.cs4a import children, source_tiles, window_first
from sparvar_kernels.problem import AttentionProblem
from sparvar_kernels.scales import Tile, partition
from sparvar_kernels.variants import Cs4a, at_decision
from sparvar_kernels.work import Lists

LOG2E = 1.4426950408889634
MASS_KEYS = 64  # keys a step of the mass kernel


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


@lru_cache(maxsize=256)
def _sample_rows(grid: tuple[int, int], tile: Tile, sample: int, device: str) -> Tensor:
    return partition(grid, tile).rows[:, ::sample].int().contiguous().to(device)


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _mass_block(problem: AttentionProblem, each: int) -> tuple[int, int]:
    """(query rows a program, of which a tile with `each` sampled rows takes so many)."""
    samples = max(8, 1 << (each - 1).bit_length())
    return max(64 if problem.dtype == "fp32" else 128, samples), samples


@lru_cache(maxsize=256)
def mass_build(problem: AttentionProblem, each: int, aligned: bool) -> Build:
    """What `column_mass` launches; each: sampled rows of a tile."""
    block_m, samples = _mass_block(problem, each)
    kind = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}[problem.dtype]
    mass = "fp32" if problem.dtype == "fp32" else "bf16"
    types = {"q_ptr": f"*{kind}", "k_ptr": f"*{kind}", "lse_ptr": "*fp32", "mass_ptr": f"*{mass}",
             "rows_ptr": "*i32", "heads_ptr": "*i32", "scale_log2e": "fp32"}  # fmt: skip
    ints = [n for n in mass_kernel.arg_names if n.startswith(("stride_", "num_")) or n in ("mass_keys", "keys_each")]
    head_dim = problem.head_dim
    constants = {"EACH": each, "SAMPLES": samples, "IEEE": problem.dtype == "fp32", "HEAD_DIM": head_dim,
                 "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()), "BLOCK_M": block_m, "BLOCK_N": MASS_KEYS}  # fmt: skip
    options = {"num_warps": 8 if block_m >= 128 else 4, "num_stages": 3}
    return Build.of(mass_kernel, types | dict.fromkeys(ints, "i32"), constants, options, aligned)


def sampled_rows(problem: AttentionProblem, tile: Tile, sample: int) -> int:
    """How many rows of a tile `column_mass` looks at."""
    return _sample_rows(problem.grid, tile, sample, "cpu").shape[1]


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, problem: AttentionProblem, heads: tuple[int, ...], tile: Tile, sample: int
) -> Tensor:
    """[B, h, T, >= Nk]: softmax probability of each key summed over the sampled queries of each tile.

    bf16, which ranks keys to within 0.4 % of their mass; fp32 for fp32 inputs.

    lse [B, H, Nq] fp32, unit stride along Nq: natural log of the sum of exponentials over all keys.
    """
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    device = str(q.device)
    rows = _sample_rows(problem.grid, tile, sample, device)
    tiles, each = rows.shape
    block_m, samples = _mass_block(problem, each)
    padded = -(-problem.num_keys // 16) * 16
    precision = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    mass = torch.empty(problem.batch, len(heads), tiles, padded, dtype=precision, device=q.device)
    groups = -(-tiles // (block_m // samples))
    block_n, programs = MASS_KEYS, groups * problem.batch * len(heads)
    chunks = max(1, min(-(-problem.num_keys // (4 * block_n)), -(-528 // programs)))
    keys_each = -(-problem.num_keys // (chunks * block_n)) * block_n
    aligned = not (q.data_ptr() | k.data_ptr() | q.stride(0) | q.stride(1) | q.stride(2) | k.stride(0) | k.stride(1)
                   | k.stride(2) | lse.stride(0) | lse.stride(1)) & 15  # fmt: skip
    run = launcher(mass_build(problem, each, aligned), q.device)
    run(
        (-(-problem.num_keys // keys_each), groups, problem.batch * len(heads)),
        pointer(q), pointer(k), pointer(lse), pointer(mass), pointer(rows), pointer(_on_device(heads, device)),
        *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2],
        len(heads), tiles, problem.num_keys, padded, keys_each, problem.softmax_scale * LOG2E,
    )  # fmt: skip
    return mass


@lru_cache(maxsize=256)
def _child_table(problem: AttentionProblem, decision_scale: int, expand: bool, device: str) -> tuple[Tensor, Tensor, int]:
    """(table [Nk, most], weights [Nk], most) of `children`; itself alone where lists stay on the decision scale's keys."""
    if not expand:
        n = problem.schedule.num_keys(decision_scale)
        return torch.arange(n, dtype=torch.int32, device=device), torch.ones(n, dtype=torch.int32, device=device), 1
    table, weight = children(problem.schedule, decision_scale, problem.scale_index, device)
    return table.contiguous(), weight.contiguous(), table.shape[1]


@lru_cache(maxsize=256)
def _list_sources(problem: AttentionProblem, variant: Cs4a, rows: int, device: str) -> Tensor:
    """[rows] int32: the decision-scale tile each list takes its mass from."""
    if variant.keys == "index" and problem.scale_index != variant.decision_scale:
        return source_tiles(problem.schedule, problem.scale_index, variant).int().to(device)
    return torch.arange(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _first_keys(problem: AttentionProblem, variant: Cs4a, device: str) -> Tensor | None:
    first = window_first(problem.schedule, variant, device)
    return None if first is None else first.to(torch.int8).contiguous()


def _expands(variant: Cs4a, problem: AttentionProblem) -> bool:
    """True if listed keys of the decision scale stand for several of this one."""
    return variant.keys == "place" and problem.scale_index != variant.decision_scale


def _there(variant: Cs4a, problem: AttentionProblem) -> Cs4a:
    there = at_decision(variant, problem.schedule, problem.scale_index) if _expands(variant, problem) else variant
    assert isinstance(there, Cs4a)
    return there


@lru_cache(maxsize=256)
def select_build(variant: Cs4a, problem: AttentionProblem, mass: torch.dtype) -> Build:
    """What `select` launches for lists of `variant` in the stage at `problem`."""
    most = _child_table(problem, variant.decision_scale, _expands(variant, problem), "cpu")[2]
    n = problem.schedule.num_keys(variant.decision_scale)
    main = 1 << (n.bit_length() - 1)
    types = {name: "*i32" for name in ("keys_ptr", "source_ptr", "table_ptr", "weight_ptr")}
    types |= {"mass_ptr": f"*{TYPES[mass]}", "first_ptr": "*i8"}
    ints = ("list_at", "head_step", "batch_step", "row_step", "num_heads", "num_tiles", "num_keys", "mass_keys", "width", "most")
    constants = {"EXACT": mass == torch.float32, "HAS_FIRST": _first_keys(problem, _there(variant, problem), "cpu") is not None,
                 "CHILDREN": most, "MAIN": main, "TAIL": max(16, 1 << (n - main).bit_length())}  # fmt: skip
    return Build.of(select_kernel, types | dict.fromkeys(ints, "i32"), constants, {"num_warps": 8, "num_stages": 1}, True)


def select(mass: Tensor, keys: Tensor, lists: Lists, problem: AttentionProblem, decision: AttentionProblem) -> None:
    """Fills `lists` in the key buffer of the stage at `problem` from mass [B, h, T_S, >= Nk_S] of the decision scale."""
    device, variant = str(mass.device), lists.variant
    expand = _expands(variant, problem)
    table, weight, most = _child_table(problem, variant.decision_scale, expand, device)
    first = _first_keys(problem, _there(variant, problem), device)
    sources = _list_sources(problem, variant, lists.rows, device)
    n = decision.num_keys
    run = launcher(select_build(variant, problem, mass.dtype), mass.device)
    run(
        (lists.rows, problem.batch * len(lists.heads), 1),
        pointer(mass), pointer(keys), pointer(mass if first is None else first),
        pointer(sources), pointer(table), pointer(weight),
        lists.at, lists.head_step, lists.batch_step, lists.row_step, len(lists.heads), mass.shape[2], n, mass.shape[3],
        lists.width, most,
    )  # fmt: skip
