"""Attention from every token to its row's text: few keys, of another number in each row."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like

MOST_HEAD_DIM = 128


def text_attention(q: Tensor, kv: Tensor, starts: Tensor, softmax_scale: float, out: Tensor | None = None) -> Tensor:
    """[B, L, H, D]: row b of q attends to kv[starts[b] : starts[b + 1]]; Infinity's cross-attention.

    q, out    [B, L, H, D] bf16, fp16 or fp32, D contiguous; out may be q itself, and is allocated when None.
    kv        [T, 2, H, D] of the same dtype, D contiguous: keys and values of all rows' texts, one behind the other.
    starts    [B + 1] int32 on the same device, ascending, starts[-1] <= T. A row without text gets zeros.

    The lengths are read on the device: one captured graph serves every prompt whose text fits into kv. Softmax and sums are
    fp32; the weights are rounded to the dtype before they meet the values, as flash-attn's varlen_kvpacked does.
    Raises ValueError, in one line, for anything else than the above.
    """
    device, out = q.device, torch.empty_like(q) if out is None else out
    check_plain({"q": q, "kv": kv, "starts": starts, "out": out}, device)
    forms = form(q), form(kv), form(starts), form(out)
    reason = why_not_text_attention(*forms)
    if reason:
        raise ValueError(reason)
    if q.numel() == 0:
        return out
    if not by_triton(device):
        return _row_by_row(q, kv, starts, softmax_scale, out)
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.text_attention import LOG2E, text_attention_launch

    run, grid, rest = text_attention_launch(*forms, device)
    arguments = (pointer(q), pointer(kv), pointer(starts), pointer(out), *rest, softmax_scale * LOG2E)
    on_device(device, run, grid, *arguments)
    return out


@lru_cache(maxsize=4096)
def why_not_text_attention(q: Form, kv: Form, starts: Form, out: Form) -> str | None:
    """Why tensors of these forms cannot attend, or None."""
    assert q is not None and kv is not None and starts is not None
    if len(q[0]) != 4 or not 1 <= q[0][3] <= MOST_HEAD_DIM:
        return f"q: got {tuple(q[0])}, want [B, L, H, D] with D of 1..{MOST_HEAD_DIM}"
    batch, _, heads, dim = q[0]
    if len(kv[0]) != 4:
        return f"kv: got {tuple(kv[0])}, want [T, 2, {heads}, {dim}]"
    for name, t, dtypes, shape in (
        ("q", q, FLOATS, tuple(q[0])), ("out", out, (q[2],), tuple(q[0])), ("kv", kv, (q[2],), (kv[0][0], 2, heads, dim)),
        ("starts", starts, (torch.int32,), (batch + 1,)),
    ):  # fmt: skip
        reason = why_not_like(name, t, dtypes, shape)
        if reason:
            return reason
    assert out is not None
    if any(n > 1 and s == 0 for n, s in zip(out[0], out[1], strict=True)):
        return f"out: got strides {out[1]}, want memory of its own for every place"
    if max(s for t in (q, kv, out) for s in t[1][1:]) >= 1 << 31:
        return "q, kv, out: a stride of 2**31 elements or more; make them contiguous"
    return None


def _row_by_row(q: Tensor, kv: Tensor, starts: Tensor, softmax_scale: float, out: Tensor) -> Tensor:
    """The same on a CPU."""
    for b, (begin, end) in enumerate(pairwise(starts.tolist())):
        if begin == end:
            out[b] = 0
            continue
        k, v = kv[begin:end].permute(1, 2, 0, 3)  # 2 x [H, T, D]
        out[b] = F.scaled_dot_product_attention(q[b].transpose(0, 1), k, v, scale=softmax_scale).transpose(0, 1)
    return out
