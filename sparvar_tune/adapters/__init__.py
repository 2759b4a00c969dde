"""How a model is driven: one small file per model, chosen by the `adapter` field of the model table.

An adapter is all that tuning and the runtime know of a model; Infinity, HART and VAR get theirs as files beside
pocketvar's, and one row here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.catalog.models import Model

ADAPTERS = {"pocketvar": "sparvar_tune.adapters.pocketvar"}

Pair = tuple[int, int]  # (class or prompt index, noise seed): everything that names one picture


class Adapter(Protocol):
    """One live model. A `state` is a generation stopped before some scale; it can be finished many times over."""

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

    def start(self, pair: Pair, until: int) -> Any:
        """State of the dense generation of `pair` before scale `until`."""

    def finish(self, state: Any, attend: Any, redraw_from: int | None = None) -> Tensor:
        """Picture [1, 3, H, W] in 0..1 from `state` on with `attend`; other noise from scale `redraw_from` on."""

    def classes(self) -> Sequence[str]:
        """Names of the classes, by index."""

    def required(self, preset: str) -> tuple[float, float]:
        """(PSNR dB, SSIM) a preset asks of this model; raises ValueError for an unknown one."""

    def class_levels(self) -> Sequence[float]:
        """PSNR (dB) by class of one known damage: how hard each class is, known before any trial; zeros if unknown."""

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        """(name, mean PSNR dB, mean SSIM) of known damages, measured once per weights; empty if never measured."""


def load_adapter(model: Model, device: str) -> Adapter:
    """The live model behind a row of the model table; raises ValueError if none can be run here."""
    if model.adapter is None:
        raise ValueError(f"model {model.slug}: no adapter yet, so it cannot be run; its shapes can still be tuned by prediction")
    return importlib.import_module(ADAPTERS[model.adapter]).open_model(model, device)


def apply(model: Any, attend: SparseAttention) -> Any:
    """Makes `model` use `attend`; returns an object with `undo()`. Raises ValueError for a model no adapter knows."""
    for module in map(importlib.import_module, ADAPTERS.values()):
        if module.recognises(model):
            return module.attach(model, attend)
    raise ValueError(f"model of type {type(model).__name__}: no adapter knows it; known: {', '.join(ADAPTERS)}")
