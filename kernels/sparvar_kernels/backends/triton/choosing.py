"""All key lists that one ranking of CS4A's decision scale fills, in one launch where that is possible.

A selection waits for its sums over a row of keys, not for work. `merged_select_kernel` therefore finds the shortlist that holds
all a row's lists may take, and then the bounds of all these lists in one search whose sums come together. What it is not made
for (more than three lists, the paper's, a record without a shortlist, mass in fp32, 65,536 keys) goes to `select_kernel`, a
launch for each list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparvar_kernels.backends.triton.binary import Build, launcher, pointer
from sparvar_kernels.backends.triton.selecting import (
    LEVELS,
    child_table,
    counts,
    emit,
    expands,
    first_keys,
    levels,
    narrowed,
    over_two,
    put,
    ranked,
    select,
    select_build,
    shortlist,
    shortlisted,
    thirds,
    weights,
)
from sparvar_kernels.backends.triton.work import Lists
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants import Cs4a

Fill = Sequence[tuple[Lists, Tensor, AttentionProblem]]  # lists, the key buffer they lie in, the stage that reads them
MOST_LISTS = 3
MOST_KEYS = (1 << 16) - 1  # a number of them, and a position, has 16 bits


@triton.jit
def _number(pairs, low, high):  # type: ignore[no-untyped-def]
    """How many of `pairs` of levels, each with the highest of its 16 bits set, are at `low` and above, and at `high` and above:
    two pairs of numbers."""
    low, high = low | (low << 16), high | (high << 16)  # not by a product, which would be worked out with every pair
    at_low, at_high = ((pairs - low) >> 15) & 0x10001, ((pairs - high) >> 15) & 0x10001
    return tl.split(tl.sum(tl.join(at_low, at_high), 0))


@triton.jit
def _side_by_side(x, y, z, THREE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[N, 2, 2], or [N, 2] of the first two: what is done along N is done to all at once, with one wait for other warps."""
    if THREE:
        joined = tl.join(tl.join(x, y), tl.join(z, z))
    else:
        joined = tl.join(x, y)
    return joined


