"""Gathered attention for Hopper GPUs: warps that fetch rows and warps that multiply them, in Gluon.

The same table and lists as `gathered_triton`, for head_dim 64 and 128 in half precision. As many programs as fit on the GPU
stay and take table entries in turn. In each, four warps fetch: queries, then keys and values by the list, then the cells of
a residual, all into one ring of shared memory. One or two groups of four warps, each with 64 of a block's query rows,
multiply what the ring holds. So the next entry is fetched while one is finished and written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparvar_kernels.backends.triton.table import Column

_copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # renamed after Triton 3.6
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # likewise
# Columns of the launch table, as kernels take them
HEAD = gl.constexpr(int(Column.HEAD))
ORIGIN = gl.constexpr(int(Column.ORIGIN))
WIDTH = gl.constexpr(int(Column.WIDTH))
FIRST_ROW = gl.constexpr(int(Column.FIRST_ROW))
END_ROW = gl.constexpr(int(Column.END_ROW))
LIST_AT = gl.constexpr(int(Column.LIST_AT))
LIST_STEP = gl.constexpr(int(Column.LIST_STEP))
COUNT = gl.constexpr(int(Column.COUNT))
SLOT = gl.constexpr(int(Column.SLOT))
OUT = gl.constexpr(int(Column.OUT))
LOW_Y = gl.constexpr(int(Column.LOW_Y))
LOW_X = gl.constexpr(int(Column.LOW_X))
HIGH_Y = gl.constexpr(int(Column.HIGH_Y))
HIGH_X = gl.constexpr(int(Column.HIGH_X))
ROWS = gl.constexpr(64)  # query rows of one group of warps
FETCHERS = gl.constexpr(128)  # threads that fetch


@gluon.jit
def _after(slot, phase, SLOTS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The place behind `slot` in the ring, and the phase of its barriers there."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _cells(entry):  # type: ignore[no-untyped-def]
    """(first row, first column, last row, last column) of the residual's grid that bear on the block of a table entry."""
    return gl.load(entry + LOW_Y), gl.load(entry + LOW_X), gl.load(entry + HIGH_Y), gl.load(entry + HIGH_X)


