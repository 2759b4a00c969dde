"""Finding the profile for this machine and holding it against it: exact silicon, else near silicon, else dense, and why."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.inputs import PathLike, path_of, paths_of, whole
from sparvar_tune.catalog.models import MAX_IMAGES, Model
from sparvar_tune.catalog.names import CUSTOM, DEFAULT_PRESET, PRESETS, unknown_name
from sparvar_tune.profile.machine import device_name, here_or_named, is_here, silicon, versions
from sparvar_tune.profile.misses import Missed, record
from sparvar_tune.profile.schema import Profile, ProfileError, one_line
from sparvar_tune.profile.store import (
    Match,
    NoHome,
    exists,
    find,
    mismatch,
    model_of,
    name_of,
    near,
    parse,
    profile_name,
    read_bytes,
    row_of,
    shipped_folder,
    user_folder,
)  # fmt: skip
from sparvar_tune.runtime.demote import demotions, overlay_of
from sparvar_tune.runtime.tuned import Tuned

IMAGES_APART = 4  # a profile for n images at once serves n / 4 to 4 n


def load_profile(
    model: str | Model, *, gpu: str = "auto", preset: str = DEFAULT_PRESET, resolution: str | None = None,
    aspect: str | None = None, images: int = 1, path: PathLike | None = None,
    folders: Sequence[PathLike] | PathLike | None = None, record_miss: bool = False,
    device: torch.device | str | int | None = None,
) -> Tuned:  # fmt: skip
    """The profile of `model` for this machine; never raises for a missing one (everything is then dense).

    model: a name of the table, of a model of one's own that was tuned before, or a row such as `own_model` makes.
    images: how many at once; where that number has no profile, the nearest within a factor of four lends its own. path: that
    file and no other; it must be for this model and silicon. folders: where to look, in place of this user's and the shipped
    ones. device: the CUDA device it is for, the current one by default. record_miss: where there is none, keep a note in this
    user's folder for `sparvar-tune --from-misses`. Raises ValueError for an unknown model, GPU or preset or a number of images
    out of range, and ProfileError for a damaged or foreign file.
    """
    silicon_row, said = here_or_named(gpu, device)
    if preset not in (*PRESETS, CUSTOM):  # a name in no table would find no file and run dense
        raise unknown_name("preset", preset, (*PRESETS, CUSTOM))
    whole("images", images, 1, MAX_IMAGES)
    if path is not None:
        path = path_of("path", path)
        raw = read_bytes(path)
        profile = parse(raw, path)
        row = model_of(profile.workload) if profile.workload.model == model else _row(model, folders)
        if profile.workload.model != row.slug:
            raise ProfileError(f"{path}: for model {profile.workload.model}, not {row.slug}; give that model or another file")
        if profile.silicon.gpu != silicon_row.slug:
            raise ProfileError(f"{path}: for other silicon ({profile.silicon.gpu}, here {silicon_row.slug}); tune for this one")
        try:
            name_of(profile)
        except ValueError as error:
            raise ProfileError(f"{path}: {one_line(str(error))}") from None
        return prepare(profile, path, silicon_row, [*said, "file given"], hashlib.sha256(raw).hexdigest())
    row = _row(model, folders)
    row.schedule(resolution, aspect)
    resolution = row.default_resolution if resolution is None else resolution
    aspect = row.default_aspect if aspect is None else aspect
    name = profile_name(row.slug, preset, resolution, aspect, (row.default_resolution, row.default_aspect))
    where, unseen = _folders(folders, silicon_row, name)
    misses = []
    for count in near_counts(images):
        name = profile_name(row.slug, preset, resolution, aspect, (row.default_resolution, row.default_aspect), count)
        found = find(name, silicon_row, near(silicon_row), where)
        if isinstance(found, Match):
            reasons = [*said, f"the profile of {silicon_row.slug}, as named" if said and found.exact else found.reason, *unseen]
            if count != images:
                reasons.append(f"no profile for {images} images at once: that for {count} serves, its gains measured for {count}")
            return prepare(found.profile, found.path, silicon_row, reasons, found.sha256)
        misses.append(found.reason)
    if record_miss:
        try:
            record(Missed(silicon_row.slug, row.slug, preset, resolution, aspect, images))
        except ProfileError as error:  # it serves on, dense
            unseen.append(f"the miss is not recorded: {error}")
            warnings.warn(unseen[-1], stacklevel=2)
    missing = f"{misses[0]}; nor for another number of images within a factor of {IMAGES_APART}"
    return Tuned(silicon_row, None, None, (*said, missing, *unseen))


def _folders(given: Sequence[PathLike] | PathLike | None, gpu: Gpu, name: str) -> tuple[tuple[Path, ...], list[str]]:
    """Where to look, and what to say of this user's folder where it cannot be looked into: then the shipped profiles serve."""
    if given is not None:
        return _places(given), []
    try:
        own = user_folder()
        exists(own / gpu.slug / name)
    except ProfileError as error:
        return (shipped_folder(),), [f"your own profiles could not be looked at: {error}"]
    return (own, shipped_folder()), []


def _row(model: str | Model, given: Sequence[PathLike] | PathLike | None) -> Model:
    """The row of a model, also of one in no table that was tuned into one of the folders."""
    if isinstance(model, Model):
        return model
    try:
        return row_of(model, _places(given) if given is not None else (user_folder(),))
    except NoHome:
        return row_of(model, ())


def _places(given: Sequence[PathLike] | PathLike) -> tuple[Path, ...]:
    return paths_of("folders", given)


def near_counts(images: int) -> list[int]:
    """Numbers of images whose profiles serve `images`, nearest by ratio first; of two as near the smaller, which gains less."""
    counts = range(-(-images // IMAGES_APART), min(images * IMAGES_APART, MAX_IMAGES) + 1)
    return sorted(counts, key=lambda n: (max(n / images, images / n), n))


def prepare(profile: Profile, path: Path, gpu: Gpu, reasons: list[str], sha256: str) -> Tuned:
    """Holds a profile against this machine, and what verify found here, and demotes what may not win."""
    reasons = [*reasons, f"from {path}"]
    reasons += mismatch(profile, gpu=gpu, versions=versions())
    here, there = silicon(gpu, is_here(gpu)), profile.silicon
    local, said = overlay_of(path.name, gpu, sha256, profile, device_name(here))
    reasons += said
    demoted = demotions(profile, local, gpu.capability)
    if (here.name, here.threads) != (there.name, there.threads) and profile.state == "measured":
        reasons.append(f"measured on {device_name(there)}" + (f"; here {device_name(here)}" if is_here(gpu) else ""))
    if profile.state == "predicted":
        reasons.append("times are predicted, not measured; run sparvar-tune verify --write on this GPU")
    if profile.policy_state == "unverified":
        reasons.append("the policy is unverified on this model")
    if profile.state == "predicted" or profile.policy_state == "unverified":
        warnings.warn(f"{path.name}: {reasons[-1]}", stacklevel=3)
    return Tuned(gpu, profile, path, tuple(reasons), demoted, sha256, local)
