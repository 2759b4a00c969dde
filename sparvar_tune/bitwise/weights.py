"""Weight files: safetensors with the model's configuration beside the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save(model: Any, path: Path, dtype_of: Callable[[str], torch.dtype], note: Mapping[str, str]) -> None:
    """Writes the tensors of `model`, each as `dtype_of` its name, and its `config`."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().to(dtype_of(name)).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path, {"config": json.dumps(asdict(model.config)), **note})


def load(path: Path, name: str, otherwise: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of the configuration, and the tensors as float32.

    Raises FileNotFoundError or ValueError (damaged file) with what to do: `otherwise`, where there is no file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no weights; {otherwise}")
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()["config"])
            return fields, {key: file.get_tensor(key).float() for key in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a {name} weight file ({error}); reinstall the package") from None