@gluon.jit
def _put(place, ready, pointers, seen, MASKED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Starts copying rows into a place of the ring; rows that are not `seen` become zeros and are not read."""
    if MASKED:
        _copy_rows(place, pointers, mask=seen[:, None])
    else:
        _copy_rows(place, pointers)
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _divide(n, inverse):  # type: ignore[no-untyped-def]
    """n // d for 0 <= n < 2**20, given inverse = 1 / d: n and a half is farther from any multiple of d than rounding errs."""
    return ((n.to(gl.float32) + 0.5) * inverse).to(gl.int32)


@gluon.jit
def _tokens(m, origin, tile_width, grid_width):  # type: ignore[no-untyped-def]
    """Where row m of a tile lies among the queries."""
    y = _divide(m, 1.0 / tile_width)
    return origin + y * (grid_width - tile_width) + m


@gluon.jit
def _place(cell, step, length):  # type: ignore[no-untyped-def]
    """Where the middle of a query's cell lies on the residual's axis, in cells."""
    return gl.minimum(gl.maximum((cell + 0.5) * step - 0.5, 0.0), length - 1.0)


@gluon.constexpr_function
def _cells_of_a_step(block_n, groups):  # type: ignore[no-untyped-def]
    """Cells of a residual that a group multiplies at once: half a place of the ring where that has room for both groups'."""
    return block_n // groups if block_n > ROWS.value else block_n


@gluon.jit
def _own_rows(  # type: ignore[no-untyped-def]
    WHICH: gl.constexpr, GROUPS: gl.constexpr, first_row, end_row, origin, tile_width, grid_width, step, low, high,
):  # fmt: skip
    """The first and last row of the residual's grid that bear on what group WHICH multiplies, of those of the whole block.

    Warps that fetch and warps that multiply must find the same, so nothing here may be rounded in two ways.
    """
    if GROUPS == 1:
        return low, high
    else:
        begin = gl.minimum(first_row + WHICH * ROWS, end_row - 1)
        end = gl.minimum(begin + ROWS - 1, end_row - 1)
        top = _divide(_tokens(begin, origin, tile_width, grid_width), 1.0 / grid_width)
        bottom = _divide(_tokens(end, origin, tile_width, grid_width), 1.0 / grid_width)
        first = gl.maximum(gl.fma(top + 0.5, step, -0.5), 0.0).to(gl.int32)
        last = gl.maximum(gl.fma(bottom + 0.5, step, -0.5), 0.0).to(gl.int32) + 1
        return gl.minimum(gl.maximum(first, low), high), gl.maximum(gl.minimum(last, high), low)


@gluon.jit
def _tent(  # type: ignore[no-untyped-def]
    y, x, begin_y, begin_x, CELLS: gl.constexpr, ACROSS: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """[ROWS, CELLS]: what each cell of a step weighs at rows that lie at (y, x) on the residual's grid."""
    cell = gl.arange(0, CELLS, gl.SliceLayout(0, LAYOUT))
    near_y = gl.maximum(1 - gl.abs(y - begin_y - (cell // ACROSS)[None, :]), 0.0)
    near_x = gl.maximum(1 - gl.abs(x - begin_x - (cell % ACROSS)[None, :]), 0.0)
    return near_y * near_x


@gluon.jit
def _add_cells(  # type: ignore[no-untyped-def]
    acc, tent, ring, ready, free, slot, phase,
    WHICH: gl.constexpr, CELLS: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """acc + tent @ the group's own cells of a step, and the place in the ring behind that step."""
    for part in gl.static_range(GROUPS * CELLS // BLOCK_N):
        mbarrier.wait(ready.index(slot), phase)
        if BLOCK_N == GROUPS * CELLS or part == WHICH:
            fence_async_shared()
            begin: gl.constexpr = WHICH * CELLS % BLOCK_N
            acc = warpgroup_mma(tent, ring.index(slot).slice(begin, CELLS), acc)
            _barrier()
        mbarrier.arrive(free.index(slot))
        slot, phase = _after(slot, phase, SLOTS)
    return acc, slot, phase


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    reading, shared, FIELDS: gl.constexpr, EPILOGUE: gl.constexpr, MASKED: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """What the warps that fetch do."""
    (q_ptr, k_ptr, v_ptr, keys_ptr, table_ptr, extra_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
     stride_vb, stride_vh, stride_vn, stride_eb, stride_eh, stride_en, grid_width, source_width, step_y, num_entries,
     num_items) = reading  # fmt: skip
    queries, ring, q_ready, q_free, ready, free = shared
    CELLS: gl.constexpr = _cells_of_a_step(BLOCK_N, GROUPS)
    ACROSS: gl.constexpr = 8 if EPILOGUE == 3 else 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    offs_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    slot, phase, q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0), gl.to_tensor(1)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        entry = table_ptr + item % num_entries * FIELDS
        i_b = (item // num_entries).to(gl.int64)
        i_head = gl.load(entry + HEAD).to(gl.int64)
        origin, tile_width = gl.load(entry + ORIGIN), gl.load(entry + WIDTH)
        first_row, end_row = gl.load(entry + FIRST_ROW), gl.load(entry + END_ROW)
        list_at, list_step, count = gl.load(entry + LIST_AT), gl.load(entry + LIST_STEP), gl.load(entry + COUNT)
        list_base = keys_ptr + i_b * list_step + list_at
        listed = gl.load(list_base + offs_n)
        q_base = q_ptr + i_b * stride_qb + i_head * stride_qh
        k_base = k_ptr + i_b * stride_kb + i_head * stride_kh
        v_base = v_ptr + i_b * stride_vb + i_head * stride_vh

        mbarrier.wait(q_free.index(q_slot), q_phase)
        for group in gl.static_range(GROUPS):
            m = first_row + group * ROWS + offs_m
            rows = gl.where(m < end_row, _tokens(m, origin, tile_width, grid_width), origin)
            _copy_rows(queries.index(q_slot * GROUPS + group), q_base + rows[:, None] * stride_qn + offs_d)
        async_copy.mbarrier_arrive(q_ready.index(q_slot), increment_count=False)
        q_slot, q_phase = _after(q_slot, q_phase, 2)

        # K of the first block, then K of each with V of the one before, as they are multiplied; lists are read a block ahead
        blocks = gl.maximum((count + BLOCK_N - 1) // BLOCK_N, 1)
        upcoming = gl.load(list_base + gl.minimum(1, blocks - 1) * BLOCK_N + offs_n)
        mbarrier.wait(free.index(slot), phase)
        _put(ring.index(slot), ready.index(slot), k_base + listed[:, None] * stride_kn + offs_d, offs_n < count, MASKED)
        slot, phase = _after(slot, phase, SLOTS)
        for block in range(1, blocks):
            before = listed
            listed = upcoming
            upcoming = gl.load(list_base + gl.minimum(block + 1, blocks - 1) * BLOCK_N + offs_n)
            seen = offs_n < count - block * BLOCK_N
            mbarrier.wait(free.index(slot), phase)
            _put(ring.index(slot), ready.index(slot), k_base + listed[:, None] * stride_kn + offs_d, seen, MASKED)
            slot, phase = _after(slot, phase, SLOTS)
            mbarrier.wait(free.index(slot), phase)
            _put(ring.index(slot), ready.index(slot), v_base + before[:, None] * stride_vn + offs_d, seen, False)
            slot, phase = _after(slot, phase, SLOTS)
        seen = offs_n < count - (blocks - 1) * BLOCK_N
        mbarrier.wait(free.index(slot), phase)
        _put(ring.index(slot), ready.index(slot), v_base + listed[:, None] * stride_vn + offs_d, seen, MASKED)
        slot, phase = _after(slot, phase, SLOTS)

        if EPILOGUE % 2 == 1:
            i_slot = gl.load(entry + SLOT)
            if i_slot >= 0:
                low_y, low_x, high_y, high_x = _cells(entry)
                e_base = extra_ptr + i_b * stride_eb + i_slot.to(gl.int64) * stride_eh
                of = first_row, end_row, origin, tile_width, grid_width, step_y, low_y, high_y
                low, high = _own_rows(0, GROUPS, *of)
                other_low, other_high = _own_rows(GROUPS - 1, GROUPS, *of)
                cell = offs_n % CELLS
                lines = gl.maximum(high - low, other_high - other_low) // (CELLS // ACROSS) + 1
                for down in range(0, lines * (CELLS // ACROSS), CELLS // ACROSS):
                    for begin_x in range(low_x, high_x + 1, ACROSS):
                        for part in gl.static_range(GROUPS * CELLS // BLOCK_N):  # each group's own cells in turn
                            if BLOCK_N > CELLS:
                                begin_y = gl.where(offs_n < CELLS, low, other_low) + down
                                end_y = gl.where(offs_n < CELLS, high, other_high)
                            else:
                                begin_y = (low if part == 0 else other_low) + down
                                end_y = high if part == 0 else other_high
                            y, x = begin_y + cell // ACROSS, begin_x + cell % ACROSS
                            pointers = e_base + (y * source_width + x)[:, None] * stride_en + offs_d
                            seen = (y <= end_y) & (x <= high_x)
                            mbarrier.wait(free.index(slot), phase)
                            _put(ring.index(slot), ready.index(slot), pointers, seen, True)
                            slot, phase = _after(slot, phase, SLOTS)
    # No instruction: it only ends the function with a side effect. MLIR asks thousands of times whether a partition is dead and
    # reads it from the end for that; where it ended with loops, this was half of the time of compiling (6.1 s, now 3.6).
    gl.inline_asm_elementwise("", "=r,0", [slot], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _softmax(s, top, total, scale_log2e, BOUNDED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Unnormalised probabilities, the running maximum (to the base 2) and sum, and what earlier sums shrink by."""
    if BOUNDED:
        p = gl.exp2(s * scale_log2e)
        shrink = top
        total += gl.sum(p, 1)
    else:
        new_top = gl.maximum(top, gl.max(s, 1) * scale_log2e)
        p = gl.exp2(s * scale_log2e - new_top[:, None])
        shrink = gl.exp2(top - new_top)
        total = total * shrink + gl.sum(p, 1)
        top = new_top
    return p, top, total, shrink


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    writing, shared, WHICH: gl.constexpr, FIELDS: gl.constexpr, EPILOGUE: gl.constexpr, MASKED: gl.constexpr,
    BOUNDED: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """What a group of warps that multiply does, number WHICH of GROUPS."""
    (out_ptr, table_ptr, extra_ptr, stride_ob, stride_oh, stride_on, stride_eb, stride_eh, stride_en, grid_width,
     source_height, source_width, step_y, step_x, scale_log2e, num_entries, num_items) = writing  # fmt: skip
    queries, ring, q_ready, q_free, ready, free = shared
    CELLS: gl.constexpr = _cells_of_a_step(BLOCK_N, GROUPS)
    ACROSS: gl.constexpr = 8 if EPILOGUE == 3 else 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    e_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CELLS, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    kind: gl.constexpr = queries.dtype
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    slot, phase, q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        # Not read a turn ahead: Triton 3.6 takes what a loop carries for dead where only another loop's length depends on it
        entry = table_ptr + item % num_entries * FIELDS
        i_b = (item // num_entries).to(gl.int64)
        origin, tile_width = gl.load(entry + ORIGIN), gl.load(entry + WIDTH)
        first_row, end_row, count = gl.load(entry + FIRST_ROW), gl.load(entry + END_ROW), gl.load(entry + COUNT)
        i_out = gl.load(entry + OUT).to(gl.int64)
        blocks = gl.maximum((count + BLOCK_N - 1) // BLOCK_N, 1)
        q = queries.index(q_slot * GROUPS + WHICH)
        top = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, s_layout))  # finite: no keys must come out as 0
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)

        mbarrier.wait(q_ready.index(q_slot), q_phase)
        mbarrier.wait(ready.index(slot), phase)
        fence_async_shared()  # copied rows are ordinary writes, the tensor cores read in their own way
        s = warpgroup_mma(q, ring.index(slot).permute((1, 0)), none, use_acc=False)
        _barrier()
        mbarrier.arrive(free.index(slot))
        slot, phase = _after(slot, phase, SLOTS)
        if MASKED:
            s = gl.where((offs_n < count)[None, :], s, float("-inf"))
        p, top, total, shrink = _softmax(s, top, total, scale_log2e, BOUNDED)
        weights = gl.convert_layout(p.to(kind), p_layout)
        for block in range(1, blocks):
            # the tensor cores go on to these keys and the last values while the softmax of these keys is worked out
            v_slot, v_phase = _after(slot, phase, SLOTS)
            mbarrier.wait(ready.index(slot), phase)
            mbarrier.wait(ready.index(v_slot), v_phase)
            fence_async_shared()
            scores = warpgroup_mma(q, ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            sums = warpgroup_mma(weights, ring.index(v_slot), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[scores])
            if MASKED:
                if block == blocks - 1:
                    s = gl.where((offs_n < count - block * BLOCK_N)[None, :], s, float("-inf"))
            p, top, total, shrink = _softmax(s, top, total, scale_log2e, BOUNDED)
            acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
            _barrier()
            mbarrier.arrive(free.index(slot))
            mbarrier.arrive(free.index(v_slot))
            if not BOUNDED:
                acc *= gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
            weights = gl.convert_layout(p.to(kind), p_layout)
            slot, phase = _after(v_slot, v_phase, SLOTS)
        mbarrier.wait(ready.index(slot), phase)
        fence_async_shared()
        sums = warpgroup_mma(weights, ring.index(slot), acc, is_async=True)
        # Negated here where attention is taken away: given a negation of what the tensor cores made, the assembler of CUDA 12.8
        # drops their work (a test looks for it in the machine code).
        sign: gl.constexpr = -1.0 if EPILOGUE == 2 else 1.0
        share = gl.convert_layout(sign / gl.where(total == 0, 1.0, total), gl.SliceLayout(1, o_layout))[:, None]
        if EPILOGUE % 2 == 1:
            # Read here and not above: what lives through the loop takes its registers. The first step's weights are worked out
            # beside the last product.
            i_slot = gl.load(entry + SLOT)
            low_y, low_x, high_y, high_x = _cells(entry)
            m = first_row + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, e_layout))
            rows = gl.where(m < end_row, _tokens(m, origin, tile_width, grid_width), origin)
            row = _divide(rows, 1.0 / grid_width)
            y = _place(row, step_y, source_height)[:, None]
            x = _place(rows - row * grid_width, step_x, source_width)[:, None]
            of = first_row, end_row, origin, tile_width, grid_width, step_y, low_y, high_y
            low, high = _own_rows(0, GROUPS, *of)
            other_low, other_high = _own_rows(GROUPS - 1, GROUPS, *of)
            begin_y, begin_x = low if WHICH == 0 else other_low, low_x
            tent = gl.convert_layout(_tent(y, x, begin_y, begin_x, CELLS, ACROSS, e_layout).to(kind), p_layout)
        acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
        _barrier()
        mbarrier.arrive(free.index(slot))
        slot, phase = _after(slot, phase, SLOTS)

        acc *= share
        if EPILOGUE % 2 == 1:
            if i_slot >= 0:
                # Enlarging is a product with the tent weights of the cells under these rows: a few more "keys"
                acc, slot, phase = _add_cells(acc, tent, ring, ready, free, slot, phase, WHICH, CELLS, BLOCK_N, SLOTS, GROUPS)
                lines = gl.maximum(high - low, other_high - other_low) // (CELLS // ACROSS) + 1
                for _ in range(1, lines * ((high_x - low_x) // ACROSS + 1)):
                    ended = begin_x + ACROSS > high_x
                    begin_y = gl.where(ended, begin_y + CELLS // ACROSS, begin_y)
                    begin_x = gl.where(ended, low_x, begin_x + ACROSS)
                    tent = gl.convert_layout(_tent(y, x, begin_y, begin_x, CELLS, ACROSS, e_layout).to(kind), p_layout)
                    acc, slot, phase = _add_cells(acc, tent, ring, ready, free, slot, phase, WHICH, CELLS, BLOCK_N, SLOTS, GROUPS)
        if EPILOGUE == 2:
            i_head = gl.load(entry + HEAD).to(gl.int64)
            m = first_row + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
            rows = gl.where(m < end_row, _tokens(m, origin, tile_width, grid_width), origin)
            offs = rows[:, None] * stride_en + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))[None, :]
            acc += gl.load(extra_ptr + i_b * stride_eb + i_head * stride_eh + offs).to(gl.float32)

        # through the queries' own place, so that rows are written whole
        q.store(acc.to(kind))
        written = q.load(out_layout)
        m = first_row + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
        rows = _tokens(m, origin, tile_width, grid_width)
        offs = rows[:, None] * stride_on + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))[None, :]
        gl.store(out_ptr + i_b * stride_ob + i_out * stride_oh + offs, written, mask=(m < end_row)[:, None])
        _barrier()
        mbarrier.arrive(q_free.index(q_slot))
        q_slot, q_phase = _after(q_slot, q_phase, 2)


@gluon.jit
def fetched_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, table_ptr, extra_ptr, bias_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_eb, stride_eh, stride_en, stride_bb, stride_bh,
    grid_width, source_height, source_width, step_y, step_x, scale_log2e, num_entries, num_items,
    FIELDS: gl.constexpr, EPILOGUE: gl.constexpr, MASKED: gl.constexpr, BOUNDED: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The arguments of `gathered_kernel`, and its EPILOGUE; a bias is none of its jobs, bias_ptr is never read.

    num_items: the table's num_entries times images. GROUPS: of four warps that multiply, each 64 rows of a block.
    EPILOGUE 3 adds a residual as 1 does, 8 columns of its cells in a step instead of 16: a power of two, so that most of their
    weights coincide. A step has CELLS cells under each group's rows.
    Every pointer and stride must be a multiple of 16. Launched with four warps; the others are its partitions'.
    """
    kind: gl.constexpr = q_ptr.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flags: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(kind, [2 * GROUPS, ROWS, HEAD_DIM], rows)
    ring = gl.allocate_shared_memory(kind, [SLOTS, BLOCK_N, HEAD_DIM], rows)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], flags)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], flags)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=FETCHERS)
        mbarrier.init(q_free.index(i), count=GROUPS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=FETCHERS)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    shared = (queries, ring, q_ready, q_free, ready, free)
    writing = (out_ptr, table_ptr, extra_ptr, stride_ob, stride_oh, stride_on, stride_eb, stride_eh, stride_en, grid_width,
               source_height, source_width, step_y, step_x, scale_log2e, num_entries, num_items)  # fmt: skip
    reading = (q_ptr, k_ptr, v_ptr, keys_ptr, table_ptr, extra_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh,
               stride_kn, stride_vb, stride_vh, stride_vn, stride_eb, stride_eh, stride_en, grid_width, source_width,
               step_y, num_entries, num_items)  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (writing, shared, gl.constexpr(0), FIELDS, EPILOGUE, MASKED, BOUNDED, HEAD_DIM, BLOCK_N,
                             SLOTS, GROUPS)),
                (_multiply, (writing, shared, gl.constexpr(1), FIELDS, EPILOGUE, MASKED, BOUNDED, HEAD_DIM, BLOCK_N,
                             SLOTS, GROUPS)),
                (_fetch, (reading, shared, FIELDS, EPILOGUE, MASKED, HEAD_DIM, BLOCK_N, SLOTS, GROUPS)),
            ],
            [4, 4],
            [OTHER_REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (writing, shared, gl.constexpr(0), FIELDS, EPILOGUE, MASKED, BOUNDED, HEAD_DIM, BLOCK_N,
                             SLOTS, GROUPS)),
                (_fetch, (reading, shared, FIELDS, EPILOGUE, MASKED, HEAD_DIM, BLOCK_N, SLOTS, GROUPS)),
            ],
            [4],
            [FETCH_REGISTERS],
        )  # fmt: skip
