"""What this machine can do: one line a thing, and for what is wrong the command that mends it. The command `doctor`.

Nothing is imported before it is looked at, so that a torch that does not load is a line and no traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparvar_tune.catalog.names import words_of

OK, MISSING, WRONG = "ok", "missing", "wrong"
OLDEST_PYTHON, OLDEST_TORCH, OLDEST_TRITON = (3, 10), (2, 9), (3, 5)
ROOM_BYTES = 1 << 30  # binaries and trials of a long search
EMOJIVAR = "sparvar-tune-emojivar"
# Extra of pyproject.toml -> its packages and what they give.
EXTRAS = {
    "gpu": (("triton", "nvidia-ml-py"), "kernels on NVIDIA GPUs; clocks and power beside their times"),
    "flash3": (("fa3-fwd",), "FlashAttention-3 for bf16 dense passes on Hopper"),
    "profile": (("nvtx",), "named ranges in Nsight's timelines"),
    "monitor": (("prometheus-client", "opentelemetry-api"), "what a server runs, told to Prometheus or OpenTelemetry"),
    "report": (("matplotlib", "jinja2", "scipy"), "sparvar-tune report, and the sampler study"),
    "storage": (("psycopg", "pymysql", "sqlalchemy"), "trials that machines share through PostgreSQL or MySQL"),
    "preference": (("transformers",), "HPSv2 among the metrics, by weights of yours"),
    "emojivar": ((EMOJIVAR,), "the weights of emojivar, which a checkout has"),
    "completion": (("argcomplete",), "Tab completes commands, options, models and GPUs"),
}


@dataclass(frozen=True)
class Seen:
    """One thing looked at. state: "ok"; "missing": nothing needs it here; "wrong": `mend` is the command that mends it."""

    name: str
    state: str
    text: str
    mend: str | None = None

    @property
    def words(self) -> str:
        todo = f"; mend: {self.mend}" if self.mend else ""
        return f"{self.state if self.state != WRONG else 'WRONG':8} {self.name}: {self.text}{todo}"


def look() -> Iterator[Seen]:
    """Everything, in the order in which one thing needs another."""
    yield python()
    yield packages()
    torch = _torch()
    if isinstance(torch, Seen):  # the others ask torch
        yield torch
        return
    yield Seen("torch", OK, _torch_text(torch))
    yield gpu(torch)
    yield triton(torch.cuda.is_available())
    if torch.cuda.is_available():
        yield compiler()
    yield from profiles(torch.cuda.is_available())
    yield own_folder()
    if torch.cuda.is_available():
        yield triton_cache()
    yield from extras()


def python() -> Seen:
    text = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= OLDEST_PYTHON:
        return Seen("python", OK, text)
    return Seen("python", WRONG, f"{text}, want 3.10 or newer", "python3.12 -m venv .venv")


def packages() -> Seen:
    """What an install without extras brings."""
    try:
        wanted = [r for r in importlib.metadata.requires("sparvar-tune") or () if "extra ==" not in r]
        text = f"sparvar-tune {importlib.metadata.version('sparvar-tune')}"
    except importlib.metadata.PackageNotFoundError:
        return Seen("packages", MISSING, "a checkout that is not installed", "pip install -c constraints.txt -e .")
    names = [found[0] for r in wanted if (found := re.match(r"[A-Za-z0-9._-]+", r))]
    missing = [name for name in names if version_of(name) is None]
    if missing:
        return Seen("packages", WRONG, f"{text} lacks {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Seen("packages", OK, f"{text} and the {len(names)} packages it needs")


def _torch() -> Any:
    """The module, or what is wrong with it."""
    want = "pip install 'torch>=2.9'"
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:  # a library it is linked with is missing, most of the time
        return Seen("torch", WRONG, f"cannot be imported: {words_of(error, 200)}", want)
    if _numbers(torch.__version__) < OLDEST_TORCH:
        return Seen("torch", WRONG, f"{torch.__version__}, want 2.9 or newer", want)
    return torch


def _torch_text(torch: Any) -> str:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return f"{torch.__version__}, {build}, {torch.get_num_threads()} CPU threads"


def gpu(torch: Any) -> Seen:
    """Which GPU there is; one that torch cannot use is wrong, none at all is not."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        if not has_nvidia_driver():
            return Seen("gpu", MISSING, "no NVIDIA GPU: models run on this CPU, other GPUs' profiles can be predicted")
        if torch.version.cuda is None:
            return Seen("gpu", WRONG, "there is an NVIDIA driver, but this torch is a CPU build",
                        "pip install --force-reinstall torch (from PyPI or PyTorch's CUDA index)")  # fmt: skip
        why = words_of(said[-1].message, 200) if said else "it may be too old for this torch, or hide its devices"
        return Seen("gpu", WRONG, f"there is an NVIDIA driver, but torch cannot use it: {why}", "nvidia-smi")
    from sparvar_tune.catalog.gpus import UNLISTED, device_row

    row = device_row()
    assert row is not None and row.capability is not None
    what = f"{torch.cuda.get_device_name()}, capability {row.capability[0]}.{row.capability[1]}, {row.sms} SMs"
    if row.capability < (8, 0):
        return Seen("gpu", WRONG, f"{what}: the kernels want 8.0 or newer", "sparvar-tune --gpu cpu --model pocketvar")
    listed = "in no row of the table, the nearest silicon lends its profiles" if row.slug == UNLISTED else row.slug
    return Seen("gpu", OK, f"{what} ({listed})")


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def triton(needed: bool) -> Seen:
    version, mend = version_of("triton"), "pip install 'sparvar-tune[gpu]'"
    if version is None:
        return Seen("triton", WRONG if needed else MISSING, "not installed; the kernels of a GPU are written in it", mend)
    if _numbers(version) < OLDEST_TRITON:
        return Seen("triton", WRONG if needed else MISSING, f"{version}, want 3.5 or newer", mend)
    return Seen("triton", OK, version + ("" if needed else ", which nothing runs on here"))


