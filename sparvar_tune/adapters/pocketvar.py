"""pocketvar: the model in the box."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sparvar_tune.adapters import boxed
from sparvar_tune.adapters.boxed import DROP, REDRAW, BoxedAdapter, attach
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.catalog.models import Model
from sparvar_tune.generation import CacheBudget, PruneTokens, SkipScales
from sparvar_tune.pocketvar.model import CLASSES, WEIGHTS, Generation, PocketVAR, load_pocketvar

__all__ = ["DROP", "REDRAW", "YARDSTICKS", "PocketAdapter", "attach", "open_model", "parts", "weights_sha256", "why_not"]

YARDSTICKS = Path(__file__).parents[1] / "pocketvar" / "yardsticks.json"
# its sampling reads them off the attention
STEPS = {step.kind: lambda found, step: Undos() for step in (SkipScales, PruneTokens, CacheBudget)}


class PocketAdapter(BoxedAdapter):
    """pocketvar, driven. It has no guidance, so there is no half to drop."""

    steps = tuple(STEPS)
    yardsticks_file, classes_by_index = YARDSTICKS, CLASSES

    def __init__(self, model: Model, device: str) -> None:
        super().__init__(model, device, load_pocketvar(device=device), WEIGHTS, temperature=0.7)

    def begin(self, pair: tuple[int, int], noise: Tensor) -> Generation:
        return Generation(self.live, [pair[0]], noise, self.temperature, self.dense)


def open_model(model: Model, device: str) -> PocketAdapter:
    return PocketAdapter(model, device)


why_not = boxed.why_not_a(PocketVAR)


def parts(model: PocketVAR) -> Parts:
    """One callable attends for every layer, so there are no attention modules; the blocks stand for them."""
    c, blocks = model.config, tuple(model.blocks)
    return Parts("pocketvar", model, blocks, blocks, c.heads, c.head_dim, 1.0, model.logit_bound, model.schedule)


def weights_sha256(model: PocketVAR) -> str:
    """The hash of the shipped weights where the model has them, else one of what it has."""
    return boxed.weights_sha256(model, WEIGHTS)
