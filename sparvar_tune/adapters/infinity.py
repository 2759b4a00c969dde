"""Infinity (github.com/FoundationVision/Infinity, and copies of its classes): recognised, not imported."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters import live_attention
from sparvar_tune.adapters.cache_budget import keep_budget
from sparvar_tune.adapters.cross_attention import give_cross_attention
from sparvar_tune.adapters.guidance import GENERATE, Drop, bound, check_from
from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.live_attention import LiveAttention, schedule_of
from sparvar_tune.adapters.precision import scale_products
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.prune_tokens import InfinityBlock, prune_tokens
from sparvar_tune.adapters.steps import by_scale
from sparvar_tune.adapters.structure import Shape, take_apart, uncompiled, why_not_blocks

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
    return why_not_blocks(
        list(model.unregistered_blocks),
        BLOCK,
        {"sa": ATTENTION, "ca": CROSS},
        "num_heads",
        "head_dim",
        "scale",
        "cos_attn",
        "using_flash",
    )


def parts(model: Any) -> Parts:
    model = uncompiled(model)
    return take_apart("infinity", model, model.unregistered_blocks, "sa", "cos_attn", None)


def attach(found: Parts, attend: SparseAttention) -> LiveAttention:
    """Makes the model use `attend`, and our cross-attention where its code finds no flash-attn."""
    live = live_attention.attach(
        found, attend, ATTENTION.parameters, bias="attn_bias_or_two_vector", schedule="scale_schedule", without=("attn_fn",)
    )
    live.add(give_cross_attention(found))
    return live


def skip_scales(found: Parts, from_scale: int) -> Undos:
    """Leaves out the scales from `from_scale` on, by the method's own `trunk_scale`."""
    check_from(found, from_scale, 1)

    def generate(inner: Any, *args: Any, **kwargs: Any) -> Any:
        given = bound(found, args, kwargs)
        given.pop("self", None)
        if _is_other(found, given):
            return inner(**given)
        return inner(**{**given, "trunk_scale": min(from_scale, given.get("trunk_scale", from_scale))})

    undos = Undos()
    undos.add(replace_method(found.model, GENERATE, generate))
    return undos


def drop_unconditional(found: Parts, from_scale: int) -> Undos:
    """Runs the conditional half alone from scale `from_scale` on: bit for bit what guidance 1 draws there."""
    drop, text, named = Drop(found, from_scale), {"rows": 0}, BLOCK.named

    def generate(inner: Any, *args: Any, **kwargs: Any) -> Any:
        given = bound(found, args, kwargs)
        given.pop("self", None)
        if _is_other(found, given):
            return inner(**given)
        cfgs = list(given["cfg_list"])
        given["cfg_list"] = cfgs[:from_scale] + [1] * (len(cfgs) - from_scale)
        drop.half = given.get("B", 1) if any(c != 1 for c in given["cfg_list"]) else 0
        text["rows"] = sum(int(n) for n in given["label_B_or_BLT"][1])  # known here: no block need wait for the device
        try:
            return inner(**given)
        finally:
            drop.half = 0

    def block(attention: Any) -> Any:
        def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
            given = named(*args, **kwargs)
            half = drop.half
            if not half or not attention.caching or given.get("scale_ind", 0) < from_scale:
                return inner(*args, **kwargs)
            drop.cut_caches(attention)
            compact, ends, longest = given["ca_kv"]
            return inner(**{
                **given, "x": given["x"][:half], "cond_BD": given["cond_BD"][:half],
                "ca_kv": (compact[: text["rows"]], ends[: half + 1], longest),
            })  # fmt: skip

        return forward

    for module, attention in zip(found.blocks, found.attentions, strict=True):
        drop.add(replace_method(module, "forward", block(attention)))
    drop.add(replace_method(found.model, GENERATE, generate))
    return drop


def budget_caches(found: Parts, step: Any) -> Undos:
    """Cuts every layer's cache to its budget (`generation/cache_budget.py`)."""
    return keep_budget(found, step, _raw_queries, ATTENTION.named, _is_other)


def prune(found: Parts, step: Any) -> Undos:
    """Lets the middle layers work on a part of the tokens (`generation/prune_tokens.py`)."""
    return prune_tokens(step, lambda layer: InfinityBlock(found, step, layer, BLOCK.named, _is_other))


def _raw_queries(attention: Any, x: Tensor) -> Tensor:
    """[B, N, H, D] of x [B, N, C] as the projection gives them."""
    width = attention.num_heads * attention.head_dim
    q: Tensor = attention.mat_qkv(x)[..., :width]
    return q.unflatten(-1, (attention.num_heads, attention.head_dim))


def linears(block: Any) -> tuple[Any, ...]:
    """Those whose products `Precision` scales."""
    return block.sa.mat_qkv, block.sa.proj, block.ffn.fc1, block.ffn.fc2


def make_precise(found: Parts, step: Any) -> Undos:
    """Multiplies scaled rows of 8-bit numbers (`generation/precision.py`)."""
    return scale_products(found, step, linears, BLOCK.named, _is_other)


STEPS = {
    "skip_scales": by_scale(skip_scales), "drop_unconditional": by_scale(drop_unconditional), "cache_budget": budget_caches,
    "prune_tokens": prune, "precision": make_precise,
}  # fmt: skip


def _is_other(found: Parts, given: dict[str, Any]) -> bool:
    """Whether an image has another schedule than a policy's, whose certificate then says nothing."""
    return found.schedule is not None and schedule_of(given.get("scale_schedule")) != found.schedule