def compiler() -> Seen:
    """Triton builds the launcher of its kernels with it."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if found:
        return Seen("C compiler", OK, found)
    return Seen("C compiler", WRONG, "none; Triton builds what launches its kernels with one", "apt-get install gcc")


def profiles(on_gpu: bool) -> Iterator[Seen]:
    """Which models have a profile that would run here, at the default size."""
    from sparvar_tune.catalog.models import MODELS
    from sparvar_tune.catalog.names import PRESETS
    from sparvar_tune.runtime import load_profile

    found, none = [], []
    for model in MODELS:
        for quality in PRESETS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what they say is in the reasons
                    tuned = load_profile(model, preset=quality)
            except ValueError as error:  # a damaged file
                yield Seen("profiles", WRONG, words_of(error, 300), f"sparvar-tune --model {model}")
                continue
            if tuned.profile is not None:
                found.append(f"{model}{'' if quality == PRESETS[0] else ' ' + quality}")
            elif quality == PRESETS[0]:
                none.append(model)
    if found:
        yield Seen("profiles", OK, f"{', '.join(found)} (sparvar-tune explain --model M says more)")
    if none:
        todo = "sparvar-tune --model M" if on_gpu else None  # a CPU tunes only what it can draw
        yield Seen("no profile", MISSING, f"{', '.join(none)} would run dense here", todo)


def own_folder() -> Seen:
    from sparvar_tune.profile.store import NoHome, user_folder

    mend = "export SPARVAR_TUNE_HOME=/a/folder/you/may/write"
    try:
        folder = user_folder()
    except NoHome as error:
        return Seen("folder", WRONG, str(error), mend)
    kept = (folder.parent, folder, folder.parent / "runs")
    seen = [writable("folder", one, "your profiles, trials and what verify finds", mend) for one in kept]
    return next((one for one in seen if one.state != OK), seen[0])


def triton_cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    home = os.environ.get("TRITON_HOME") or "~"
    return Path(os.environ.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache").expanduser()


def triton_cache() -> Seen:
    return writable(
        "Triton's cache", triton_cache_folder(), "compiled kernels", "export TRITON_CACHE_DIR=/a/folder/you/may/write"
    )


def writable(name: str, folder: Path, what: str, mend: str) -> Seen:
    """Whether files can be made there, or the folder where it does not exist yet; makes nothing."""
    there = next(p for p in (folder, *folder.parents) if p.exists() or p == p.parent)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Seen(name, WRONG, f"{folder} cannot be written, it is for {what}", mend)
    free = shutil.disk_usage(there).free
    if free < ROOM_BYTES:
        return Seen(name, WRONG, f"{folder} has {free / 2**20:.0f} MiB free, want 1024, for {what}", mend)
    return Seen(name, OK, f"{folder} for {what}")


def extras() -> Iterator[Seen]:
    """The optional packages."""
    for extra, (names, gives) in EXTRAS.items():
        missing = [name for name in names if not is_here(name)]
        if missing:
            yield Seen(f"extra {extra}", MISSING, f"{gives} (lacks {', '.join(missing)})", f"pip install 'sparvar-tune[{extra}]'")
        else:
            yield Seen(f"extra {extra}", OK, gives)


def is_here(package: str) -> bool:
    """Whether an optional package is installed; of emojivar's weights whether they are where the model looks for them."""
    if package == EMOJIVAR:
        from sparvar_tune.emojivar.installed import place

        return place("emojivar.safetensors").is_file()
    return version_of(package) is not None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:2])
