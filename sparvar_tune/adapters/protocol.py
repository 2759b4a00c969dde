"""What tuning and the runtime know of a model.

Two halves. `Adapter` drives a model that tuning draws pictures with; `Family` knows a live model that somebody else built and
drives: it recognises it, puts sparse attention into it and takes it out again. A family is a module (or any object) with the
functions of `Family`; `registry.py` lists them, and the entry points `sparvar_tune.adapters` add others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.catalog.models import Model
from sparvar_tune.generation import SkipScales

BOUNDS = {
    "paper": {"psnr": 29.48, "ssim": 0.92},  # its CS4A + CSLA on Infinity-8B, its table 1
    "fast": {"psnr": 27.0, "ssim": 0.88},  # a draft: what is where stays, fine texture does not
}

Pair = tuple[int, int]  # (class or prompt index, noise seed): everything that names one picture


class Adapter(Protocol):
    """One live model; derive from it or not. A `state` is a generation stopped before some scale, to be finished many times."""

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
    steps: Collection[str] = (SkipScales.kind,)  # kinds of generation steps that `finish` does where `attend` has them

    def start(self, pair: Pair, until: int) -> Any:
        """State of the dense generation of `pair` before scale `until`."""

    def finish(self, state: Any, attend: Any, redraw_from: int | None = None) -> Tensor:
        """Picture [1, 3, H, W] in 0..1 from `state` on with `attend`; other noise from scale `redraw_from` on.

        `attend.skip_scales` are left out; `attend.policy.steps` says what else the generation does otherwise."""

    def classes(self) -> Sequence[str]:
        """Names of the classes, by index."""

    # What a model may know of its own quality; these answers do where nothing was measured.

    def required(self, preset: str) -> Mapping[str, float]:
        """What a preset asks of this model, by metric; raises ValueError for one it has no bounds of."""
        if preset not in BOUNDS:
            raise ValueError(f"{self.model.slug}: no yardstick says what {preset} is; want one of {', '.join(BOUNDS)}")
        return BOUNDS[preset]

    def class_levels(self) -> Sequence[float]:
        """PSNR (dB) by class of one known damage: how hard each class is, known before any trial; zeros if unknown."""
        return (0.0,) * self.num_classes

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        """(name, mean PSNR dB, mean SSIM) of known damages, measured once per weights; empty if never measured."""
        return ()


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
