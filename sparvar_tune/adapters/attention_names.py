"""A module's own forward with other functions in the place of some global names it uses: its code, not a copy of its text.

The function object is made anew with a dictionary of globals of its own, so neither the class nor the module it was imported
from changes, and two models of one class can differ.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, N, D] -> [B, H, Nq, D]


def forward_with(module: Any, names: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The class's forward, bound to `module`, with `names` as global names of its code."""
    own = type(module).forward
    made = FunctionType(own.__code__, {**own.__globals__, **names}, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return made.__get__(module)


def attention_names(attend: Attend) -> dict[str, Callable[..., Any]]:
    """`attend` under the names and in the layouts the public models call attention by.

    Masks and dropout are not looked at: the caller has seen that there is none.
    """

    def slow_attn(query: Tensor, key: Tensor, value: Tensor, **_rest: Any) -> Tensor:
        return _cast(attend, query, key, value)

    def flash(q: Tensor, k: Tensor, v: Tensor, *_more: Any, **_rest: Any) -> Tensor:
        return _cast(attend, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).contiguous()

    return {"slow_attn": slow_attn, "flash_attn_func": flash, "memory_efficient_attention": flash}


def _cast(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As autocast casts for attention: all in v's dtype, which the product before left in the low precision.

    Inside, autocast is off: kernels on a CPU and planners multiply in the precision they ask for.
    """
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.to(v.dtype), k.to(v.dtype), v)
