"""Cross-attention over texts of unequal lengths by PyTorch alone: what Infinity otherwise needs flash-attn for.

Infinity's code imports flash_attn when it is imported itself, so where that package is missing import it under the stand-in:

    with sparvar_tune.adapters.flash_attn_stand_in():
        from infinity.models.infinity import Infinity

A copy of the code that imports it only if it is there gets the same attention from `attach`.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_tune.adapters.attention_names import forward_with
from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.protocol import Parts

NAME = "flash_attn_varlen_kvpacked_func"


def varlen_cross_attention(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """[B * Nq, H, D] from q [B * Nq, H, D] and kv [sum of text lengths, 2, H, D]; arguments as flash-attn's.

    cu_seqlens_k [B + 1]: where each row's text starts. Rows have equally many queries. On a CPU, and in fp32,
    texts are padded to the longest and the padding is masked; nothing waits for the device. Raises ValueError for rows of
    unequal numbers of queries, and for dropout.
    """
    batch = len(cu_seqlens_k) - 1
    if q.shape[0] != batch * max_seqlen_q or dropout_p:
        raise ValueError(f"q: got {q.shape[0]} rows, dropout {dropout_p}; want {batch} x {max_seqlen_q} and no dropout")
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # PyTorch brings the same FlashAttention-2 kernel
        k, v, lengths = kv[:, 0], kv[:, 1], (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, scale=softmax_scale)[0]
        return found
    place = torch.arange(max_seqlen_k, device=q.device)
    starts, ends = cu_seqlens_k[:-1, None].to(q.device), cu_seqlens_k[1:, None].to(q.device)
    inside = starts + place < ends  # [B, longest]
    key, value = kv[(starts + place).clamp(max=kv.shape[0] - 1)].permute(2, 0, 3, 1, 4)  # 2 x [B, H, longest, D]
    query = q.unflatten(0, (batch, max_seqlen_q)).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=inside[:, None, None], scale=softmax_scale)
    return out.transpose(1, 2).flatten(0, 1)


def dense_attention_bnhd(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """Attention in flash-attn's layout: q [B, Nq, H, D], k and v [B, Nk, H, D] -> [B, Nq, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=softmax_scale, is_causal=causal)
    return out.transpose(1, 2).contiguous()


@contextlib.contextmanager
def flash_attn_stand_in() -> Iterator[None]:
    """While it lasts `import flash_attn` finds these functions, if the package is not installed; afterwards nothing is left."""
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    module = types.ModuleType("flash_attn", "sparvar-tune's stand-in for flash-attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = dense_attention_bnhd  # type: ignore[attr-defined]
    module.flash_attn_varlen_kvpacked_func = varlen_cross_attention  # type: ignore[attr-defined]
    sys.modules["flash_attn"] = module
    try:
        yield
    finally:
        if sys.modules.get("flash_attn") is module:
            del sys.modules["flash_attn"]


def give_cross_attention(found: Parts) -> Undos:
    """Our cross-attention in every module of the model whose code names flash-attn's but has none; changes nothing else."""
    undos = Undos(needed=True)
    modules = [block.ca for block in found.blocks] + [found.model.text_proj_for_sos.ca]
    for module in modules:
        own = type(module).forward
        if NAME in own.__code__.co_names and own.__globals__.get(NAME) is None:
            undos.add(replace_method(module, "forward", _always(forward_with(module, {NAME: varlen_cross_attention}))))
    return undos


def _always(forward: Any) -> Any:
    return lambda _inner, *args, **kwargs: forward(*args, **kwargs)