@triton.jit
def _apart(joined, THREE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The three of `_side_by_side` again."""
    if THREE:
        pair, other = tl.split(joined)
        x, y = tl.split(pair)
        z, _ = tl.split(other)
    else:
        x, y = tl.split(joined)
        z = y
    return x, y, z


@triton.jit
def merged_select_kernel(  # type: ignore[no-untyped-def]
    mass_ptr, first_ptr, short_ptr,
    keys_ptr_0, table_ptr_0, weight_ptr_0, keys_ptr_1, table_ptr_1, weight_ptr_1, keys_ptr_2, table_ptr_2, weight_ptr_2,
    list_at_0, row_step_0, width_0, list_at_1, row_step_1, width_1, list_at_2, row_step_2, width_2,
    num_keys, mass_keys, many,
    HAS_FIRST: tl.constexpr, SHIFT: tl.constexpr,
    CHILDREN_0: tl.constexpr, CHILDREN_1: tl.constexpr, CHILDREN_2: tl.constexpr,
    HALF: tl.constexpr, TAIL: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Program (tile, batch x head): up to three lists as `select_kernel` writes them, all from the bf16 mass of this tile.

    Row r of mass [.., T, mass_keys], short [.., T, many] and of all lists belongs together; `row_step` entries from one
    row of a list to the next. short: room for level << 16 | position of the many heaviest keys, ascending. SHORT: a power
    of two that holds them. Both halves of a row are full of keys; mass_keys and many are multiples of 16, so that a thread
    loads consecutive keys and scans stay within it. CHILDREN_2 = 0: there are two lists.
    """
    THREE: tl.constexpr = CHILDREN_2 > 0
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile
    mass_at, short_at = mass_ptr + tl.multiple_of(row * mass_keys, 16), short_ptr + tl.multiple_of(row * many, 16)
    first_at = first_ptr + tile * num_keys
    keys_a = tl.arange(0, HALF)
    keys_b, keys_c = HALF + tl.arange(0, HALF), 2 * HALF + tl.arange(0, TAIL)
    real_c = keys_c < num_keys
    a, b, c = (
        levels(mass_at, keys_a, None, False), levels(mass_at, keys_b, None, False), levels(mass_at, keys_c, real_c, False),
    )  # fmt: skip
    # of a row 2**-16 of its largest mass is as good as nothing
    floor = tl.maximum(tl.maximum(tl.max(tl.maximum(a, b)), tl.max(c)) - (LEVELS - 2), 0)
    a = ranked(a, floor, first_at, keys_a, None, LEVELS - 1, HAS_FIRST)
    b = ranked(b, floor, first_at, keys_b, None, LEVELS - 1, HAS_FIRST)
    c = ranked(c, floor, first_at, keys_c, real_c, LEVELS - 1, HAS_FIRST)
    one_a, one_c = tl.full([HALF], 1, tl.int32), tl.full([TAIL], 1, tl.int32)
    pairs = (a | (b << 16)) | -0x7FFF8000  # a level needs 11 bits of 16: two are compared at once
    # The largest level whose keys still fill the shortlist lies in [bound, end), at most `size` levels.
    bound, end, above = tl.full([], 0, tl.int32), tl.full([], LEVELS, tl.int32), tl.full([], 0, tl.int32)
    size = end
    while size > 1:
        low, high = thirds(bound, end)
        at_low, at_high = _number(pairs, low, high)
        low_a, low_b = counts(at_low, 16)
        high_a, high_b = counts(at_high, 16)
        low_c, high_c = counts(tl.sum(over_two(c, one_c, low, high, 16)), 16)
        bound, end, above = narrowed(low_a + low_b + low_c, high_a + high_b + high_c, many, bound, end, above, low, high)
        size = (size + 2) // 3
    a, b = pairs & 0x7FFF, (pairs >> 16) & 0x7FFF  # so that no thread keeps them twice meanwhile
    left = many - above
    at, over = _number(pairs, bound, bound + 1)
    at_a, at_b = counts(at, 16)
    above_a, above_b = counts(over, 16)
    equal_a, equal_b = at_a - above_a, at_b - above_b
    kept_a, kept_b, kept_c = (a << 16) | keys_a, (b << 16) | keys_b, (c << 16) | keys_c
    emit(short_at, short_at, kept_a, a, one_a, bound, left, 0, 0, 1, SHIFT, 1)
    emit(short_at, short_at, kept_b, b, one_a, bound, left, above_a, equal_a, 1, SHIFT, 1)
    emit(short_at, short_at, kept_c, c, one_c, bound, left, above_a + above_b, equal_a + equal_b, 1, SHIFT, 1)
    tl.debug_barrier()  # other threads wrote what this one reads
    offs = tl.arange(0, SHORT)
    real = offs < tl.multiple_of(many, 16)
    kept = tl.load(short_at + offs, mask=real, other=-1)  # level -1 where there is no key
    keys, level = counts(kept, 16)
    weight_0 = weights(weight_ptr_0, keys, real, CHILDREN_0 == 1)
    weight_1 = weights(weight_ptr_1, keys, real, CHILDREN_1 == 1)
    weight_2 = weights(weight_ptr_2, keys, real, CHILDREN_2 <= 1)
    # No list has more places than the shortlist, and a key fills one or more: no bound lies below the shortlist's.
    bound_0, end_0, above_0 = bound, tl.full([], LEVELS, tl.int32), tl.full([], 0, tl.int32)
    bound_1, end_1, above_1, bound_2, end_2, above_2 = bound, end_0, above_0, bound, end_0, above_0
    size = end_0 - bound
    while size > 1:
        low_0, high_0 = thirds(bound_0, end_0)
        low_1, high_1 = thirds(bound_1, end_1)
        low_2, high_2 = thirds(bound_2, end_2)
        both_0, both_1, both_2 = _apart(tl.sum(_side_by_side(
            over_two(level, weight_0, low_0, high_0, SHIFT), over_two(level, weight_1, low_1, high_1, SHIFT),
            over_two(level, weight_2, low_2, high_2, SHIFT), THREE,
        ), 0), THREE)  # fmt: skip
        bound_0, end_0, above_0 = narrowed(*counts(both_0, SHIFT), width_0, bound_0, end_0, above_0, low_0, high_0)
        bound_1, end_1, above_1 = narrowed(*counts(both_1, SHIFT), width_1, bound_1, end_1, above_1, low_1, high_1)
        bound_2, end_2, above_2 = narrowed(*counts(both_2, SHIFT), width_2, bound_2, end_2, above_2, low_2, high_2)
        size = (size + 2) // 3
    seen_0 = over_two(level, weight_0, bound_0, bound_0 + 1, SHIFT)
    seen_1 = over_two(level, weight_1, bound_1, bound_1 + 1, SHIFT)
    seen_2 = over_two(level, weight_2, bound_2, bound_2 + 1, SHIFT)
    up_to_0, up_to_1, up_to_2 = _apart(tl.cumsum(_side_by_side(seen_0, seen_1, seen_2, THREE), 0), THREE)
    put(keys_ptr_0 + list_at_0 + row * row_step_0, table_ptr_0, keys, level, weight_0, up_to_0 - seen_0, bound_0,
         width_0 - above_0, 0, 0, CHILDREN_0, SHIFT, CHILDREN_0)  # fmt: skip
    put(keys_ptr_1 + list_at_1 + row * row_step_1, table_ptr_1, keys, level, weight_1, up_to_1 - seen_1, bound_1,
         width_1 - above_1, 0, 0, CHILDREN_1, SHIFT, CHILDREN_1)  # fmt: skip
    if THREE:
        put(keys_ptr_2 + list_at_2 + row * row_step_2, table_ptr_2, keys, level, weight_2, up_to_2 - seen_2, bound_2,
             width_2 - above_2, 0, 0, CHILDREN_2, SHIFT, CHILDREN_2)  # fmt: skip


def _merges(variant: Cs4a, decision: AttentionProblem, fill: Fill, mass: torch.dtype, many: int) -> bool:
    """True if one launch fills all these lists; many: keys of their shortlist, 0: none."""
    tiles = {lists.rows for lists, *_ in fill}  # of one ranking: row r takes the mass of tile r
    return (
        many > 0 and mass == torch.bfloat16 and variant.keys == "place" and len(fill) <= MOST_LISTS and len(tiles) == 1
        and 32 <= decision.num_keys <= MOST_KEYS  # both halves are full
        and all((made.head_step, made.batch_step) == (made.rows * made.row_step, len(made.heads) * made.rows * made.row_step)
                for made, *_ in fill)
    )  # fmt: skip


def _many(variant: Cs4a, decision: AttentionProblem, fill: Fill) -> int:
    return shortlisted(variant, decision, [problem.scale_index for *_, problem in fill])


def merged_build(variant: Cs4a, decision: AttentionProblem, fill: Fill, many: int) -> Build:
    """What `fill_lists` launches where it fills all lists at once. variant: in its form at the decision scale."""
    n = decision.num_keys
    names = [name for name in merged_select_kernel.arg_names if not name.isupper()]
    types = {name: "*i32" if "_ptr" in name else "i32" for name in names} | {"mass_ptr": "*bf16", "first_ptr": "*i8"}
    most = [child_table(p, decision.scale_index, expands(made.variant, p), "cpu")[2] for made, _, p in fill]
    half = 1 << (n.bit_length() - 2)
    constants = {
        "HAS_FIRST": first_keys(decision, variant, "cpu") is not None,
        "SHIFT": 16 if all(p.num_keys < 1 << 15 for *_, p in fill) else 32,
        **{f"CHILDREN_{i}": most[i] if i < len(most) else 0 for i in range(MOST_LISTS)},
        "HALF": half, "TAIL": max(16, 1 << max(n - 2 * half, 0).bit_length()), "SHORT": 1 << (many - 1).bit_length(),
    }  # fmt: skip
    options = {"num_warps": min(16, max(4, half // 512)), "num_stages": 1, "maxnreg": 96}  # 16 keys of a half a thread
    return Build.of(merged_select_kernel, types, constants, options, True)


def record_builds(variant: Cs4a, decision: AttentionProblem, fill: Fill, mass: torch.dtype) -> list[Build]:
    """Every binary that `fill_lists` launches."""
    many = _many(variant, decision, fill)
    if _merges(variant, decision, fill, mass, many):
        return [merged_build(variant, decision, fill, many)]
    found = [select_build(variant, decision, mass)] if many else []
    return found + [select_build(made.variant, problem, mass, many) for made, _, problem in fill]


def fill_lists(mass: Tensor, variant: Cs4a, decision: AttentionProblem, heads: tuple[int, ...], fill: Fill) -> None:
    """Fills all lists that one ranking is for, from mass [B, h, T, Nk or more, a multiple of 16] of the decision scale.

    variant: in its form at the decision scale. fill: lists with the key buffer they lie in and the problem that reads them.
    """
    many = _many(variant, decision, fill)
    if not _merges(variant, decision, fill, mass.dtype, many):
        short = shortlist(mass, variant, decision, heads, many) if many else None
        for made, keys, problem in fill:
            select(mass, keys, made, problem, decision, short)
        return
    device, build = str(mass.device), merged_build(variant, decision, fill, many)
    short = torch.empty(*mass.shape[:3], many, dtype=torch.int32, device=mass.device)
    first = first_keys(decision, variant, device)
    pointers: list[object] = []
    places: list[int] = []
    for made, keys, problem in [*fill, *[fill[-1]] * (MOST_LISTS - len(fill))]:  # a list there is not is switched off
        table, weight, _ = child_table(problem, decision.scale_index, expands(made.variant, problem), device)
        pointers += pointer(keys), pointer(table), pointer(weight)
        places += made.at, made.row_step, made.width
    launcher(build, mass.device)(
        (mass.shape[2], mass.shape[0] * mass.shape[1], 1),
        pointer(mass), pointer(mass if first is None else first), pointer(short), *pointers, *places,
        decision.num_keys, mass.shape[3], many,
    )  # fmt: skip
