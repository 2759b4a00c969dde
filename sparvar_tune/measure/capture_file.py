"""Q, K, V of one dense generation in one safetensors file, written call by call, and read back call by call.

Every shape is known beforehand, so the header goes first and each tensor to its place as it comes: memory holds one call. The
file appears under its name when it is whole. Tensors are `LAYER.SCALE.q` (and k, v), [B, H, N, D] in the model's dtype.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparvar_kernels.geometry.problem import DTYPES
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.catalog.models import Model
from sparvar_tune.profile.store import require_writable

Call = tuple[Tensor, Tensor, Tensor]
NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # safetensors'
SPARE = 64 << 20  # bytes of a disk that are left alone


def capture_bytes(model: Model, schedule: ScaleSchedule, scales: Sequence[int]) -> int:
    """How large the tensors of a capture are."""
    tokens = sum(schedule.num_queries(s) + 2 * schedule.num_keys(s) for s in scales)
    return tokens * model.layers * model.guidance_batch * model.heads * model.head_dim * DTYPES[model.dtype].itemsize


def why_not_room(path: Path, wanted: int) -> str | None:
    """Why a file of so many bytes cannot be written there, or None."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"{folder}: no such folder; make it, or give another with --out"
    free = shutil.disk_usage(folder).free
    if free < wanted + SPARE:
        return (
            f"{path}: it takes {wanted / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; give fewer scales, or another folder"
        )
    return None


class CaptureWriter:
    """Dense attention whose calls at `scales` go to the file `path`; a context manager, inside of which one image is drawn.

    Raises ValueError: no room, a call that is none of the schedule's or comes twice, an image that ended before the last call.
    """

    skip_scales: tuple[int, ...] = ()

    def __init__(
        self, path: Path, inner: Any, model: Model, schedule: ScaleSchedule, scales: Sequence[int], **about: Any
    ) -> None:
        self.path, self.inner, self.dtype = path, inner, DTYPES[model.dtype]
        require_writable(path)
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        reason = why_not_room(path, capture_bytes(model, schedule, scales))
        if reason:
            raise ValueError(reason)
        self.scales, self.places = tuple(scales), dict[str, tuple[int, tuple[int, ...]]]()
        head: dict[str, Any] = {"__metadata__": {
            "model": model.slug, "grids": json.dumps(schedule.grids), "prefix": str(schedule.prefix),
            "scales": json.dumps(self.scales), "layers": str(model.layers), **{name: str(value) for name, value in about.items()},
        }}  # fmt: skip
        end = 0
        for s in self.scales:
            for layer in range(model.layers):
                for name, tokens in (("q", schedule.num_queries(s)), ("k", schedule.num_keys(s)), ("v", schedule.num_keys(s))):
                    shape = (model.guidance_batch, model.heads, tokens, model.head_dim)
                    size = torch.Size(shape).numel() * self.dtype.itemsize
                    offsets, end = [end, end + size], end + size
                    self.places[f"{layer}.{s}.{name}"] = offsets[0], shape
                    head[f"{layer}.{s}.{name}"] = {"dtype": NAMES[model.dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(head).encode()
        self.header = struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8)
        self.size = len(self.header) + end

    def __enter__(self) -> CaptureWriter:
        handle, self.partial = tempfile.mkstemp(dir=self.path.absolute().parent, prefix=f".{self.path.name}.")
        self.file, self.missing = os.fdopen(handle, "wb"), set(self.places)
        self.file.write(self.header)
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        if scale_index in self.scales:
            for name, t in (("q", q), ("k", k), ("v", v)):
                self._write(f"{layer}.{scale_index}.{name}", t)
        out: Tensor = self.inner(q, k, v, layer, scale_index)
        return out

    def _write(self, name: str, t: Tensor) -> None:
        if name not in self.missing:
            raise ValueError(f"capture: {name} came twice, or is none of the model's; draw one image")
        start, shape = self.places[name]
        if tuple(t.shape) != shape or t.dtype != self.dtype:
            raise ValueError(f"capture: {name} is {list(t.shape)} {t.dtype}, want {list(shape)} {self.dtype}")
        self.file.seek(len(self.header) + start)
        self.file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.missing.remove(name)

    def __exit__(self, kind: Any, *_error: object) -> None:
        try:
            if kind is None and self.missing:
                raise ValueError(f"capture: the image ended without {min(self.missing)} and {len(self.missing) - 1} others")
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                os.chmod(self.partial, 0o644)
                os.replace(self.partial, self.path)
        finally:
            self.file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.partial)


class CaptureFile(Mapping[tuple[int, int], Call]):
    """The calls of a capture's file by (layer, scale index), each read when it is asked for. Raises ValueError for another file.

    about: what the file says of itself, as text: model, grids, prefix, scales, layers, and what the writer was given.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path}: no capture (no plain file)")
        try:
            with safe_open(self.path, "pt") as file:
                self.about: dict[str, str] = dict(file.metadata() or {})
                names = set(file.keys())
            scales, layers = json.loads(self.about["scales"]), int(self.about["layers"])
            self.calls = [(layer, int(s)) for s in scales for layer in range(layers)]
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: no capture ({type(error).__name__})") from None
        if names != {f"{layer}.{s}.{name}" for layer, s in self.calls for name in "qkv"}:
            raise ValueError(f"{path}: no capture; its tensors are not those that its header names")

    def __getitem__(self, at: tuple[int, int]) -> Call:
        if at not in self.calls:
            raise KeyError(at)
        with safe_open(self.path, "pt") as file:
            q, k, v = (file.get_tensor(f"{at[0]}.{at[1]}.{name}") for name in "qkv")
        return q, k, v

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)
