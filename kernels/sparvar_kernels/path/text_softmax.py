"""The softmax between two products that a row's text is folded into: few places, of another number in each row."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_contiguous, why_not_like

MOST_ROOM = 1024


def text_softmax(
    scores: Tensor, starts: Tensor, softmax_scale: float, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, L, H, T] of out_dtype: the softmax of softmax_scale * (scores + bias) over the first n places of a row, 0 behind.

    scores    [B, L, H, T] fp32, contiguous, T <= 1024; what it holds from place n on is not looked at.
    starts    [B + 1] int32 on the same device, ascending; row b has n = starts[b + 1] - starts[b] <= T places. Without any,
              its weights are all 0.
    bias      [B, H, T] fp32, contiguous, or None.

    The lengths are read on the device: one captured graph serves every prompt that fits. Arithmetic is fp32, rounded once.
    Raises ValueError, in one line, for anything else than the above.
    """
    device = scores.device
    check_plain({"scores": scores, "starts": starts, "bias": bias}, device)
    forms = form(scores), form(starts), form(bias)
    reason = why_not_text_softmax(*forms, out_dtype)
    if reason:
        raise ValueError(reason)
    out = torch.empty_like(scores, dtype=out_dtype)
    if out.numel() == 0:
        return out
    if not by_triton(device):
        return _whole(scores, starts, softmax_scale, bias, out)
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.text_softmax import LOG2E, text_softmax_launch

    run, grid, many = text_softmax_launch(*forms, out_dtype, device)
    pointers = (pointer(scores), pointer(scores if bias is None else bias), pointer(starts), pointer(out))
    on_device(device, run, grid, *pointers, many, softmax_scale * LOG2E)
    return out


@lru_cache(maxsize=4096)
def why_not_text_softmax(scores: Form, starts: Form, bias: Form, out_dtype: torch.dtype) -> str | None:
    """Why tensors of these forms have no softmax here, or None."""
    assert scores is not None and starts is not None
    if len(scores[0]) != 4 or scores[0][3] > MOST_ROOM:
        return f"scores: got {tuple(scores[0])}, want [B, L, H, T] with T up to {MOST_ROOM}"
    batch, _, heads, room = scores[0]
    if out_dtype not in FLOATS:
        return f"out_dtype: got {out_dtype}, want {' or '.join(map(str, FLOATS))}"
    for name, t, dtype, shape in (
        ("scores", scores, torch.float32, tuple(scores[0])), ("starts", starts, torch.int32, (batch + 1,)),
        ("bias", bias, torch.float32, (batch, heads, room)),
    ):  # fmt: skip
        reason = why_not_like(name, t, (dtype,), shape) or why_not_contiguous(name, t)
        if reason:
            return reason
    return None


def _whole(scores: Tensor, starts: Tensor, softmax_scale: float, bias: Tensor | None, out: Tensor) -> Tensor:
    """The same on a CPU."""
    behind = (torch.arange(scores.shape[3]) >= starts.diff()[:, None])[:, None, None]  # [B, 1, 1, T]
    logits = (scores if bias is None else scores + bias[:, None]) * softmax_scale
    return out.copy_(logits.masked_fill(behind, float("-inf")).softmax(-1).masked_fill_(behind, 0.0))
