"""pocketvar: the model in the box."""

from __future__ import annotations

from sparvar_tune.adapters import boxed
from sparvar_tune.adapters.boxed import attach
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.generation import CacheBudget, Precision, PruneTokens, SkipScales
from sparvar_tune.pocketvar.model import WEIGHTS, PocketVAR

__all__ = ["STEPS", "attach", "parts", "weights_sha256", "why_not"]

# its sampling reads them off the attention
STEPS = {step.kind: lambda found, step: Undos() for step in (SkipScales, PruneTokens, CacheBudget, Precision)}


why_not = boxed.why_not_a(PocketVAR)


def parts(model: PocketVAR) -> Parts:
    """One callable attends for every layer, so there are no attention modules; the blocks stand for them."""
    c, blocks = model.config, tuple(model.blocks)
    return Parts("pocketvar", model, blocks, blocks, c.heads, c.head_dim, 1.0, model.logit_bound, model.schedule)


def weights_sha256(model: PocketVAR) -> str:
    """The hash of the shipped weights where the model has them, else one of what it has."""
    return boxed.weights_sha256(model, WEIGHTS)
