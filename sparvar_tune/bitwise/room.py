"""Room for keys and values that one picture leaves to the next: on a CPU fresh pages of so much memory cost more than writing it.

A GPU's allocator keeps memory by itself.
"""

from __future__ import annotations

import sys
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as PyTorch's own
KEPT_ONLY = 3  # references to memory that no tensor shares: kept, asked about, and by what asks

_kept: WeakKeyDictionary[Any, np.ndarray[Any, Any]] = WeakKeyDictionary()  # of each model that of its last picture
_one_at_a_time = threading.Lock()


def room_for(model: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[*shape], of whatever values, that no other tensor shares.

    On a CPU it lies where an earlier picture of the model had its keys and values, once all tensors that saw those are gone:
    whoever holds one keeps it as it is. The model holds the memory of one picture as long as it lives.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    with _one_at_a_time:
        memory = _kept.get(model)
        if memory is None or memory.size != size + ALIGNMENT or sys.getrefcount(memory) > KEPT_ONLY:
            memory = np.empty(size + ALIGNMENT, np.uint8)
            _kept[model] = memory
        begin = -memory.ctypes.data % ALIGNMENT
        return torch.from_numpy(memory[begin : begin + size]).view(dtype).view(shape)
