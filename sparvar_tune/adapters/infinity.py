"""Infinity (github.com/FoundationVision/Infinity, and copies of its classes): recognised, not imported."""

from __future__ import annotations

import math
from typing import Any

from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.structure import Shape, uncompiled, why_not_alike, why_not_open

ATTENTION = Shape(
    "the attention of a block",
    ("num_heads", "head_dim", "scale", "cos_attn", "using_flash", "use_flex_attn", "mat_qkv", "q_bias", "v_bias", "zero_k_bias",
     "proj", "caching", "cached_k", "cached_v", "kv_caching"),
    ("x", "attn_bias_or_two_vector", "attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind"),
    calls=("slow_attn", "flash_attn_func"),
)  # fmt: skip
BLOCK = Shape(
    "a block", ("sa", "ca", "ffn", "ca_norm", "fused_norm_func"),
    ("x", "cond_BD", "ca_kv", "attn_bias_or_two_vector", "attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind"),
)  # fmt: skip
CROSS = Shape("the cross-attention of a block", ("num_heads", "head_dim", "mat_kv", "proj"), ("q", "ca_kv"))
MODEL_ATTRIBUTES = ("unregistered_blocks", "get_logits", "text_proj_for_sos", "word_embed", "rope2d_freqs_grid")
GENERATION = {"scale_schedule", "B", "cfg_list", "trunk_scale", "label_B_or_BLT"}  # what the hooks read or set


def why_not(model: Any) -> str | None:
    """Why `model` is no Infinity, or None."""
    import inspect

    model = uncompiled(model)
    missing = [name for name in MODEL_ATTRIBUTES if not hasattr(model, name)]
    if missing:
        return f"it has no {missing[0]}"
    method = getattr(type(model), "autoregressive_infer_cfg", None)
    if method is None:
        return "it has no method autoregressive_infer_cfg"
    lacks = sorted(GENERATION - set(inspect.signature(method).parameters))
    if lacks:
        return f"its autoregressive_infer_cfg takes no {lacks[0]}"
    blocks = list(model.unregistered_blocks)
    if not blocks:
        return "it has no blocks"
    reason = why_not_open(blocks, "block")
    for block in blocks:
        reason = reason or BLOCK.why_not(block) or why_not_open([block.sa], "the attention of block")
        reason = reason or ATTENTION.why_not(block.sa) or CROSS.why_not(block.ca)
    return reason or why_not_alike([b.sa for b in blocks], "num_heads", "head_dim", "scale", "cos_attn", "using_flash")


def parts(model: Any) -> Parts:
    model = uncompiled(model)
    blocks = tuple(model.unregistered_blocks)
    first = blocks[0].sa
    bound = math.exp(first.max_scale_mul) * first.scale if first.cos_attn else None
    return Parts(
        "infinity", model, blocks, tuple(b.sa for b in blocks), first.num_heads, first.head_dim, float(first.scale), bound, None
    )
