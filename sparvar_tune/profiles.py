"""Profile files `profiles/<gpu>/<model>.json`: reading, writing in one step, and finding the one for a machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sparvar_kernels.registry import KERNELS, kernel_for
from sparvar_tune.gpus import Gpu
from sparvar_tune.json_reader import ReadError
from sparvar_tune.models import find_model
from sparvar_tune.names import DEFAULT_PRESET
from sparvar_tune.schema import Profile, ProfileError, Versions, from_json, one_line, plain, read, to_json

MAX_BYTES = 1 << 20


def load(path: Path) -> Profile:
    """The profile in the file. Raises ProfileError: unreadable, over 1 MiB, not UTF-8, not a profile, newer schema."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise ProfileError(f"{path}: over {MAX_BYTES} bytes, no profile is; restore the file or tune again")
    try:
        return from_json(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not UTF-8 (byte {error.start}); restore the file or tune again") from None


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
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ProfileError(f"{path}: cannot be written ({reason}); give another folder with --out") from None
    finally:  # also when interrupted
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def profile_name(model: str, preset: str, resolution: str, aspect: str, default: tuple[str, str]) -> str:
    """File name of a workload; what is the model's default (resolution, aspect) or preset is left out."""
    parts = [model]
    if (resolution, aspect) != default:
        parts += [resolution, aspect]
    if preset != DEFAULT_PRESET:
        parts.append(preset)
    return "--".join(parts) + ".json"


def shipped_folder() -> Path:
    """The profiles that came with the package: `_profiles` in a wheel, `profiles` in a checkout."""
    here = Path(__file__).resolve().parent
    packed = here / "_profiles"
    return packed if packed.is_dir() else here.parent / "profiles"


def user_folder() -> Path:
    """Where this user's own profiles go: $SPARVAR_TUNE_HOME/profiles, else the platform's data folder."""
    home = os.environ.get("SPARVAR_TUNE_HOME")
    if home:
        return Path(home) / "profiles"
    data = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(data):  # a relative one is to be ignored, its specification says
        return Path(data) / "sparvar-tune" / "profiles"
    try:
        return Path.home() / ".local" / "share" / "sparvar-tune" / "profiles"
    except RuntimeError:  # a container's user without a home
        raise ProfileError("this user has no home folder: set SPARVAR_TUNE_HOME to a folder for profiles") from None


@dataclass(frozen=True)
class Match:
    """A profile found; `reason` says how it was matched ("exact silicon", or which relative's it is)."""

    profile: Profile
    path: Path
    exact: bool
    reason: str


@dataclass(frozen=True)
class Miss:
    """No profile, and where it was looked for."""

    reason: str


def find(name: str, gpu: Gpu, relatives: tuple[Gpu, ...], folders: tuple[Path, ...]) -> Match | Miss:
    """The profile `name` for `gpu`: its own first, then one of the same family.

    Raises ProfileError for a bad file, and for one that is in another's place: what a file says it was tuned for must
    be what its folder and name say, or a copied file would pass as exact silicon.
    """
    looked = []
    for silicon in (gpu, *relatives):
        for folder in folders:
            path = folder / silicon.slug / name
            looked.append(str(path.parent))
            if not _exists(path):
                continue
            profile = _load_for(path, silicon)
            if silicon.slug == gpu.slug:
                return Match(profile, path, True, f"exact silicon ({gpu.slug})")
            return Match(profile, path, False, f"same family ({silicon.slug} for {gpu.slug}, {gpu.family})")
    return Miss(f"no {name} for {gpu.slug} or its family ({gpu.family}); looked in {', '.join(looked)}")


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None
    return True


def _load_for(path: Path, gpu: Gpu) -> Profile:
    profile = load(path)
    w = profile.workload
    if profile.silicon.gpu != gpu.slug:
        raise ProfileError(f"{path}: tuned for {profile.silicon.gpu}, but in the folder of {gpu.slug}; move it or tune again")
    try:
        model = find_model(w.model)
    except ValueError as error:
        raise ProfileError(f"{path}: {one_line(str(error))}") from None
    name = profile_name(w.model, profile.preset, w.resolution, w.aspect, (model.default_resolution, model.default_aspect))
    if path.name != name:
        raise ProfileError(f"{path}: by what it holds its name is {one_line(name)}; rename it or tune again")
    return profile


def mismatch(
    profile: Profile, *, gpu: Gpu, versions: Versions, kernel_hash: str, weights_sha256: str | None = None
) -> list[str]:  # fmt: skip
    """How this machine differs from the one the profile was tuned on, gravest first; weights None are not compared."""
    was, out = profile.versions, []
    if profile.silicon.gpu != gpu.slug:
        out.append(f"tuned for other silicon ({profile.silicon.gpu}, here {gpu.slug})")
    if profile.kernel_hash != kernel_hash:
        out.append("tuned with other kernel sources")
    if None not in (weights_sha256, profile.workload.weights_sha256) and weights_sha256 != profile.workload.weights_sha256:
        out.append("certified on other weights of this model")
    for name, there, here in (("torch", was.torch, versions.torch), ("triton", was.triton, versions.triton)):
        if there != here:
            out.append(f"tuned with {name} {there or '(none)'}, here {here or '(none)'}")
    return out


def kernel_hash(gpu: Gpu) -> str:
    """sha256 over the sources that decide what is computed on `gpu` and how fast.

    That is every module of sparvar_kernels but the oracle and what only the kernels of other devices run.
    """
    import sparvar_kernels

    here = kernel_for(gpu.device)
    others = {"reference"}.union(*(k.own for k in KERNELS.values() if k.name != here))
    digest = hashlib.sha256()
    for path in sorted(Path(sparvar_kernels.__file__).parent.glob("*.py")):
        if path.stem not in others:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
