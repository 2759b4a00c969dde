"""Compiling many binaries beside one another: most of a compilation is a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def compile_ahead(builds: Iterable[Any], device: torch.device) -> None:
    """Puts every binary (`backends.triton.binary.Build`) for this GPU into Triton's cache, where its first call finds it."""
    from sparvar_kernels.backends.triton import binary

    capability = torch.cuda.get_device_capability(device)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda build: binary.compile_for(build, capability), dict.fromkeys(builds)))
