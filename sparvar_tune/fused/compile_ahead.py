"""Making many binaries ready beside one another: compiling and what links their launches are mostly processes of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def compile_ahead(builds: Iterable[Any], device: torch.device) -> None:
    """Makes the launcher of every binary (`backends.triton.binary.Build`), where its first call finds it."""
    from sparvar_kernels.backends.triton.binary import launcher

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda build: launcher(build, device), dict.fromkeys(builds)))


def read_triton() -> None:
    """Begins to read Triton's own files, whose hash is part of every key of its cache: 0.4 s that need no lock of Python's."""
    threading.Thread(target=_read_triton, daemon=True).start()


def _read_triton() -> None:
    from triton.runtime import cache

    getattr(cache, "triton_key", lambda: None)()
