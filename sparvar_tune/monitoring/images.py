"""Pictures out of what a generation returned, and the random state that it began with: what a dense twin needs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor


def pictures_of(returned: Any) -> list[Tensor]:
    """Each picture as [1, 3, H, W] float32 in 0..1, of what the public models' methods and pipelines return.

    A tensor or array [B, 3, H, W] or [B, H, W, 3] (also without B), float in 0..1 or uint8; PIL images; a list or tuple of them,
    of which the last tensor of pictures counts; an object with `images`. Raises ValueError for anything else.
    """
    found = _pictures(returned)
    if found is None:
        raise ValueError(f"pictures: got {type(returned).__name__}, want a tensor [B, 3, H, W] or [B, H, W, 3] or PIL images; "
                         "give picture=, a function that takes them out")  # fmt: skip
    return [picture.unsqueeze(0) for picture in found]


def _pictures(value: Any) -> Tensor | None:
    """[B, 3, H, W], or None where it is no picture."""
    if hasattr(value, "images"):
        return _pictures(value.images)
    if isinstance(value, list | tuple):
        parts = [found for part in value if (found := _pictures(part)) is not None]
        if parts and all(hasattr(part, "convert") for part in value) and len({p.shape for p in parts}) == 1:
            return torch.cat(parts)
        return parts[-1] if parts else None
    if hasattr(value, "convert") and hasattr(value, "size"):  # PIL
        value = numpy.asarray(value.convert("RGB"))
    if isinstance(value, numpy.ndarray):
        value = torch.from_numpy(numpy.array(value))  # a copy: what a library hands out may not be writable
    if not isinstance(value, Tensor) or value.ndim not in (3, 4) or not (value.is_floating_point() or value.dtype == torch.uint8):
        return None
    value = value.unsqueeze(0) if value.ndim == 3 else value
    if value.shape[1] != 3:
        if value.shape[-1] != 3:
            return None
        value = value.permute(0, 3, 1, 2)
    value = value.detach()
    return value.float() / 255 if value.dtype == torch.uint8 else value.float().clamp(0, 1)


class RandomState:
    """The state of every random generator a drawing may use: Python's, NumPy's and torch's own, and those that are given."""

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self.generators = list(generators)
        self.python, self.numpy, self.torch = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        on_gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.gpus = torch.cuda.get_rng_state_all() if on_gpus else []
        self.given = [generator.get_state() for generator in self.generators]

    def restore(self) -> None:
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)
        for generator, state in zip(self.generators, self.given, strict=True):
            generator.set_state(state)


def generators_in(*values: Any) -> list[torch.Generator]:
    """The torch generators among arguments, in lists and dicts of them, and among attributes of a model."""
    found: dict[int, torch.Generator] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Generator):
            found[id(value)] = value
        elif isinstance(value, torch.nn.Module):
            waiting += [v for v in vars(value).values() if isinstance(v, torch.Generator)]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
    return list(found.values())
