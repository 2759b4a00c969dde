"""What tuning and the runtime know of a model.

Two halves. `Adapter` drives a model that tuning draws pictures with; `Family` knows a live model that somebody else built and
drives: it recognises it, puts sparse attention into it and takes it out again. A family is a module (or any object) with the
functions of `Family`; `registry.py` lists them, and the entry points `sparvar_tune.adapters` add others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.catalog import models
from sparvar_tune.catalog.models import Model
from sparvar_tune.generation import SkipScales

BOUNDS = {
    "paper": {"psnr": 29.48, "ssim": 0.92},  # its CS4A + CSLA on Infinity-8B, its table 1
    "fast": {"psnr": 27.0, "ssim": 0.88},  # a draft: what is where stays, fine texture does not
}

Pair = tuple[int, int]  # (class or prompt index, noise seed): everything that names one picture


class Adapter(Protocol):
    """One live model; derive from it or not. A `state` is a generation stopped before some scale, to be finished many times.

    Promises, each tried by `sparvar-tune check-adapter`:

    - The same pair gives the same picture, bit for bit; another seed or another class another one. `finish` leaves its state
      as it was, and nothing of a picture is left in the model, also when attention raises.
    - `attend(q, k, v, layer, scale_index)` is called once for each scale from `until` on and in it for each layer, in order:
      q [B, H, Nq, D], k and v [B, H, Nk, D] in `model.dtype`, on `device`, without grad. B is `model.guidance_batch`.
    - k and v hold the tokens of every scale so far in the order of the schedule, its prefix first, and no token's changes later.
    - Logits are q @ k^T * softmax_scale; no |logit| is above `logit_bound` where that is not None.
    - Scales in `attend.skip_scales` are left out; the picture has its size all the same.
    - `dense` is attention to every key, the baseline, and has `skip_scales` of ().

    model: the row of the model's table, or one of `catalog.models.own_model`. weights_sha256: 64 hex digits; what a certificate
    holds for (`adapters.weights.weights_sha256` makes them). temperature: of the sampling, part of what names the pictures.
    """

    model: Model
    schedule: ScaleSchedule
    device: str
    softmax_scale: float
    logit_bound: float | None
    weights_sha256: str
    temperature: float
    num_classes: int
    dense: Any  # the dense attention callable, the baseline; `dense_name` names it
    dense_name: str
    prompts: Sequence[Any] = ()  # by class, what its pictures are drawn from where that is text: some metrics read it
    picture_path: str = ""  # what pictures are drawn on, where that is not the model's own code around attention
    steps: Collection[str] = (SkipScales.kind,)  # kinds of generation steps that `finish` does where `attend` has them

    def start(self, pair: Pair, until: int) -> Any:
        """State of the dense generation of `pair` before scale `until`."""

    def finish(self, state: Any, attend: Any, redraw_from: int | None = None) -> Tensor:
        """Picture [1, 3, H, W] in 0..1 from `state` on with `attend`; other noise from scale `redraw_from` on.

        `attend.skip_scales` are left out; `attend.policy.steps` says what else the generation does otherwise. redraw_from is for
        yardsticks alone; a model that has none may raise ValueError for it.
        """

    def classes(self) -> Sequence[str]:
        """Names of the classes, by index."""

    def prepare(self, attend: Any) -> bool:
        """Draws whatever pictures come before those with `attend` take as long as all later ones: timing begins after it.

        True: `finish` draws them without calling it (all blocks run as one), so that what watches its calls, such as a stopwatch
        around it, gets pictures of its own, drawn otherwise.
        """
        return False

    # What a model may know of its own quality; these answers do where nothing was measured.

    def required(self, preset: str) -> Mapping[str, float]:
        """What a preset asks of this model, by metric; raises ValueError for one it has no bounds of."""
        if preset not in BOUNDS:
            raise ValueError(f"{self.model.slug}: no yardstick says what {preset} is; give --quality {' or '.join(BOUNDS)}, "
                             "or a bound of your own such as --min psnr=30")  # fmt: skip
        return BOUNDS[preset]

    def class_levels(self) -> Sequence[float]:
        """PSNR (dB) by class of one known damage: how hard each class is, known before any trial; zeros if unknown."""
        return (0.0,) * self.num_classes

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        """(name, mean PSNR dB, mean SSIM) of known damages, measured once per weights; empty if never measured."""
        return ()


def lacks(found: Any) -> str | None:
    """What `found` has not that every adapter has: half a line, or None."""
    wanted = [
        name for name in Adapter.__annotations__ if name not in ("steps", "prompts", "picture_path") and not hasattr(found, name)
    ]
    wanted += [
        name
        for name in ("start", "finish", "classes", "required", "class_levels", "yardsticks")
        if not callable(getattr(found, name, None))
    ]
    if wanted:
        return f"got a {type(found).__name__} without {wanted[0]}, want an adapter (sparvar_tune.adapters.protocol)"
    return None


def why_not_adapter(found: Any) -> str | None:
    """Why `found` is no adapter of a model of one's own, by its attributes alone: half a line, or None."""
    missing = lacks(found)
    if missing:
        return missing
    model, schedule = found.model, found.schedule
    if not isinstance(model, Model):
        return f"model is a {type(model).__name__}, want a row of catalog.models.own_model"
    if model != models.MODELS.get(model.slug, model) or not re.fullmatch(models.SLUG, model.slug):
        return f"model name {model.slug[:80]!r}: that of another model, or no name of a file; make the row with own_model"
    if schedule not in [s for known in model.resolutions.values() for s in known.values()]:
        return "schedule is none of its model row's"
    for name in ("softmax_scale", "temperature"):
        if not _is_number(getattr(found, name)):
            return f"{name} is {str(getattr(found, name))[:40]}, want a number"
    if found.softmax_scale != model.softmax_scale or found.logit_bound != model.logit_bound:
        return "softmax_scale or logit_bound differ from its model row's"
    if found.logit_bound is not None and not (_is_number(found.logit_bound) and found.logit_bound > 0):
        return f"logit_bound is {str(found.logit_bound)[:40]}, want a number above 0 or None"
    if not isinstance(found.weights_sha256, str) or not re.fullmatch("[0-9a-f]{64}", found.weights_sha256):
        return "weights_sha256: want 64 hex digits, such as adapters.weights.weights_sha256(model)"
    names, count = found.classes(), found.num_classes
    if not isinstance(count, int) or count < 1 or len(names) != count or not all(isinstance(n, str) for n in names):
        return f"num_classes is {str(count)[:40]} and classes() are {len(names)}, want as many names, at least one"
    if not isinstance(found.device, str) or not re.fullmatch("cpu|cuda(:[0-9]+)?", found.device):
        return f"device is {str(found.device)[:40]!r}, want 'cpu' or 'cuda'"
    if not callable(found.dense) or getattr(found.dense, "skip_scales", None) != ():
        return "dense: want a callable dense(q, k, v, layer, scale_index) with skip_scales of ()"
    if not isinstance(found.dense_name, str) or not found.dense_name:
        return "dense_name: want words for the baseline"
    return None


