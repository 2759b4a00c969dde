"""Which profile is meant: names of the tables, looked up once where they come in, and the files that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparvar_tune.catalog.gpus import GPUS, Gpu, device_row, find_gpu
from sparvar_tune.catalog.models import MAX_IMAGES, Model, find_model
from sparvar_tune.catalog.names import DEFAULT_PRESET, PRESETS, unknown_name
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import choose_gpu, is_here
from sparvar_tune.runtime import Tuned, load_profile
from sparvar_tune.ways.settings import whole


@dataclass(frozen=True)
class Subject:
    """A model at a size, so many images at once, at one quality, on one GPU. asked: for which GPU, "auto" or a name."""

    model: Model
    asked: str
    gpu: Gpu
    quality: str
    resolution: str
    aspect: str
    images: int

    @classmethod
    def of(
        cls, model: str, gpu: str = "auto", quality: str = DEFAULT_PRESET, resolution: str | None = None,
        aspect: str | None = None, images: int = 1,
    ) -> Subject:  # fmt: skip
        """By names; gpu "auto": this machine; resolution and aspect None: the model's own. Raises ValueError for unknown ones."""
        silicon, row = device_row() or GPUS["cpu"] if gpu == "auto" else find_gpu(gpu), find_model(model)
        if quality not in PRESETS:
            raise unknown_name("quality", quality, PRESETS)
        resolution, aspect = resolution or row.default_resolution, aspect or row.default_aspect
        row.schedule(resolution, aspect)
        return cls(row, gpu, silicon, quality, resolution, aspect, whole("images", images, 1, MAX_IMAGES))

    @property
    def is_here(self) -> bool:
        """Whether this machine would run on the GPU."""
        return is_here(self.gpu)

    def require_row(self) -> None:
        """Raises ValueError for this machine's GPU where it is in no row: it is lent profiles, and none is made for it."""
        choose_gpu(self.asked)

    def why_not_images(self) -> str | None:
        """Why so many images at once cannot be drawn here, or None."""
        if self.model.adapter is not None and self.images != 1:
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
            self.model.slug, gpu=self.asked, preset=quality or self.quality, resolution=self.resolution, aspect=self.aspect,
            images=self.images, path=path,
        )  # fmt: skip
