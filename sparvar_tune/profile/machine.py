"""What this machine is and which versions run on it: the identity a measured profile carries."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path

import torch

from sparvar_tune.catalog.gpus import GPUS, Gpu, detect_gpu, device_row, find_gpu
from sparvar_tune.profile.schema import Silicon, Versions


def choose_gpu(slug: str) -> Gpu:
    """The row of the GPU table for "auto" (this machine) or a slug; raises ValueError for an unknown one."""
    return detect_gpu() if slug == "auto" else find_gpu(slug)


def here_or_named(slug: str, device: torch.device | str | int | None = None) -> tuple[Gpu, list[str]]:
    """The silicon to find a profile for, and what to say of it: "auto" is this machine's, in the table or not.

    A GPU that is in no row is a row of its own: the nearest by capability, SMs and memory lends its profiles. One that was
    named although another is in this machine is taken at its word, with what really is here said. ValueError: an unknown name.
    """
    found = device_row(device)
    if slug == "auto":
        if found is None:
            return GPUS["cpu"], []
        return found, [] if found.slug in GPUS else [f"{found.name} is in no row of the table: nearest silicon serves"]
    gpu = find_gpu(slug)
    if gpu.slug == "cpu" or found is None or found.slug == gpu.slug:
        return gpu, []
    assert found.capability is not None
    what = f"{found.name} ({found.capability[0]}.{found.capability[1]}, {found.sms} SMs)"
    # what cannot run on what is here must not be launched, whatever was named
    return dataclasses.replace(gpu, capability=found.capability), [f"{gpu.slug} was named, but this machine's GPU is {what}"]


def is_here(gpu: Gpu) -> bool:
    """True if `gpu` is what this machine would run on (the CPU always is)."""
    if gpu.slug == "cpu":
        return True
    found = device_row()
    return found is not None and found.slug == gpu.slug


def silicon(gpu: Gpu, here: bool) -> Silicon:
    """The silicon's identity: as the driver gives it when it is here, else from the table."""
    if gpu.slug == "cpu":
        return Silicon("cpu", "cpu", _processor(), None, None, None, torch.get_num_threads())
    if here:
        p = torch.cuda.get_device_properties(0)
        return Silicon(gpu.slug, gpu.family, p.name, (p.major, p.minor), p.multi_processor_count, p.total_memory, None)
    return Silicon(gpu.slug, gpu.family, gpu.name, gpu.capability, gpu.sms, gpu.memory_bytes, None)


def device_name(here: Silicon) -> str:
    """What times measured on this silicon hold for: its name, and for a CPU how many threads it may use."""
    return here.name if here.threads is None else f"{here.name}, {here.threads} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Versions:
    own = version_of("sparvar-tune") or "checkout"
    return Versions(own, platform.python_version(), torch.__version__, version_of("triton"))
