"""How a model is driven: one small file per model family, and what they share.

protocol.py says what tuning and the runtime know of a model, registry.py which families there are. A live model that somebody
else built is recognised by attributes and signatures (structure.py), never by the module path of its class.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters.cross_attention import flash_attn_stand_in
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Adapter, Family, Pair, Parts, Undoable
from sparvar_tune.adapters.registry import FAMILIES, families, recognise
from sparvar_tune.adapters.steps import attach
from sparvar_tune.adapters.weights import weights_sha256
from sparvar_tune.adapters.whole_images import WholeImages
from sparvar_tune.catalog.gpus import check_device
from sparvar_tune.catalog.models import Model, own_model

__all__ = [
    "ADAPTERS", "FAMILIES", "Adapter", "Family", "Pair", "Parts", "Undoable", "WholeImages", "apply", "attach",
    "drop_unconditional", "families", "flash_attn_stand_in", "load_adapter", "own_model", "recognise", "skip_scales",
    "weights_sha256",
]  # fmt: skip

# models that can be opened with nothing else given
ADAPTERS = {name: f"sparvar_tune.live.{name}" for name in ("pocketvar", "emojivar")}


def load_adapter(model: Model, device: str) -> Adapter:
    """The live model behind a row of the model table; raises ValueError if none can be run here, or not on `device`."""
    if model.adapter is None:
        raise ValueError(f"model {model.slug}: no adapter opens it by its name alone; it needs its authors' code and weights: "
                         "--source CHECKOUT --weights FOLDER (docs/your-model.md)")  # fmt: skip
    return importlib.import_module(ADAPTERS[model.adapter]).open_model(model, str(check_device(device)))


def apply(model: Any, attend: SparseAttention) -> Undoable:
    """Makes `model` use `attend` and do the generation steps of its policy; `undo()` of what it returns takes it back.

    Raises ValueError, in one line, for a model that no adapter knows or that the policy does not fit."""
    return attach(*recognise(model), attend)


def drop_unconditional(model: Any, from_scale: int) -> Undos:
    """Runs only the conditional half of guidance from scale `from_scale` on; `undo()` takes it back.

    Guidance is then 1 at those scales. Raises ValueError for a model that no adapter knows or whose adapter cannot."""
    return _of(model, "drop_unconditional")(from_scale)


def skip_scales(model: Any, from_scale: int) -> Undos:
    """Leaves out the scales from `from_scale` on; `undo()` takes it back. Raises ValueError as `drop_unconditional`."""
    return _of(model, "skip_scales")(from_scale)


def _of(model: Any, name: str) -> Any:
    family, parts = recognise(model)
    if not hasattr(family, name):
        raise ValueError(f"{parts.family}: its adapter has no {name}")
    return functools.partial(getattr(family, name), parts)
