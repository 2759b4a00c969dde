"""VAR (github.com/FoundationVision/VAR, and copies of its classes): recognised, not imported."""

from __future__ import annotations

from typing import Any

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.adapters import live_attention
from sparvar_tune.adapters.guidance import run_half, stop_before
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.live_attention import LiveAttention
from sparvar_tune.adapters.precision import scale_products
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.steps import by_scale
from sparvar_tune.adapters.structure import Shape, take_apart, uncompiled, why_not_blocks

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
    return why_not_blocks(list(model.blocks), BLOCK, {"attn": ATTENTION}, "num_heads", "head_dim", "scale", "attn_l2_norm")


def parts(model: Any) -> Parts:
    model = uncompiled(model)
    return take_apart("var", model, model.blocks, "attn", "attn_l2_norm", ScaleSchedule.square(tuple(model.patch_nums)))


def attach(found: Parts, attend: SparseAttention) -> LiveAttention:
    """Makes the model use `attend`."""
    return live_attention.attach(found, attend, ATTENTION.parameters, bias="attn_bias")


def skip_scales(found: Parts, from_scale: int) -> Undos:
    """Leaves out the scales from `from_scale` on; the picture is decoded from what was summed up before."""
    return stop_before(found, from_scale, from_scale - 1)


def drop_unconditional(found: Parts, from_scale: int) -> Undos:
    """Runs the conditional half alone from scale `from_scale` on: guidance 1 there, but for the rounding of the mixture."""
    return run_half(found, from_scale, _scale_of(found), _cut)


def linears(block: Any) -> tuple[Any, ...]:
    """Those whose products `Precision` scales."""
    return block.attn.mat_qkv, block.attn.proj, block.ffn.fc1, block.ffn.fc2


def make_precise(found: Parts, step: Any) -> Undos:
    """Multiplies scaled rows of 8-bit numbers (`generation/precision.py`)."""
    return scale_products(found, step, linears, BLOCK.named)


STEPS = {"skip_scales": by_scale(skip_scales), "drop_unconditional": by_scale(drop_unconditional), "precision": make_precise}


def _cut(given: dict[str, Any], half: int) -> dict[str, Any]:
    return {**given, "x": given["x"][:half], "cond_BD": given["cond_BD"][:half]}


def _scale_of(found: Parts) -> Any:
    """No call says its scale; its number of tokens does, as every grid is larger than the one before."""
    assert found.schedule is not None
    scales = {found.schedule.num_queries(s): s for s in range(len(found.schedule))}
    if len(scales) != len(found.schedule):
        raise ValueError(f"patch_nums {tuple(found.model.patch_nums)}: two grids are alike, want each larger than the one before")

    def scale_of(_attention: Any, given: dict[str, Any]) -> int:
        return scales[given["x"].shape[1]]

    return scale_of
