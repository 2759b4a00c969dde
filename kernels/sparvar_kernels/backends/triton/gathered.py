"""Gathered attention in Triton: programs of one table, each a block of query rows against one list of key rows.

The table (see work.py) mixes heads of any variant in one launch. Rows of K and V are fetched by an int32 list, so a list
may hold any keys in any order. Correct on any NVIDIA GPU Triton supports, and in Triton's interpreter.

Softmax: online (running maximum), or, where the problem bounds its logits, plain exponentials and one division at the
end. reports/kernel-notes.md says what else was tried and lost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparvar_kernels.backends.triton.table import Column

# Columns of the launch table, as kernels take them
HEAD = tl.constexpr(int(Column.HEAD))
ORIGIN = tl.constexpr(int(Column.ORIGIN))
WIDTH = tl.constexpr(int(Column.WIDTH))
FIRST_ROW = tl.constexpr(int(Column.FIRST_ROW))
END_ROW = tl.constexpr(int(Column.END_ROW))
LIST_AT = tl.constexpr(int(Column.LIST_AT))
LIST_STEP = tl.constexpr(int(Column.LIST_STEP))
COUNT = tl.constexpr(int(Column.COUNT))
SLOT = tl.constexpr(int(Column.SLOT))
OUT = tl.constexpr(int(Column.OUT))
LOG2E = 1.4426950408889634
FP32_DOT = tl.constexpr("tf32x3")  # products of fp32 by tensor cores in three parts, nearly exact; other dtypes ignore it


def block_d(head_dim: int) -> int:
    """The power of two that a kernel's tiles are wide."""
    return max(16, 1 << (head_dim - 1).bit_length())


@triton.jit
def _load_rows(base, listed, stride, offs_d, in_d, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = base + listed[:, None] * stride + offs_d[None, :]
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=in_d[None, :], other=0.0)


@triton.jit
def gathered_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, table_ptr, extra_ptr, bias_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_eb, stride_eh, stride_en, stride_bb, stride_bh,
    grid_width, source_height, source_width, step_y, step_x, scale_log2e,
    FIELDS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """EPILOGUE 0: out = attention. 1: plus extra (a residual on a coarser grid), enlarged. 2: extra minus attention."""
    WHOLE: tl.constexpr = HEAD_DIM == BLOCK_D
    BLOCK_C: tl.constexpr = 16  # cells a step; 32 take so many registers that fewer programs fit
    entry = table_ptr + tl.program_id(0) * FIELDS
    i_b = tl.program_id(1).to(tl.int64)
    i_head = tl.load(entry + HEAD).to(tl.int64)
    origin, tile_width = tl.load(entry + ORIGIN), tl.load(entry + WIDTH)
    first_row, end_row = tl.load(entry + FIRST_ROW), tl.load(entry + END_ROW)
    list_at, list_step, count = tl.load(entry + LIST_AT), tl.load(entry + LIST_STEP), tl.load(entry + COUNT)
    slot, i_out = tl.load(entry + SLOT), tl.load(entry + OUT).to(tl.int64)

    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < HEAD_DIM
    in_m = offs_m < end_row
    rows = tl.where(in_m, origin + offs_m // tile_width * grid_width + offs_m % tile_width, origin)  # [BLOCK_M]
    q = _load_rows(q_ptr + i_b * stride_qb + i_head * stride_qh, rows, stride_qn, offs_d, in_d, WHOLE)
    k_base = k_ptr + i_b * stride_kb + i_head * stride_kh
    v_base = v_ptr + i_b * stride_vb + i_head * stride_vh
    bias_base = bias_ptr + i_b * stride_bb + i_head * stride_bh
    list_base = keys_ptr + i_b * list_step + list_at

    top = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a program without keys must come out as 0, not NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    none = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, count, BLOCK_N):
        listed = tl.load(list_base + begin + offs_n)
        keys = tl.trans(_load_rows(k_base, listed, stride_kn, offs_d, in_d, WHOLE))
        s = tl.dot(q, keys, none, input_precision=FP32_DOT)
        if HAS_BIAS:
            s += (tl.load(bias_base + listed) / scale_log2e)[None, :]
        if MASKED:
            s += tl.where(begin + offs_n < count, 0.0, float("-inf"))[None, :]
        if BOUNDED:
            p = tl.exp2(s * scale_log2e)
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale_log2e)
            p = tl.exp2(s * scale_log2e - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total *= shrink
            acc *= shrink[:, None]
            top = new_top
        total += tl.sum(p, 1)
        v = _load_rows(v_base, listed, stride_vn, offs_d, in_d, WHOLE)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=FP32_DOT)

    acc *= (1 / tl.where(total == 0, 1.0, total))[:, None]
    keep = in_m[:, None] & in_d[None, :]
    if EPILOGUE == 1:
        if slot >= 0:
            # Enlarging is a product with the tent weights of the source cells under these rows: a few more "keys".
            # Four gathered corners a row need no weights but so many registers that half as many programs fit.
            base = extra_ptr + i_b * stride_eb + slot.to(tl.int64) * stride_eh
            y = tl.minimum(tl.maximum((rows // grid_width + 0.5) * step_y - 0.5, 0.0), source_height - 1.0)
            x = tl.minimum(tl.maximum((rows % grid_width + 0.5) * step_x - 0.5, 0.0), source_width - 1.0)
            low_y, low_x = tl.min(y, 0).to(tl.int32), tl.min(x, 0).to(tl.int32)
            high_y = tl.minimum(tl.max(y, 0).to(tl.int32) + 1, source_height - 1)
            columns = tl.minimum(tl.max(x, 0).to(tl.int32) + 1, source_width - 1) - low_x + 1
            cells = (high_y - low_y + 1) * columns
            for begin in tl.range(0, cells, BLOCK_C, num_stages=3):
                cell = begin + tl.arange(0, BLOCK_C)
                cell_y, cell_x = low_y + cell // columns, low_x + cell % columns
                at = tl.minimum(cell_y, source_height - 1) * source_width + cell_x
                near_y = tl.maximum(1 - tl.abs(y[:, None] - cell_y[None, :]), 0.0)
                near_x = tl.maximum(1 - tl.abs(x[:, None] - cell_x[None, :]), 0.0)
                part = _load_rows(base, at, stride_en, offs_d, in_d, WHOLE)
                weight = tl.where(cell[None, :] < cells, near_y * near_x, 0.0)
                acc = tl.dot(weight.to(part.dtype), part, acc, input_precision=FP32_DOT)
    out = acc
    if EPILOGUE == 2:
        extra = extra_ptr + i_b * stride_eb + i_head * stride_eh + rows[:, None] * stride_en + offs_d[None, :]
        out = tl.load(extra, mask=keep, other=0.0).to(tl.float32) - out
    out_at = out_ptr + i_b * stride_ob + i_out * stride_oh + rows[:, None] * stride_on + offs_d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=keep)
