"""Logits of bits on their way through a model's own sampling, with what PyTorch does slowly along an axis of two done otherwise.

Infinity draws every bit by top-k and top-p of its two logits, by PyTorch's functions for vocabularies. A running sum of two is
one addition, and the two largest of two are both; their kernels take an H200 9 of the 573 ms of a picture of 2048 x 2048. All
else is PyTorch's own, so random numbers, ties and bits stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cuda",)
LEAST = 1 << 14  # numbers from which on it gains more than Python takes to look at every function


class TwoChoices(Tensor):
    """A floating-point tensor; what functions make of it is one, too, as far as it is floating-point."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            otherwise = _OTHERWISE.get(func) if args else None
            out = None if otherwise is None else otherwise(*args, **given)
            if out is None:
                out = func(*args, **given)
        if isinstance(out, tuple) and hasattr(out, "n_fields"):  # values and indices
            return type(out)([_marked(t) for t in out])
        return _marked(out)

    # Copied or saved it is a plain tensor: whoever reads it again needs nothing of ours.

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def two_choices(logits: Tensor) -> Tensor:
    """The logits as TwoChoices, on the same memory, where that gains; else as they are."""
    plain = type(logits) is Tensor and logits.dtype == torch.float32 and logits.device.type in DEVICES
    return logits.as_subclass(TwoChoices) if plain and logits.numel() >= LEAST and not logits.requires_grad else logits


def _marked(out: Any) -> Any:
    return out.as_subclass(TwoChoices) if type(out) is Tensor and out.is_floating_point() else out


def _summed(x: Tensor, dim: int | None = None, **others: Any) -> Tensor | None:
    """x.cumsum_(dim) along two, or None where it is something else."""
    if others or x.dtype != torch.float32 or x.shape[-1:] != (2,) or dim not in (-1, x.ndim - 1) or not x.is_contiguous():
        return None
    x[..., 0] += 0.0  # PyTorch's sum begins with 0, which makes 0 of -0
    x[..., 1] += x[..., 0]
    return x


def _largest(
    x: Tensor, k: int | None = None, dim: int = -1, largest: bool = True, sorted: bool = True, **others: Any
) -> Any:  # fmt: skip
    """x.topk(k, dim) where that is all there is, in any order, or None."""
    if others or sorted or x.shape[-1:] != (k,) or dim not in (-1, x.ndim - 1):
        return None
    places = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    return torch.return_types.topk((x.clone(memory_format=torch.contiguous_format), places.contiguous()))


_OTHERWISE: dict[Any, Callable[..., Any]] = {
    Tensor.cumsum_: _summed, Tensor.topk: _largest, torch.topk: _largest,
}  # fmt: skip
