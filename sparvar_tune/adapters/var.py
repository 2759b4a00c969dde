"""VAR (github.com/FoundationVision/VAR, and copies of its classes): recognised, not imported."""

from __future__ import annotations

import math
from typing import Any

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.structure import Shape, uncompiled, why_not_alike, why_not_open

ATTENTION = Shape(
    "the attention of a block",
    ("num_heads", "head_dim", "scale", "attn_l2_norm", "using_flash", "using_xform", "mat_qkv", "q_bias", "v_bias",
     "zero_k_bias", "proj", "caching", "cached_k", "cached_v", "kv_caching"),
    ("x", "attn_bias"),
    calls=("slow_attn", "flash_attn_func", "memory_efficient_attention"),
)  # fmt: skip
BLOCK = Shape("a block", ("attn", "ffn", "ln_wo_grad", "shared_aln"), ("x", "cond_BD", "attn_bias"))
MODEL = Shape(
    "it", ("blocks", "patch_nums", "get_logits", "vae_proxy", "vae_quant_proxy", "word_embed", "class_emb"),
    ("B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth"), method="autoregressive_infer_cfg",
)  # fmt: skip


def why_not(model: Any) -> str | None:
    """Why `model` is no VAR, or None."""
    model = uncompiled(model)
    reason = MODEL.why_not(model)
    if reason:
        return reason
    blocks = list(model.blocks)
    if not blocks:
        return "it has no blocks"
    reason = why_not_open(blocks, "block")
    for block in blocks:
        reason = reason or BLOCK.why_not(block) or why_not_open([block.attn], "the attention of block")
        reason = reason or ATTENTION.why_not(block.attn)
    return reason or why_not_alike([b.attn for b in blocks], "num_heads", "head_dim", "scale", "attn_l2_norm")


def parts(model: Any) -> Parts:
    model = uncompiled(model)
    blocks = tuple(model.blocks)
    first = blocks[0].attn
    bound = math.exp(first.max_scale_mul) * first.scale if first.attn_l2_norm else None
    schedule = ScaleSchedule.square(tuple(model.patch_nums))
    return Parts(
        "var", model, blocks, tuple(b.attn for b in blocks), first.num_heads, first.head_dim, float(first.scale), bound, schedule
    )
