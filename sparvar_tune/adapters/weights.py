"""The hash by which a profile knows the weights it was certified with, fast enough for billions of them.

Of each tensor of two axes or more: its name, shape and dtype, the exact sum of its bits read as integers (every value counts, and
the sum is the same on any device and in any order), and a sample of its values as they are (the sum alone does not see two
exchanged). Vectors are left out where there are matrices: public code casts the factors of its norms at first use (HART).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLE = 4096  # values of each tensor, evenly spaced
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_sha256(model: Any) -> str:
    """64 hex digits over a module's state, or over a mapping of tensors. Raises ValueError where there is no tensor."""
    state = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(state, Mapping) or not any(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"weights: got a {type(model).__name__} without tensors, want a module or a mapping of tensors")
    digest, least = hashlib.sha256(), min(2, max(t.ndim for t in state.values() if isinstance(t, Tensor)))
    for name, t in sorted(state.items()):
        if isinstance(t, Tensor) and t.ndim >= least:
            digest.update(f"{name} {tuple(t.shape)} {t.dtype} ".encode())
            digest.update(_digest(t.detach()))
    return digest.hexdigest()


def _digest(t: Tensor) -> bytes:
    flat = t.contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    if not flat.numel():
        return b""
    bits = flat.view(_BITS[flat.element_size()])
    # int64 wraps on overflow, which is as exact a sum
    total = int(bits.sum(dtype=torch.int64))
    picked = bits[torch.linspace(0, len(bits) - 1, min(SAMPLE, len(bits)), device=bits.device, dtype=torch.float64).long()]
    return f"{total} ".encode() + picked.cpu().numpy().tobytes()
