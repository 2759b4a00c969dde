"""Profile files `profiles/<gpu>/<model>.json`: reading, writing in one step, and finding the one for a machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from sparvar_tune.catalog.gpus import DISTANCE_LIMIT, GPUS, UNLISTED, Gpu, apart, distance, nearest_first
from sparvar_tune.catalog.models import SLUG, Model, find_model, own_model
from sparvar_tune.catalog.names import DEFAULT_PRESET
from sparvar_tune.profile import identity
from sparvar_tune.profile.files import try_folder
from sparvar_tune.profile.reader import ReadError
from sparvar_tune.profile.schema import Profile, ProfileError, Versions, Workload, from_json, one_line, plain, read, to_json

MAX_BYTES = 1 << 20


def load(path: Path) -> Profile:
    """The profile in the file. Raises ProfileError: unreadable, over 1 MiB, not UTF-8, not a profile, edited, another schema."""
    return parse(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """What the file holds. Raises ProfileError: unreadable, over 1 MiB."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ProfileError(f"{path}: no plain file (a pipe or device); give a profile's path")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}; give the path of a profile that can be read") from None
    if len(raw) > MAX_BYTES:
        raise ProfileError(f"{path}: over {MAX_BYTES} bytes, no profile is; restore the file or tune again")
    return raw


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to without waiting for somebody who does."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse(raw: bytes, path: Path, *, check_seal: bool = True) -> Profile:
    """The profile in a file's bytes; `path` is for messages. Raises ProfileError as `load` does."""
    try:
        return from_json(raw.decode("utf-8"), str(path), check_seal=check_seal)
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not UTF-8 (byte {error.start}); restore the file or tune again") from None


def seal(path: Path) -> Profile:
    """Keeps a hand edit: gives the file the checksum of what it now holds. Raises ProfileError as `load` and `save` do."""
    save(parse(read_bytes(path), path, check_seal=False), path)
    return load(path)


