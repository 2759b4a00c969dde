"""pocketvar: the model in the box."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Adapter, Parts
from sparvar_tune.catalog.models import Model
from sparvar_tune.generation import CacheBudget, PruneTokens, SkipScales
from sparvar_tune.pocketvar.model import CLASSES, DENSE, WEIGHTS, Attend, Generation, PocketVAR, draw_noise, load_pocketvar

YARDSTICKS = Path(__file__).parents[1] / "pocketvar" / "yardsticks.json"
REDRAW = "dense, noise redrawn at the last two scales"
DROP = "dense, last scale left out"
# its sampling reads them off the attention
STEPS = {step.kind: lambda found, step: Undos() for step in (SkipScales, PruneTokens, CacheBudget)}


@lru_cache(maxsize=4)
def weights_hash(path: Path = WEIGHTS) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class PocketAdapter(Adapter):
    """pocketvar, driven. It has no guidance, so there is no half to drop."""

    steps = tuple(STEPS)

    def __init__(self, model: Model, device: str) -> None:
        self.model, self.device = model, device
        self.live = load_pocketvar(device=device)
        self.schedule = self.live.schedule
        self.softmax_scale, self.logit_bound = 1.0, self.live.logit_bound
        self.weights_sha256 = weights_hash()
        self.temperature = 0.7
        self.num_classes = self.live.config.classes
        self.dense, self.dense_name = DENSE, "torch scaled_dot_product_attention"

    def start(self, pair: tuple[int, int], until: int) -> Generation:
        label, seed = pair
        noise = draw_noise(self.schedule, self.live.config.bits, seed)
        return Generation(self.live, [label], noise, self.temperature, DENSE).run(until).parked()

    def finish(self, state: Generation, attend: Attend, redraw_from: int | None = None) -> Tensor:
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
        return CLASSES

    def required(self, preset: str) -> Mapping[str, float]:
        if preset == "near-lossless":
            for name, psnr_db, _ssim in self.yardsticks():
                if name == REDRAW:
                    return {"psnr": psnr_db, "ssim": 0.93}
            raise ValueError(f"{YARDSTICKS.name}: not of these weights; run python -m lab.pocketvar.yardsticks")
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
        if not YARDSTICKS.is_file():
            return []
        data = json.loads(YARDSTICKS.read_text("utf-8"))
        return data["rows"] if data["weights_sha256"] == self.weights_sha256 else []


def open_model(model: Model, device: str) -> PocketAdapter:
    return PocketAdapter(model, device)


def why_not(model: Any) -> str | None:
    """Why `model` is no pocketvar, or None."""
    return None if isinstance(model, PocketVAR) else f"it is a {type(model).__name__}"


def parts(model: PocketVAR) -> Parts:
    """One callable attends for every layer, so there are no attention modules; the blocks stand for them."""
    c, blocks = model.config, tuple(model.blocks)
    return Parts("pocketvar", model, blocks, blocks, c.heads, c.head_dim, 1.0, model.logit_bound, model.schedule)


def weights_sha256(model: PocketVAR) -> str:
    """The hash of the shipped weights where the model has them, else one of what it has."""
    shipped = load_file(WEIGHTS)
    own = {name: t for name, t in model.state_dict().items() if name in shipped}
    if own.keys() == shipped.keys() and all(torch.equal(t.cpu(), shipped[name]) for name, t in own.items()):
        return weights_hash()
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode() + t.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Attached:
    """`undo` takes this attention out of the model, whatever was put in before and after it."""

    # what a model attended with before any of ours, and ours in the order they came
    _of: ClassVar[WeakKeyDictionary[PocketVAR, tuple[Attend, list[Attached]]]] = WeakKeyDictionary()

    def __init__(self, model: PocketVAR, attend: SparseAttention) -> None:
        self.model, self.attend = model, attend
        _, ours = self._of.setdefault(model, (model.attend, []))
        ours.append(self)
        model.attend = attend

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts the model attends as it did before any of ours."""
        now = self.model.attend
        before, _ = self._of.get(self.model, (now, []))
        self.model.attend = before
        try:
            yield
        finally:
            self.model.attend = now

    def undo(self) -> None:
        before, ours = self._of.get(self.model, (None, []))
        if before is None or self not in ours:
            return
        ours.remove(self)
        if self.model.attend is self.attend:  # else something newer is on, ours or not
            self.model.attend = ours[-1].attend if ours else before
        if not ours:
            del self._of[self.model]


def attach(found: Parts, attend: SparseAttention) -> Attached:
    """Makes the model's sampling use `attend`. Raises ValueError when the two do not fit."""
    model: PocketVAR = found.model
    reason = attend.policy.why_not(model.schedule, found.layers, found.heads)
    if reason:
        raise ValueError(f"this profile does not fit the model: {reason}")
    return Attached(model, attend)
