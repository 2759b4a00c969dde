"""What driving the models in the box shares: parked states, yardsticks, their one attention callable replaced and put back."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters.protocol import Adapter, Parts
from sparvar_tune.adapters.whole_images import begin_image
from sparvar_tune.bitwise.sampling import Attend, DenseAttention, Generating, draw_noise
from sparvar_tune.catalog.models import Model

REDRAW = "dense, noise redrawn at the last two scales"
DROP = "dense, last scale left out"


@lru_cache(maxsize=4)
def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class BoxedAdapter(Adapter):
    """A model in the box, driven. `begin` says what a pair is; `yardsticks_file` what is known of these weights."""

    yardsticks_file: Path
    classes_by_index: tuple[str, ...]

    def __init__(self, model: Model, device: str, live: Any, weights: Path, temperature: float) -> None:
        self.model, self.device, self.live = model, device, live
        self.schedule = live.schedule
        self.softmax_scale, self.logit_bound = live.softmax_scale, live.logit_bound
        self.weights_sha256 = file_hash(weights)
        self.temperature = temperature
        self.num_classes = len(self.classes_by_index)
        self.dense, self.dense_name = DenseAttention(live.softmax_scale), "torch scaled_dot_product_attention"

    @abstractmethod
    def begin(self, pair: tuple[int, int], noise: Tensor) -> Generating:
        """The generation of a pair before its first scale, with dense attention."""

    def start(self, pair: tuple[int, int], until: int) -> Generating:
        return self.begin(pair, draw_noise(self.schedule, self.live.config.bits, pair[1])).run(until).parked()

    def finish(self, state: Generating, attend: Attend, redraw_from: int | None = None) -> Tensor:
        begin_image(attend)  # a state is finished many times, maybe with one attention
        noise = None
        if redraw_from is not None:
            begin = self.schedule.starts[redraw_from]
            noise = state.noise[0].clone()
            noise[begin:] = draw_noise(self.schedule, self.live.config.bits, self._seed_of(noise))[begin:]
        return state.fork(attend, noise).run().pictures()

    @staticmethod
    def _seed_of(noise: Tensor) -> int:
        """A number that depends on the noise alone, so that redrawing is a pure function of the pair."""
        return int(hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest()[:10], 16)

    def classes(self) -> Sequence[str]:
        return self.classes_by_index

    def required(self, preset: str) -> Mapping[str, float]:
        if preset == "near-lossless":
            for name, psnr_db, _ssim in self.yardsticks():
                if name == REDRAW:
                    return {"psnr": psnr_db, "ssim": 0.93}
            slug = self.model.slug
            raise ValueError(f"{self.yardsticks_file.name}: not of these weights; run python -m lab.yardsticks {slug}")
        return super().required(preset)

    def class_levels(self) -> tuple[float, ...]:
        for row in self._yardstick_rows():
            if row["name"] == REDRAW:
                return tuple(row["psnr_db_by_class"])
        return (0.0,) * self.num_classes

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        return tuple((row["name"], row["psnr_db"], row["ssim"]) for row in self._yardstick_rows())

    def _yardstick_rows(self) -> list[dict[str, Any]]:
        """Rows of yardsticks.json if they were measured with these weights, else none."""
        if not self.yardsticks_file.is_file():
            return []
        data = json.loads(self.yardsticks_file.read_text("utf-8"))
        return data["rows"] if data["weights_sha256"] == self.weights_sha256 else []


def why_not_a(kind: type[Any]) -> Callable[[Any], str | None]:
    """A family's `why_not` for a class of models."""
    return lambda model: None if isinstance(model, kind) else f"it is a {type(model).__name__}"


def weights_sha256(model: Any, path: Path) -> str:
    """The hash of the shipped weights where the model has them, else one of what it has."""
    shipped = load_file(path) if path.is_file() else {}
    own = {name: t for name, t in model.state_dict().items() if name in shipped}
    if own and own.keys() == shipped.keys() and all(torch.equal(t.cpu(), shipped[name]) for name, t in own.items()):
        return file_hash(path)
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode() + t.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Attached:
    """`undo` takes this attention out of the model, whatever was put in before and after it."""

    # what a model attended with before any of ours, whether as an attribute of its own, and ours in the order they came
    _of: ClassVar[WeakKeyDictionary[Any, tuple[Attend, bool, list[Attached]]]] = WeakKeyDictionary()

    def __init__(self, model: Any, attend: Attend) -> None:
        self.model, self.attend = model, attend
        _, _, ours = self._of.setdefault(model, (model.attend, "attend" in vars(model), []))
        ours.append(self)
        model.attend = attend

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts the model attends as it did before any of ours."""
        now = self.model.attend
        before = self._of.get(self.model, (now,))[0]
        self.model.attend = before
        try:
            yield
        finally:
            self.model.attend = now

    def undo(self) -> None:
        before, own, ours = self._of.get(self.model, (None, False, []))
        if before is None or self not in ours:
            return
        ours.remove(self)
        if self.model.attend is self.attend:  # else something newer is on, ours or not
            self.model.attend = ours[-1].attend if ours else before
            if not ours and not own:
                del self.model.attend  # its class says it
        if not ours:
            del self._of[self.model]


def attach(found: Parts, attend: SparseAttention) -> Attached:
    """Makes the model's sampling use `attend`. Raises ValueError when the two do not fit."""
    reason = attend.policy.why_not(found.model.schedule, found.layers, found.heads)
    if reason:
        raise ValueError(f"this profile does not fit the model: {reason}")
    return Attached(found.model, attend)