def save(profile: Profile, path: Path) -> None:
    """Writes the file in one step (temporary file, then rename); raises ProfileError and leaves the old file alone.

    Whatever `load` would refuse is not written.
    """
    try:
        read(plain(profile))
    except ReadError as error:
        raise ProfileError(f"{path}: not written: {one_line(str(error))}") from None
    data = to_json(profile).encode("utf-8")
    if len(data) > MAX_BYTES:
        raise ProfileError(f"{path}: not written: {len(data)} bytes, want at most {MAX_BYTES}")
    write_atomic(path, data)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` so that the file is either the old one or the whole new one. Raises ProfileError."""
    partial = None
    try:
        _require_file(path)
        target = Path(os.path.realpath(path))  # a link stays one: /dev/stdout is, and many a file of settings
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:80]}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, target)
        partial = None
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:  # also when interrupted
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def _cannot_write(path: Path, error: OSError) -> ProfileError:
    """What to do about it: of a file of this user's own folder, or of one that was named."""
    todo = "name a file in another folder"
    with contextlib.suppress(NoHome):
        if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(user_folder().parent)):
            todo = "set SPARVAR_TUNE_HOME to a folder you may write"
    return ProfileError(f"{path}: cannot be written ({error.strerror or error}); {todo}")


def require_writable(*paths: Path) -> None:
    """Fails before the work rather than after it: raises ProfileError where `write_atomic` could not write. Leaves nothing."""
    for path in paths:
        try:
            _require_file(path)
            try_folder(Path(os.path.realpath(path)).parent)  # as `write_atomic` does, past what is not there
        except OSError as error:
            raise _cannot_write(path, error) from None


def _require_file(path: Path) -> None:
    """Raises ProfileError for a folder, and for a device or pipe: a rename would put a file in its place."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(mode):
        raise ProfileError(f"{path}: is a folder; give the name of a file")
    if not stat.S_ISREG(mode):
        raise ProfileError(f"{path}: no plain file (a pipe or device); give the name of a file")


def profile_name(model: str, preset: str, resolution: str, aspect: str, default: tuple[str, str], images: int = 1) -> str:
    """File name of a workload; what is the model's default (resolution, aspect) or preset, or one image, is left out."""
    parts = [model]
    if (resolution, aspect) != default:
        parts += [resolution, aspect]
    if preset != DEFAULT_PRESET:
        parts.append(preset)
    if images != 1:
        parts.append(f"images-{images}")
    return "--".join(parts) + ".json"


def shipped_folder() -> Path:
    """The profiles that came with the package: `_profiles` in a wheel, `profiles` in a checkout."""
    here = Path(__file__).resolve().parents[1]
    packed = here / "_profiles"
    return packed if packed.is_dir() else here.parent / "profiles"


class NoHome(ProfileError):
    """This user has no folder to keep anything in."""


def user_folder() -> Path:
    """Where this user's own profiles go: $SPARVAR_TUNE_HOME/profiles, else the platform's data folder. Raises NoHome."""
    if home := os.environ.get("SPARVAR_TUNE_HOME"):
        return Path(os.path.expanduser(home)) / "profiles"
    try:
        folder = platformdirs.user_data_path("sparvar-tune", appauthor=False)
        if not folder.is_absolute():  # a relative XDG_DATA_HOME is to be ignored, its specification says
            folder = Path("~/.local/share/sparvar-tune").expanduser()
    except RuntimeError:  # a container's user without a home
        raise NoHome("this user has no home folder: set SPARVAR_TUNE_HOME to a folder for profiles") from None
    return folder / "profiles"


@dataclass(frozen=True)
class Match:
    """A profile found; `reason` says how it was matched ("exact silicon", or which relative's it is).

    sha256: of the file's bytes, by which an overlay knows it.
    """

    profile: Profile
    path: Path
    exact: bool
    reason: str
    sha256: str


@dataclass(frozen=True)
class Miss:
    """No profile, and where it was looked for."""

    reason: str


def near(gpu: Gpu) -> tuple[Gpu, ...]:
    """The other GPUs whose profiles serve `gpu`, nearest first."""
    return tuple(nearest_first(gpu, (g for g in GPUS.values() if g.slug != gpu.slug and distance(gpu, g) <= DISTANCE_LIMIT)))


def find(name: str, gpu: Gpu, relatives: tuple[Gpu, ...], folders: tuple[Path, ...]) -> Match | Miss:
    """The profile `name` for `gpu`: its own first, then those of `relatives` in their order.

    Of one silicon's the first folder's counts, but one in which nothing was measured gives way to one that was measured.
    A miss names the nearest of the other GPUs that has one, and how far off it is. Raises ProfileError for a bad file, and
    for one that is in another's place: what a file says it was tuned for must be what its folder and name say, or a copied
    file would pass as exact silicon.
    """
    looked = []
    for silicon in (gpu, *relatives):
        paths = [folder / silicon.slug / name for folder in folders]
        looked += [str(path.parent) for path in paths]
        there = (path for path in paths if exists(path))
        first = next(there, None)
        if first is None:
            continue
        path, (profile, sha256) = first, _load_for(first, silicon)
        while _guessed(profile) and (other := next(there, None)):  # a good profile stops the looking, whatever lies behind
            measured = _load_for(other, silicon)
            if not _guessed(measured[0]):
                path, (profile, sha256) = other, measured
        exact = silicon.slug == gpu.slug
        reason = f"exact silicon ({gpu.slug})"
        if not exact:
            reason = f"same family ({silicon.slug} for {_called(gpu)}, {gpu.family}, distance {distance(gpu, silicon):.2f})"
        if path != first:
            reason += f"; {first} gives way, as nothing in it was measured"
        return Match(profile, path, exact, reason, sha256)
    where = ", ".join(looked) or "no folder, as none was given"
    missing = f"no {name} for {_called(gpu)} or one like it ({gpu.family}); looked in {where}"
    return Miss(f"{missing}{_too_far(name, gpu, relatives, folders)}")


def _guessed(profile: Profile) -> bool:
    return profile.state == "predicted" and profile.policy_state != "measured"


def _called(gpu: Gpu) -> str:
    return gpu.name if gpu.slug == UNLISTED else gpu.slug


def _too_far(name: str, gpu: Gpu, relatives: tuple[Gpu, ...], folders: tuple[Path, ...]) -> str:
    """What to say of the nearest GPU that has the profile and may not lend it, or nothing."""
    others = [g for g in GPUS.values() if g.device == gpu.device and g not in (gpu, *relatives)]
    for other in nearest_first(gpu, others):
        if any(exists(folder / other.slug / name) for folder in folders):
            return f"; {other.slug} has one but is too far: {apart(gpu, other)}"
    return ""


def exists(path: Path) -> bool:
    """Whether there is a file. Raises ProfileError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None
    return True


def name_of(profile: Profile) -> str:
    """The file name that belongs to what it holds.

    Raises ValueError for a resolution or aspect that its model does not have and a name that is none of a file's, so that no
    name leads anywhere else, and for a batch that is no number of images.
    """
    w = profile.workload
    model = model_of(w)
    model.schedule(w.resolution, w.aspect)
    default = (model.default_resolution, model.default_aspect)
    return profile_name(w.model, profile.preset, w.resolution, w.aspect, default, images_of(w, model))


def model_of(workload: Workload) -> Model:
    """The row of a profile's model; of one in no table what the profile says itself. Raises ValueError for a wrong name."""
    w = workload
    try:
        return find_model(w.model)
    except ValueError:
        if not re.fullmatch(SLUG, w.model):
            raise
    return own_model(
        w.model, w.schedule, layers=w.layers, heads=w.heads, head_dim=w.head_dim, dtype=w.dtype, softmax_scale=w.softmax_scale,
        logit_bound=w.logit_bound, guidance_batch=w.batch,
    )  # fmt: skip


def row_of(name: str, folders: tuple[Path, ...]) -> Model:
    """The row of a model by name: the table's, else that of a profile of it in `folders`, of whatever GPU.

    Raises ValueError where there is neither, and ProfileError for a bad file.
    """
    try:
        return find_model(name)
    except ValueError:
        if not isinstance(name, str) or not re.fullmatch(SLUG, name):
            raise
        for path in sorted(path for folder in folders for path in folder.glob(f"*/{name}*.json")):
            if path.stem.split("--")[0] == name and path.parent.name in GPUS:
                return model_of(_load_for(path, GPUS[path.parent.name])[0].workload)
        raise


def images_of(workload: Workload, model: Model) -> int:
    """How many images at once it is for; raises ValueError where its batch is no number of the model's images."""
    images, rest = divmod(workload.batch, model.guidance_batch)
    if rest:
        raise ValueError(f"batch: got {workload.batch}, want a multiple of {model.guidance_batch}, the rows {model.slug} "
                         "has for one image")  # fmt: skip
    return images


def _load_for(path: Path, gpu: Gpu) -> tuple[Profile, str]:
    """The profile and its file's sha256, if the file is in its place."""
    raw = read_bytes(path)
    profile = parse(raw, path)
    if profile.silicon.gpu != gpu.slug:
        raise ProfileError(f"{path}: tuned for {profile.silicon.gpu}, but in the folder of {gpu.slug}; move it or tune again")
    try:
        name = name_of(profile)
    except ValueError as error:
        raise ProfileError(f"{path}: {one_line(str(error))}") from None
    if path.name != name:
        raise ProfileError(f"{path}: by what it holds its name is {one_line(name)}; rename it or tune again")
    return profile, hashlib.sha256(raw).hexdigest()


def mismatch(profile: Profile, *, gpu: Gpu, versions: Versions) -> list[str]:
    """How this machine differs from the one the profile was tuned on, gravest first. Nothing of it makes a row dense."""
    other = profile.silicon.gpu != gpu.slug
    return [f"tuned for other silicon ({profile.silicon.gpu}, here {gpu.slug})"] * other + identity.retime(profile, versions)
