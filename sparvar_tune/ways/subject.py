"""Which profile is meant: names of the tables, looked up once where they come in, and the files that belong to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparvar_tune.adapters import Adapter, load_adapter
from sparvar_tune.adapters.opening import entry_point, is_file, open_own
from sparvar_tune.adapters.protocol import why_not_adapter
from sparvar_tune.catalog import models
from sparvar_tune.catalog.gpus import GPUS, Gpu, device_row, find_gpu
from sparvar_tune.catalog.inputs import whole
from sparvar_tune.catalog.models import MAX_IMAGES, Model
from sparvar_tune.catalog.names import DEFAULT_PRESET, PRESETS, unknown_name
from sparvar_tune.live.checkouts import Place, open_checkout
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import choose_gpu, is_here
from sparvar_tune.runtime import Tuned, load_profile


@dataclass(frozen=True)
class Subject:
    """A model at a size, so many images at once, at one quality, on one GPU. asked: for which GPU, "auto" or a name.

    open: makes the adapter that draws its pictures on the GPU; None where nothing here can.
    """

    model: Model
    asked: str
    gpu: Gpu
    quality: str
    resolution: str
    aspect: str
    images: int
    open: Callable[[], Adapter] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls, model: str | Adapter, gpu: str = "auto", quality: str = DEFAULT_PRESET, resolution: str | None = None,
        aspect: str | None = None, images: int = 1, place: Callable[[Model], Place] | None = None,
    ) -> Subject:  # fmt: skip
        """By names; gpu "auto": this machine; resolution and aspect None: the model's own. Raises ValueError for unknown ones.

        model: a name of the table, FILE.py:FUNCTION, the name of an installed package's model or of one that was tuned before,
        or an adapter. place: where a table's model is opened from; gets its row.
        """
        silicon = device_row() or GPUS["cpu"] if gpu == "auto" else find_gpu(gpu)
        if not isinstance(model, str):
            silicon = _silicon_of(model, gpu, silicon)
        row, size, opener = _find(model, silicon, resolution, aspect, place)
        if quality not in PRESETS:
            raise unknown_name("quality", quality, PRESETS)
        row.schedule(*size)
        return cls(row, gpu, silicon, quality, *size, whole("images", images, 1, MAX_IMAGES), opener)

    @functools.cached_property
    def adapter(self) -> Adapter:
        """The model, opened once. Raises ValueError where it cannot be, or draws another size."""
        adapter = self.open() if self.open is not None else load_adapter(self.model, self.gpu.device)
        if adapter.schedule != self.model.schedule(self.resolution, self.aspect):
            raise ValueError(f"{self.model.slug}: its adapter draws {' ('.join(size_of(adapter))}) only; leave out resolution "
                             "and aspect")  # fmt: skip
        return adapter

    @property
    def is_here(self) -> bool:
        """Whether this machine would run on the GPU."""
        return is_here(self.gpu)

    def require_row(self) -> None:
        """Raises ValueError for this machine's GPU where it is in no row: it is lent profiles, and none is made for it."""
        choose_gpu(self.asked)

    def why_not_images(self) -> str | None:
        """Why so many images at once cannot be drawn here, or None."""
        if self.open is not None and self.images != 1:
            return f"images: got {self.images}, but {self.model.slug}'s adapter draws one image at a time; leave out images"
        return None

    def file_name(self, preset: str | None = None) -> str:
        """Of its profile, or of that of another preset."""
        default = (self.model.default_resolution, self.model.default_aspect)
        return store.profile_name(
            self.model.slug, preset or self.quality, self.resolution, self.aspect, default, self.images
        )  # fmt: skip

    def place(self, folder: Path | None, preset: str | None = None) -> Path:
        """Where its profile is below a folder of profiles, None for this user's."""
        return (folder or store.user_folder()) / self.gpu.slug / self.file_name(preset)

    def run_folder(self, preset: str | None = None) -> Path:
        """Where trials and measurements towards its profile are kept."""
        return store.user_folder().parent / "runs" / f"{self.gpu.slug}--{Path(self.file_name(preset)).stem}"

    def load(self, path: Path | None = None, quality: str | None = None) -> Tuned:
        """What `load_profile` finds for it, or makes of the file `path`. Raises as that does."""
        return load_profile(
            self.model, gpu=self.asked, preset=quality or self.quality, resolution=self.resolution, aspect=self.aspect,
            images=self.images, path=path,
        )  # fmt: skip


def _find(
    model: str | Adapter, silicon: Gpu, resolution: str | None, aspect: str | None, place: Callable[[Model], Place] | None
) -> tuple[Model, tuple[str, str], Callable[[], Adapter] | None]:  # fmt: skip
    """The row, resolution and aspect that are meant, and how the model is opened, if it can be."""
    if isinstance(model, str) and (is_file(model) or (model not in models.MODELS and entry_point(model))):
        model = open_own(model, silicon.device if is_here(silicon) else "cpu")
    if not isinstance(model, str):
        if place is not None:
            raise ValueError("--source: it is for models of the table; this one has a function of its own that opens it")
        own = size_of(model)
        return model.model, (_or(resolution, own[0]), _or(aspect, own[1])), functools.partial(_same, model)
    row = store.row_of(model, _own_profiles())
    size = _or(resolution, row.default_resolution), _or(aspect, row.default_aspect)
    if place is None:
        return row, size, functools.partial(load_adapter, row, silicon.device) if row.adapter is not None else None
    row.schedule(*size)
    found = place(row)
    made = found.row(row, *size)  # random weights have a row of their own, of this one size
    opener = functools.partial(open_checkout, found, row, size, silicon.device)
    return made, size if made is row else (made.default_resolution, made.default_aspect), opener


def _or(given: str | None, default: str) -> str:
    return default if given is None else given


def size_of(adapter: Adapter) -> tuple[str, str]:
    """Resolution and aspect, by the names of its row, that an adapter draws."""
    model = adapter.model
    if adapter.schedule == model.schedule():
        return model.default_resolution, model.default_aspect
    return next((r, a) for r, aspects in model.resolutions.items() for a, s in aspects.items() if s == adapter.schedule)


def _silicon_of(adapter: Adapter, asked: str, silicon: Gpu) -> Gpu:
    """The GPU an adapter's model is on. Raises ValueError for no adapter, and for one that is elsewhere than asked for."""
    reason = why_not_adapter(adapter)
    if reason:
        raise ValueError(f"model: {reason}; of a live model tune wants generate=... and prompts=... too")
    kind = adapter.device.split(":")[0]
    if asked == "auto" and kind == "cpu":
        return GPUS["cpu"]
    if silicon.device != kind:
        raise ValueError(f"gpu: got {silicon.slug}, but the model is on {adapter.device}; move it, or name its own")
    return silicon


def _own_profiles() -> tuple[Path, ...]:
    try:
        return (store.user_folder(),)
    except store.NoHome:
        return ()


def _same(adapter: Adapter) -> Adapter:
    return adapter


def place_of(
    source: Path | str | None, weights: Path | str | None, prompts: Path | str | Sequence[str] | None
) -> Callable[[Model], Place] | None:
    """How a row's place is found, None without a checkout. Raises ValueError for weights or prompts without one."""
    if source is None:
        for name, given in (("--weights", weights), ("--prompts", prompts)):
            if given is not None:
                raise ValueError(f"{name}: want --source CHECKOUT with it")
        return None
    return lambda row: Place.of(row, source, weights, prompts)
