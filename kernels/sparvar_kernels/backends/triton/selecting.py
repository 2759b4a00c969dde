"""CS4A's decision pass in Triton: softmax mass of every key for every query tile, then the best keys as lists.

Two kernels. `mass_kernel` recomputes the scores of the sampled queries against the known log-sum-exp of the dense pass and
sums probabilities over each tile. `select_kernel` finds, per tile, the mass above which the listed keys fill the list (a
search over the bits of a non-negative float, three ways a step) and writes the keys in ascending order. Where several scales
want lists, it first writes a shortlist that holds all they may take, and then works on that. No sort, no host round trip.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparvar_kernels.backends.triton.binary import INTERPRETED, TYPES, Build, launcher, pointer
from sparvar_kernels.backends.triton.gathered import FP32_DOT, LOG2E, block_d
from sparvar_kernels.backends.triton.work import Lists
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import Tile, partition
from sparvar_kernels.variants import Cs4a
from sparvar_kernels.variants.cs4a.planner import children, keys_kept, source_tiles, window_first

ALL_OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 80}  # 80 registers: three programs on a multiprocessor
SHORT_OPTIONS = ALL_OPTIONS | {"num_warps": 4}  # a quarter of the keys
LEVELS = tl.constexpr(2048)  # of bf16 mass: 16 octaves
COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q_base, lse_base, rows_ptr, tile, sample, num_tiles, stride_qn,
    EACH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sampled queries as columns [BLOCK_D, M], and their log-sum-exp to the base 2 [M]."""
    rows = tl.load(rows_ptr + tile * EACH + sample, mask=(tile < num_tiles) & (sample < EACH), other=-1)
    real = rows >= 0  # a short tile has fewer
    offs_d = tl.arange(0, BLOCK_D)
    q_at = q_base + rows[:, None] * stride_qn + offs_d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    # rows that are not real get an infinite log-sum-exp: their probabilities are 0
    return tl.trans(q), tl.load(lse_base + rows, mask=real, other=float("inf")) * 1.4426950408889634


