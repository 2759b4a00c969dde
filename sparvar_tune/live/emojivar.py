"""emojivar, driven, with guidance by two halves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparvar_tune.adapters.emojivar import STEPS
from sparvar_tune.adapters.protocol import Pair
from sparvar_tune.bitwise.sampling import Attend
from sparvar_tune.catalog.models import Model
from sparvar_tune.emojivar.installed import place
from sparvar_tune.emojivar.model import CLASSES, Generation, caption, load_emojivar
from sparvar_tune.live.boxed import REDRAW, BoxedAdapter

__all__ = ["REDRAW", "EmojiAdapter", "open_model"]

GUIDANCE = 1.0


class EmojiAdapter(BoxedAdapter):
    """emojivar, driven. A pair's class is the thing that is drawn; its seed says the rest of the caption, and the noise."""

    steps = tuple(STEPS)
    classes_by_index = CLASSES

    def __init__(self, model: Model, device: str) -> None:
        self.yardsticks_file = place("yardsticks.json")
        super().__init__(model, device, load_emojivar(device=device), place("emojivar.safetensors"), temperature=0.7)

    def begin(self, pairs: Sequence[Pair], noise: Tensor, attend: Attend | None = None) -> Generation:
        captions = [caption(*pair) for pair in pairs]
        return Generation(self.live, captions, noise, self.temperature, GUIDANCE, attend or self.dense)


def open_model(model: Model, device: str) -> EmojiAdapter:
    return EmojiAdapter(model, device)