def _is_number(found: Any) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)


@dataclass(frozen=True)
class Parts:
    """A live model, taken apart: what of it attention needs. The modules are the model's own, not copies.

    blocks, attentions: one per layer, in the order in which they run.
    logit_bound: no |logit| is above it, by the code and the weights at hand (a learned factor); None when nothing bounds them.
    schedule: the grids of every image; None where each call brings its own (Infinity: `scale_schedule`).
    """

    family: str
    model: Any
    blocks: tuple[Any, ...]
    attentions: tuple[Any, ...]
    heads: int
    head_dim: int
    softmax_scale: float
    logit_bound: float | None
    schedule: ScaleSchedule | None

    @property
    def layers(self) -> int:
        return len(self.attentions)

    @property
    def on_gpu(self) -> bool:
        first = next(iter(self.attentions[0].parameters()), None)
        return first is not None and first.is_cuda


class Undoable(Protocol):
    """A change to a live model; `undo` takes it back, in any order with others, and may be called twice."""

    def undo(self) -> None: ...


class Family(Protocol):
    """One kind of live model; see the module docstring."""

    def why_not(self, model: Any) -> str | None:
        """Why `model` is not of this family, in half a line, or None. Looks at attributes and signatures only."""

    def parts(self, model: Any) -> Parts:
        """The parts of a model for which `why_not` found nothing."""

    attach: Callable[[Parts, SparseAttention], Undoable]
    """Makes the model use sparse attention; raises ValueError when the two do not fit."""

    # STEPS: what does each kind of generation step that it can do (sparvar_tune/generation), as a function of the parts, whose
    # schedule is the policy's, and the step, which returns an Undoable. A family without it can do none.