@triton.jit
def mass_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, lse_ptr, mass_ptr, rows_ptr, heads_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_lb, stride_lh,
    num_heads, num_tiles, num_keys, mass_keys, keys_each, scale_log2e,
    EACH: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (chunk of keys, group of BLOCK_M // SAMPLES tiles, batch x head); rows_ptr [T, EACH] int32 query numbers, -1
    where a tile has no more.

    The queries stay, keys stream past; a tile of more than BLOCK_M sampled queries is read in parts, again for every step.
    Scores are keys x queries, so that the sum over a tile's queries stays within a thread.
    """
    GROUP: tl.constexpr = BLOCK_M // SAMPLES
    PARTS: tl.constexpr = (EACH + SAMPLES - 1) // SAMPLES
    i_bh = tl.program_id(2)
    i_b, i = (i_bh // num_heads).to(tl.int64), i_bh % num_heads
    i_head = tl.load(heads_ptr + i).to(tl.int64)
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # Places of SIDE tiles take turns, EACH_TIME of a tile: those of one tile are then in one thread's columns of the product
    SIDE: tl.constexpr = 4 if GROUP % 4 == 0 else 1
    EACH_TIME: tl.constexpr = 2
    TURN: tl.constexpr = SIDE * EACH_TIME
    run, place = offs_m // (SIDE * SAMPLES), offs_m % (SIDE * SAMPLES)
    tile = tl.program_id(1) * GROUP + run * SIDE + place % TURN // EACH_TIME
    sample = place // TURN * EACH_TIME + place % EACH_TIME
    q_base = q_ptr + i_b * stride_qb + i_head * stride_qh
    lse_base = lse_ptr + i_b * stride_lb + i_head * stride_lh
    k_base = k_ptr + i_b * stride_kb + i_head * stride_kh
    out_tile = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    out_base = mass_ptr + (i_bh.to(tl.int64) * num_tiles + out_tile[None, :]) * mass_keys
    start = tl.program_id(0) * keys_each
    end = tl.minimum(start + keys_each, num_keys)
    q, lse = _queries(q_base, lse_base, rows_ptr, tile, sample, num_tiles, stride_qn, EACH, HEAD_DIM, BLOCK_D)
    for begin in range(start, end, BLOCK_N):
        at = begin + offs_n
        k_at = k_base + tl.minimum(at, num_keys - 1)[:, None] * stride_kn + offs_d[None, :]  # the last key again, not stored
        keys = tl.load(k_at) if BLOCK_D == HEAD_DIM else tl.load(k_at, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        summed = tl.zeros([BLOCK_N, GROUP], tl.float32)
        for part in range(0, PARTS):
            if PARTS > 1:
                q, lse = _queries(
                    q_base, lse_base, rows_ptr, tile, sample + part * SAMPLES, num_tiles, stride_qn, EACH, HEAD_DIM, BLOCK_D
                )
            p = tl.exp2(tl.dot(keys, q, input_precision=FP32_DOT) * scale_log2e - lse[None, :])
            p = tl.sum(tl.reshape(p, [BLOCK_N, GROUP // SIDE, SAMPLES // EACH_TIME, SIDE, EACH_TIME]), 4)
            summed += tl.reshape(tl.sum(p, 2), [BLOCK_N, GROUP])
        keep = (out_tile < num_tiles)[None, :] & (at < end)[:, None]
        tl.store(out_base + at[:, None], summed.to(mass_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _load(at, real, other):  # type: ignore[no-untyped-def]
    """What lies at `at`, `other` where it is not real; real: None for all, which are then loaded 16 bytes at a time."""
    if real is None:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=real, other=other)
    return loaded


@triton.jit
def _keys(short_at, offs, real, SHORT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions of the keys worked on: of a shortlist, or all of them; real: None for all."""
    if SHORT:
        keys = _load(short_at + offs, real, 0)
    else:
        keys = offs
    return keys


@triton.jit
def levels(mass_at, keys, real, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mass as integers in the same order; the bits of a non-negative float are one. 0 where there is no key; real: None for all.

    NaN and infinity, of a query that holds them, count as no mass: a level above all others would never end a list.
    """
    mass = _load(mass_at + keys, real, 0.0)
    if EXACT:
        level = mass.to(tl.int32, bitcast=True)
        level = tl.where((level >= 0) & (level < 0x7F800000), tl.minimum(level, 0x4EFFFFFF), 0)
    else:
        level = mass.to(tl.int16, bitcast=True).to(tl.int32)
        level = tl.where((level >= 0) & (level < 0x7F80), level, 0)
    return level


@triton.jit
def ranked(level, floor, first_at, keys, real, TOP: tl.constexpr, HAS_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels from `floor` on as 0 to TOP - 1; TOP for keys that go ahead of all others, -1 where there is no key."""
    level = tl.maximum(level - floor, 0)
    if HAS_FIRST:
        level = tl.where(_load(first_at + keys, real, 0) != 0, TOP, level)
    if real is not None:
        level = tl.where(real, level, -1)
    return level


@triton.jit
def weights(weight_ptr, keys, real, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    if ONE:
        weight = tl.full(keys.shape, 1, tl.int32)
    else:
        weight = _load(weight_ptr + keys, real, 0)
    return weight


@triton.jit
def over_two(level, weight, low, high, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight of keys at `low` and above in the lower half of the bits, at `high` and above in the upper half."""
    weight = weight.to(tl.int32 if SHIFT == 16 else tl.int64)
    return tl.where(level >= high, weight + (weight << SHIFT), tl.where(level >= low, weight, 0))


@triton.jit
def counts(both, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two sums that lie over one another: of the lower and of the upper half of the bits."""
    return (both & ((1 << SHIFT) - 1)).to(tl.int32), (both >> SHIFT).to(tl.int32)


@triton.jit
def thirds(bound, end):  # type: ignore[no-untyped-def]
    """(low, high): where a search for a level in [bound, end) looks next."""
    third = (end - bound + 2) // 3
    return bound + third, tl.minimum(bound + 2 * third, end)


@triton.jit
def narrowed(at_low, at_high, width, bound, end, above, low, high):  # type: ignore[no-untyped-def]
    """(bound, end, weight at `end` and above) after a look at the weight at `low` and above, and at `high` and above."""
    fills_low, fills_high = at_low >= width, at_high >= width
    above = tl.where(fills_high, above, tl.where(fills_low, at_high, at_low))
    end = tl.where(fills_high, end, tl.where(fills_low, high, low))
    bound = tl.where(fills_high, high, tl.where(fills_low, low, bound))
    return bound, end, above


@triton.jit
def scatter(at, keys, many):  # type: ignore[no-untyped-def]
    """Stores keys where many > 0, from the threads that loaded them.

    Triton gives a store a layout of its own, of one key in a thread, and works out in it all that leads there: a scan then
    goes through all threads for each register. A store of PTX has none, so keys stay as loads of 16 bytes leave them.
    """
    if COMPILED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,r,r",
            [at.to(tl.int64, bitcast=True), keys, many], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(at, keys, mask=many > 0)


@triton.jit
def put(  # type: ignore[no-untyped-def]
    out, table_ptr, keys, level, weight, before, bound, left, more_before, equal_before, most,
    SHIFT: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """Writes the chosen keys of one block behind `more_before` entries above the bound and `equal_before` at it.

    before: the weight ahead of each key within the block, at the bound or above it, and above it in the upper half of the bits.
    """
    LOWER: tl.constexpr = (1 << SHIFT) - 1
    above = (before >> SHIFT).to(tl.int32) + more_before
    equal = ((before & LOWER) - (before >> SHIFT)).to(tl.int32) + equal_before
    taken = tl.where(level > bound, weight, tl.where(level == bound, tl.maximum(tl.minimum(left - equal, weight), 0), 0))
    at = out + above + tl.minimum(equal, left)
    scatter(at, keys, taken)  # a key's first child is itself
    for child in tl.static_range(1, CHILDREN):
        scatter(at + child, tl.load(table_ptr + keys * most + child, mask=taken > child, other=0), taken - child)


@triton.jit
def emit(  # type: ignore[no-untyped-def]
    out, table_ptr, keys, level, weight, bound, left, more_before, equal_before, most,
    SHIFT: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """`put` where nothing else is counted along with this block."""
    seen = over_two(level, weight, bound, bound + 1, SHIFT)
    before = tl.cumsum(seen) - seen
    put(out, table_ptr, keys, level, weight, before, bound, left, more_before, equal_before, most, SHIFT, CHILDREN)


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    mass_ptr, keys_ptr, first_ptr, source_ptr, table_ptr, weight_ptr, short_ptr,
    list_at, head_step, batch_step, row_step, num_heads, num_tiles, all_keys, num_keys, mass_keys, width, most,
    EXACT: tl.constexpr, HAS_FIRST: tl.constexpr, SHORT: tl.constexpr, SHIFT: tl.constexpr, CHILDREN: tl.constexpr,
    FLAT: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Program (list row, batch x head): list row r takes the mass of tile source[r].

    Key j of the decision scale stands for weight[j] keys, table[j, :weight[j]], itself first; the heaviest fill `width`
    places, equal mass in order of position; the last one may be cut. first [T, all_keys] int8: keys that go ahead of all
    others, by position among themselves. SHORT: only the tile's num_keys in short [.., T, num_keys], ascending, are looked at.
    A row is worked on as HALF + HALF + TAIL keys, powers of two, so that 4,121 keys do not cost as much as 8,192; FLAT: the
    first half's keys all have weight 1. Two sums at a time share an integer of twice SHIFT bits. mass_keys, and num_keys of a
    shortlist, are multiples of 16: a thread loads consecutive keys, and scans stay within it.
    """
    SIZE: tl.constexpr = 0x4F000001 if EXACT else LEVELS  # 2**31 as a float tops any mass
    STEPS: tl.constexpr = 20 if EXACT else 7  # of a search that keeps a third: 3**STEPS >= SIZE
    i_row, i_bh = tl.program_id(0), tl.program_id(1)
    tile = tl.load(source_ptr + i_row)
    row = i_bh.to(tl.int64) * num_tiles + tile
    mass_at = mass_ptr + tl.multiple_of(row * mass_keys, 16)
    short_at = short_ptr + (tl.multiple_of(row * num_keys, 16) if SHORT else 0)
    first_at = first_ptr + tile * all_keys
    offs_a = tl.arange(0, HALF)
    offs_b, offs_c = HALF + tl.arange(0, HALF), 2 * HALF + tl.arange(0, TAIL)
    real_a, real_b, real_c = None, None, offs_c < num_keys
    if HALF == 16:  # the least there is: from 64 keys on both halves are full
        real_a, real_b = offs_a < num_keys, offs_b < num_keys
    keys_a, keys_b, keys_c = (
        _keys(short_at, offs_a, real_a, SHORT), _keys(short_at, offs_b, real_b, SHORT), _keys(short_at, offs_c, real_c, SHORT),
    )  # fmt: skip
    a, b, c = (
        levels(mass_at, keys_a, real_a, EXACT), levels(mass_at, keys_b, real_b, EXACT),
        levels(mass_at, keys_c, real_c, EXACT),
    )  # fmt: skip
    # of a bf16 row 2**-16 of its largest mass is as good as nothing
    floor = 0 if EXACT else tl.maximum(tl.maximum(tl.max(tl.maximum(a, b)), tl.max(c)) - (SIZE - 2), 0)
    a = ranked(a, floor, first_at, keys_a, real_a, SIZE - 1, HAS_FIRST)
    b = ranked(b, floor, first_at, keys_b, real_b, SIZE - 1, HAS_FIRST)
    c = ranked(c, floor, first_at, keys_c, real_c, SIZE - 1, HAS_FIRST)
    weight_a = weights(weight_ptr, keys_a, real_a, FLAT or CHILDREN == 1)
    weight_b = weights(weight_ptr, keys_b, real_b, CHILDREN == 1)
    weight_c = weights(weight_ptr, keys_c, real_c, CHILDREN == 1)
    # The largest level whose keys still fill the list lies in [bound, end).
    bound, end, above = tl.full([], 0, tl.int32), tl.full([], SIZE, tl.int32), tl.full([], 0, tl.int32)
    for _ in tl.static_range(STEPS):
        low, high = thirds(bound, end)
        both = tl.sum(over_two(a, weight_a, low, high, SHIFT) + over_two(b, weight_b, low, high, SHIFT))
        both += tl.sum(over_two(c, weight_c, low, high, SHIFT))
        bound, end, above = narrowed(*counts(both, SHIFT), width, bound, end, above, low, high)
    at_a, above_a = counts(tl.sum(over_two(a, weight_a, bound, bound + 1, SHIFT)), SHIFT)
    at_b, above_b = counts(tl.sum(over_two(b, weight_b, bound, bound + 1, SHIFT)), SHIFT)
    equal_a, equal_b = at_a - above_a, at_b - above_b
    left = width - above
    i_b, i = (i_bh // num_heads).to(tl.int64), i_bh % num_heads
    out = keys_ptr + list_at + i_b * batch_step + i * head_step + i_row * row_step
    emit(out, table_ptr, keys_a, a, weight_a, bound, left, 0, 0, most, SHIFT, 1 if FLAT else CHILDREN)
    emit(out, table_ptr, keys_b, b, weight_b, bound, left, above_a, equal_a, most, SHIFT, CHILDREN)
    emit(out, table_ptr, keys_c, c, weight_c, bound, left, above_a + above_b, equal_a + equal_b, most, SHIFT, CHILDREN)


@lru_cache(maxsize=256)
def _sample_rows(grid: tuple[int, int], tile: Tile, sample: int, device: str) -> Tensor:
    rows, own = partition(grid, tile).sampled(sample)
    return torch.where(own, rows, -1).int().contiguous().to(device)


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _MassBlock:
    """queries: sampled ones a program holds; samples: places a tile has of them; keys: of one step."""

    queries: int
    samples: int
    keys: int

    @classmethod
    def of(cls, problem: AttentionProblem, each: int) -> _MassBlock:
        """For tiles of `each` sampled queries: as many as registers and 64 KiB of shared memory take."""
        places = max(8, 1 << (each - 1).bit_length())
        if problem.dtype == "fp32":
            queries, keys = 64, 32
        else:
            queries, keys = min(256 if places >= 64 else 128, 65536 // (2 * block_d(problem.head_dim))), 64
        return cls(queries, min(places, queries), keys)


@lru_cache(maxsize=256)
def mass_build(problem: AttentionProblem, each: int, aligned: bool) -> Build:
    """What `column_mass` launches; each: sampled rows of a tile."""
    block, kind = _MassBlock.of(problem, each), problem.dtype
    types = {"q_ptr": f"*{kind}", "k_ptr": f"*{kind}", "lse_ptr": "*fp32", "mass_ptr": f"*{TYPES[mass_dtype(kind)]}",
             "rows_ptr": "*i32", "heads_ptr": "*i32", "scale_log2e": "fp32"}  # fmt: skip
    ints = [n for n in mass_kernel.arg_names if n.startswith(("stride_", "num_")) or n in ("mass_keys", "keys_each")]
    constants = {"EACH": each, "SAMPLES": block.samples, "HEAD_DIM": problem.head_dim, "BLOCK_D": block_d(problem.head_dim),
                 "BLOCK_M": block.queries, "BLOCK_N": block.keys}  # fmt: skip
    options = {"num_warps": 8 if block.queries > 128 else 4, "num_stages": 3}
    return Build.of(mass_kernel, types | dict.fromkeys(ints, "i32"), constants, options, aligned)


def mass_dtype(kind: str) -> torch.dtype:
    """Of the mass of inputs of dtype `kind`: bf16 ranks keys to within 0.4 % of their mass."""
    return torch.float32 if kind == "fp32" else torch.bfloat16


def sampled_rows(problem: AttentionProblem, tile: Tile, sample: int) -> int:
    """How many rows of a tile `column_mass` looks at."""
    return _sample_rows(problem.grid, tile, sample, "cpu").shape[1]


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, problem: AttentionProblem, heads: tuple[int, ...], tile: Tile, sample: int
) -> Tensor:
    """[B, h, T, Nk or more, a multiple of 16]: softmax probability of each key summed over the sampled queries of each tile.

    lse [B, H, Nq] fp32, unit stride along Nq: natural log of the sum of exponentials over all keys.
    """
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    device = str(q.device)
    rows = _sample_rows(problem.grid, tile, sample, device)
    tiles, each = rows.shape
    block = _MassBlock.of(problem, each)
    padded = -(-problem.num_keys // 16) * 16
    mass = torch.empty(problem.batch, len(heads), tiles, padded, dtype=mass_dtype(problem.dtype), device=q.device)
    groups = -(-tiles * block.samples // block.queries)
    chunks = max(1, min(-(-problem.num_keys // (4 * block.keys)), -(-528 // (groups * problem.batch * len(heads)))))
    keys_each = -(-problem.num_keys // (chunks * block.keys)) * block.keys  # enough programs for any GPU
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
def child_table(problem: AttentionProblem, decision_scale: int, expand: bool, device: str) -> tuple[Tensor, Tensor, int]:
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
def first_keys(problem: AttentionProblem, variant: Cs4a, device: str) -> Tensor | None:
    first = window_first(problem.schedule, variant, device)
    return None if first is None else first.to(torch.int8).contiguous()


def expands(variant: Cs4a, problem: AttentionProblem) -> bool:
    """True if listed keys of the decision scale stand for several of this one."""
    return variant.keys == "place" and problem.scale_index != variant.decision_scale


def _there(variant: Cs4a, problem: AttentionProblem) -> Cs4a:
    return variant.at_decision(problem.schedule, problem.scale_index) if expands(variant, problem) else variant


@lru_cache(maxsize=256)
def select_build(variant: Cs4a, problem: AttentionProblem, mass: torch.dtype, short: int = 0) -> Build:
    """What `select` launches for lists of `variant` in the stage at `problem`; short: keys of its shortlist, 0: none."""
    _, weight, most = child_table(problem, variant.decision_scale, expands(variant, problem), "cpu")
    n = short or problem.schedule.num_keys(variant.decision_scale)
    half = max(16, 1 << max(n.bit_length() - 2, 0))
    types = {name: "*i32" for name in ("keys_ptr", "source_ptr", "table_ptr", "weight_ptr", "short_ptr")}
    types |= {"mass_ptr": f"*{TYPES[mass]}", "first_ptr": "*i8"}
    ints = ("list_at", "head_step", "batch_step", "row_step", "num_heads", "num_tiles", "all_keys", "num_keys", "mass_keys",
            "width", "most")  # fmt: skip
    constants = {
        "EXACT": mass == torch.float32, "HAS_FIRST": first_keys(problem, _there(variant, problem), "cpu") is not None,
        "SHORT": short > 0, "SHIFT": 16 if problem.num_keys < 1 << 15 else 32, "CHILDREN": most,
        "FLAT": not short and bool((weight[:half] == 1).all()),
        "HALF": half, "TAIL": max(16, 1 << max(n - 2 * half, 0).bit_length()),
    }  # fmt: skip
    options = SHORT_OPTIONS if short else ALL_OPTIONS
    return Build.of(select_kernel, types | dict.fromkeys(ints, "i32"), constants, options, True)


def shortlisted(variant: Cs4a, decision: AttentionProblem, scales: Collection[int]) -> int:
    """How many of the best keys hold all that the lists of these scales may take; 0 where a shortlist would gain nothing.

    variant: in its form at the decision scale. Whatever a key stands for, a list has no more of them than places.
    """
    full = decision.num_keys
    most = max(keys_kept(variant, decision.schedule, s if variant.keys == "place" else variant.decision_scale) for s in scales)
    return -(-most // 16) * 16 if len(scales) > 1 and 3 * most <= full else 0


def shortlist(mass: Tensor, variant: Cs4a, decision: AttentionProblem, heads: tuple[int, ...], many: int) -> Tensor:
    """[B, h, T, many] int32: positions of each tile's heaviest keys, ascending. variant: in its form at the decision scale."""
    short = torch.empty(*mass.shape[:3], many, dtype=torch.int32, device=mass.device)
    tiles = mass.shape[2]
    lists = Lists(variant, heads, 0, tiles * many, len(heads) * tiles * many, many, tiles, many)
    select(mass, short, lists, decision, decision)
    return short


def select(
    mass: Tensor, keys: Tensor, lists: Lists, problem: AttentionProblem, decision: AttentionProblem, short: Tensor | None = None
) -> None:
    """Fills `lists` in the key buffer of the stage at `problem` from mass [B, h, T_S, >= Nk_S] of the decision scale.

    short: a shortlist to choose from; see `shortlisted`.
    """
    device, variant = str(mass.device), lists.variant
    expand = expands(variant, problem)
    table, weight, most = child_table(problem, variant.decision_scale, expand, device)
    first = first_keys(problem, _there(variant, problem), device)
    sources = _list_sources(problem, variant, lists.rows, device)
    n = 0 if short is None else short.shape[3]
    run = launcher(select_build(variant, problem, mass.dtype, n), mass.device)
    run(
        (lists.rows, problem.batch * len(lists.heads), 1),
        pointer(mass), pointer(keys), pointer(mass if first is None else first),
        pointer(sources), pointer(table), pointer(weight), pointer(keys if short is None else short),
        lists.at, lists.head_step, lists.batch_step, lists.row_step, len(lists.heads), mass.shape[2],
        decision.num_keys, n or decision.num_keys, mass.shape[3], lists.width, most,
    )  # fmt: skip
