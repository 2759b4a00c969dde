"""pocketvar, driven."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sparvar_tune.adapters.pocketvar import STEPS
from sparvar_tune.adapters.protocol import Pair
from sparvar_tune.bitwise.sampling import Attend
from sparvar_tune.catalog.models import Model
from sparvar_tune.live.boxed import DROP, REDRAW, BoxedAdapter
from sparvar_tune.pocketvar.model import CLASSES, WEIGHTS, Generation, load_pocketvar

__all__ = ["DROP", "REDRAW", "YARDSTICKS", "PocketAdapter", "open_model"]

YARDSTICKS = Path(__file__).parents[1] / "pocketvar" / "yardsticks.json"


class PocketAdapter(BoxedAdapter):
    """pocketvar, driven. It has no guidance, so there is no half to drop."""

    steps = tuple(STEPS)
    yardsticks_file, classes_by_index = YARDSTICKS, CLASSES

    def __init__(self, model: Model, device: str) -> None:
        super().__init__(model, device, load_pocketvar(device=device), WEIGHTS, temperature=0.7)

    def begin(self, pairs: Sequence[Pair], noise: Tensor, attend: Attend | None = None) -> Generation:
        return Generation(self.live, [label for label, _ in pairs], noise, self.temperature, attend or self.dense)


def open_model(model: Model, device: str) -> PocketAdapter:
    return PocketAdapter(model, device)
