"""HART (github.com/mit-han-lab/hart, and copies of its classes): recognised, not imported."""

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
from sparvar_tune.adapters.prune_tokens import HartBlock, prune_tokens
from sparvar_tune.adapters.steps import by_scale
from sparvar_tune.adapters.structure import Shape, take_apart, uncompiled, why_not_blocks

ATTENTION = Shape(
    "the attention of a block",
    ("num_heads", "head_dim", "scale", "attn_l2_norm", "using_flash", "using_xform", "qkv_proj", "q_bias", "v_bias",
     "zero_k_bias", "proj", "patch_nums", "context_token", "caching", "cached_k", "cached_v", "kv_caching"),
    ("x", "attn_bias", "si", "context_position_ids", "context_mask", "m_maskgit"),
    calls=("slow_attn", "flash_attn_func", "memory_efficient_attention"),
)  # fmt: skip
BLOCK = Shape(
    "a block", ("attn", "ffn", "ln_wo_grad", "disable_aln"),
    ("x", "cond_BD", "attn_bias", "si", "context_position_ids", "context_mask", "m_maskgit"),
)  # fmt: skip
MODEL = Shape(
    "it", ("blocks", "patch_nums", "context_token", "get_logits", "vae_proxy", "vae_quant_proxy", "word_embed", "diffloss"),
    ("B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth", "context_position_ids", "context_mask", "final_stage",
     "num_maskgit_iters"),
    method="autoregressive_infer_cfg",
)  # fmt: skip


def why_not(model: Any) -> str | None:
    """Why `model` is no HART, or None."""
    model = uncompiled(model)
    reason = MODEL.why_not(model)
    if reason:
        return reason
    if not model.context_token:
        return "its context_token is 0; only text to image is known"
    return why_not_blocks(
        list(model.blocks), BLOCK, {"attn": ATTENTION}, "num_heads", "head_dim", "scale", "attn_l2_norm", "context_token"
    )


def parts(model: Any) -> Parts:
    """Context tokens stand in for the first grid: they are the schedule's prefix."""
    model = uncompiled(model)
    schedule = ScaleSchedule.square(tuple(model.patch_nums[1:]), model.context_token)
    return take_apart("hart", model, model.blocks, "attn", "attn_l2_norm", schedule)


def attach(found: Parts, attend: SparseAttention) -> LiveAttention:
    """Makes the model use `attend`."""
    return live_attention.attach(found, attend, ATTENTION.parameters, bias="attn_bias")


def skip_scales(found: Parts, from_scale: int) -> Undos:
    """Leaves out the scales from `from_scale` on; the picture is decoded from what was summed up before."""
    return stop_before(found, from_scale, from_scale)  # what comes before the first grid is summed too


def drop_unconditional(found: Parts, from_scale: int) -> Undos:
    """Runs the conditional half alone from scale `from_scale` on: guidance 1 there, but for the rounding of the mixture.

    The diffusion head keeps its own guidance, which then mixes two equal halves.
    """
    return run_half(found, from_scale, _scale_of(found), _cut)


def prune(found: Parts, step: Any) -> Undos:
    """Lets its layers work on a part of the tokens (`generation/prune_tokens.py`). The last grid in rounds has all of them."""
    return prune_tokens(step, lambda layer: HartBlock(found, step, layer, BLOCK.named))


def linears(block: Any) -> tuple[Any, ...]:
    """Those whose products `Precision` scales."""
    return block.attn.qkv_proj, block.attn.proj, block.ffn.gate_proj, block.ffn.up_proj, block.ffn.down_proj


def make_precise(found: Parts, step: Any) -> Undos:
    """Multiplies scaled rows of 8-bit numbers (`generation/precision.py`)."""
    return scale_products(found, step, linears, BLOCK.named)


STEPS = {
    "skip_scales": by_scale(skip_scales), "drop_unconditional": by_scale(drop_unconditional), "prune_tokens": prune,
    "precision": make_precise,
}  # fmt: skip


def _cut(given: dict[str, Any], half: int) -> dict[str, Any]:
    rows = {name: given[name][:half] for name in ("x", "cond_BD", "context_position_ids", "context_mask")}
    places = given.get("m_maskgit")  # (row, place) of each token of the last grid, rows in order
    if places is not None:
        rows["m_maskgit"] = tuple(p[: p.shape[0] // 2] for p in places)
    return {**given, **rows}


def _scale_of(_found: Parts) -> Any:
    """A call's `si` counts the context tokens as 0; the schedule's first grid is 1 there."""

    def scale_of(_attention: Any, given: dict[str, Any]) -> int:
        return int(given["si"]) - 1

    return scale_of
