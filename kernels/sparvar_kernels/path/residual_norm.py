"""What is done to the residual stream between two products: add a part's output, and normalise for the next one."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like

Norm = Literal["layer", "rms", "none"]
MOST_CHANNELS = 1 << 14


def residual_norm(
    x: Tensor, update: Tensor | None = None, gate: Tensor | None = None, *, norm: Norm = "layer", scale: Tensor | None = None,
    shift: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, eps: float,
    out_dtype: torch.dtype, add_one: bool = True, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x += gate * update, in place; then norm(x), affine, modulated: [B, L, C] of `out_dtype` in new memory.

    x         [B, L, C] fp32, bf16 or fp16, C contiguous: the residual stream. Changed in place where update is given, and
              rounded to its dtype before the norm sees it, as the public models do (HART's stream is fp16).
    update    [B, L, C] of any of these dtypes, C contiguous: the output of attention or of the feed-forward part.
    gate      [C] or [B, C] of any of these dtypes, C contiguous: its factor; None is 1.
    norm      "layer": (x - mean) / sqrt(variance + eps). "rms": x / sqrt(mean of squares + eps). Both over C.
              "none": only adds, and returns x itself; takes none of the operands below.
    weight, bias  [C]: y * weight + bias, the affine part of a norm that has one.
    scale, shift  [C] or [B, C], C contiguous: then y * (1 + scale) + shift, as adaLN does; y * scale + shift if not add_one.

    offset    [C] or [B, C], C contiguous: x + offset is normalised in the place of x, which keeps its numbers.

    Statistics and all arithmetic are fp32; the output is rounded once. On a GPU this is one kernel on the device of x
    that never waits, so it can be captured in a CUDA graph.
    Raises ValueError, in one line, for anything else than the above.
    """
    device = x.device
    tensors = {"x": x, "update": update, "gate": gate, "weight": weight, "bias": bias, "scale": scale, "shift": shift}
    tensors["offset"] = offset
    check_plain(tensors, device)
    forms = tuple(form(t) for t in tensors.values())
    reason = why_not_residual_norm(*forms, norm, out_dtype)
    if reason:
        raise ValueError(reason)
    out = x if norm == "none" else torch.empty(x.shape, dtype=out_dtype, device=device)
    if x.numel() == 0 or (norm == "none" and update is None):
        return out
    if not by_triton(device):
        return _residual_norm(x, update, gate, norm, scale, shift, weight, bias, offset, eps, out, add_one)
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.residual_norm import residual_norm_launch

    run, grid, rest = residual_norm_launch(*forms, out.dtype, norm, add_one, device)
    given = (x if t is None else t for t in tensors.values())
    arguments = (*map(pointer, given), pointer(out), *rest, eps)
    on_device(device, run, grid, *arguments)
    return out


@lru_cache(maxsize=4096)
def why_not_residual_norm(
    x: Form, update: Form, gate: Form, weight: Form, bias: Form, scale: Form, shift: Form, offset: Form, norm: str,
    out_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why tensors of these forms cannot be added and normalised, or None."""
    assert x is not None
    if len(x[0]) != 3 or not 1 <= x[0][2] <= MOST_CHANNELS:
        return f"x: got {tuple(x[0])}, want [B, L, C] with C of 1..{MOST_CHANNELS}"
    if norm not in ("layer", "rms", "none"):
        return f"norm: got {norm!r}, want layer, rms or none"
    if out_dtype not in FLOATS:
        return f"out_dtype: got {out_dtype}, want one of {', '.join(map(str, FLOATS))}"
    batch, length, channels = x[0]
    vectors = [(channels,), (batch, channels)]
    wants = (
        ("x", x, [(batch, length, channels)]), ("update", update, [(batch, length, channels)]), ("gate", gate, vectors),
        ("weight", weight, vectors[:1]), ("bias", bias, vectors[:1]), ("scale", scale, vectors), ("shift", shift, vectors),
        ("offset", offset, vectors),
    )  # fmt: skip
    for name, t, shapes in wants:
        reason = why_not_like(name, t, FLOATS, *shapes)
        if reason:
            return reason
        if norm == "none" and t is not None and name not in ("x", "update", "gate"):
            return f"{name}: got one with norm='none', which only adds; want none"
    if gate is not None and update is None:
        return "gate: got one without an update, want the update it multiplies"
    if update is not None and any(n > 1 and s == 0 for n, s in zip(x[0], x[1], strict=True)):
        return f"x: got strides {x[1]}, want memory of its own for every place"
    if max(x[1][1], update[1][1] if update else 0) >= 1 << 31:
        return "x, update: a row's stride is 2**31 elements or more; make them contiguous"
    return None


def _residual_norm(
    x: Tensor, update: Tensor | None, gate: Tensor | None, norm: str, scale: Tensor | None, shift: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, offset: Tensor | None, eps: float, out: Tensor, add_one: bool,
) -> Tensor:  # fmt: skip
    """The same on a CPU."""
    if update is not None:
        added = update.float()
        if gate is not None:
            added = added * _rows(gate)
        x.copy_(x.float() + added)
    if norm == "none":
        return x
    y = x.float() if offset is None else x.float() + _rows(offset)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    if scale is not None:
        y = y * (_rows(scale) + 1 if add_one else _rows(scale))
    if shift is not None:
        y = y + _rows(shift)
    return out.copy_(y)


def _rows(t: Tensor) -> Tensor:
    """[C] or [B, C] as fp32, to be used with [B, L, C]."""
    return t.float() if t.ndim == 1 else t.float().unsqueeze(1)
