"""What both passes check of their tensors; every reason is one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What a pass knows of a tensor: all that its checks and its launch depend on. None stands for a tensor not given.
Form = tuple[torch.Size, tuple[int, ...], torch.dtype, int] | None
NO_GRAD = "want none: these passes have no backward; call under torch.no_grad() or torch.inference_mode()"


def form(t: Tensor | None) -> Form:
    """(shape, strides, dtype, address modulo 16)."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)


def by_triton(device: torch.device) -> bool:
    """Where the kernels run: on a GPU, and in Triton's interpreter on a CPU."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def on_device(device: torch.device, run: Callable[..., object], *arguments: Any) -> None:
    """Launches on the GPU of the inputs, whichever is current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(*arguments)
    else:
        run(*arguments)


def why_not_plain(name: str, t: Tensor, device: torch.device) -> str | None:
    """Why a pass cannot read or write this tensor at all, or None."""
    if t.layout != torch.strided or t.device.type not in ("cpu", "cuda"):
        return f"{name}: got a {t.layout} tensor on {t.device}, want a plain one on a CPU or a CUDA GPU"
    if t.device != device:
        return f"{name}: got it on {t.device}, want {device} like the first argument"
    if t.is_neg():
        return f"{name}: got a view that is negated when read, want resolve_neg() of it"
    if t.requires_grad and torch.is_grad_enabled():
        return f"{name}: got a tensor that requires grad, {NO_GRAD}"
    return None


def check_plain(tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Raises ValueError for the first of a pass's tensors, by its name, that it cannot read or write at all."""
    for name, t in tensors.items():
        reason = None if t is None else why_not_plain(name, t, device)
        if reason:
            raise ValueError(reason)


def why_not_contiguous(name: str, t: Form) -> str | None:
    """Why a tensor's numbers do not lie one behind the other, or None."""
    dense = 1
    for n, stride in zip(reversed(t[0]), reversed(t[1]), strict=True) if t is not None else ():
        if n > 1 and stride != dense:
            assert t is not None
            return f"{name}: got strides {t[1]}, want it contiguous"
        dense *= n
    return None


def why_not_like(name: str, t: Form, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> str | None:
    """Why a tensor has not one of these dtypes and shapes with its last axis contiguous, or None."""
    if t is None:
        return None
    shape, strides, dtype, _ = t
    if dtype not in dtypes:
        return f"{name}: got {dtype}, want {' or '.join(map(str, dtypes))}"
    if tuple(shape) not in shapes:
        return f"{name}: got {tuple(shape)}, want {' or '.join(map(str, shapes))}"
    if strides[-1] != 1 and shape[-1] != 1:
        return f"{name}: got strides {strides}, want its last axis contiguous"
    return None
