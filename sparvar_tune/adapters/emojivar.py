"""emojivar: the second model in the box, with a caption before its first scale and guidance by two halves."""

from __future__ import annotations

from sparvar_tune.adapters import boxed
from sparvar_tune.adapters.boxed import attach
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.emojivar.installed import place
from sparvar_tune.emojivar.model import EmojiVAR
from sparvar_tune.generation import CacheBudget, DropUnconditional, Precision, PruneTokens, SkipScales

__all__ = ["STEPS", "attach", "parts", "weights_sha256", "why_not"]

# its sampling reads them off the attention
STEPS = {step.kind: lambda found, step: Undos() for step in (SkipScales, DropUnconditional, PruneTokens, CacheBudget, Precision)}

why_not = boxed.why_not_a(EmojiVAR)


def parts(model: EmojiVAR) -> Parts:
    """One callable attends for every layer, so there are no attention modules; the blocks stand for them."""
    c, blocks = model.config, tuple(model.blocks)
    return Parts("emojivar", model, blocks, blocks, c.heads, c.head_dim, c.head_dim**-0.5, None, model.schedule)


def weights_sha256(model: EmojiVAR) -> str:
    """The hash of the shipped weights where the model has them, else one of what it has."""
    return boxed.weights_sha256(model, place("emojivar.safetensors"))
