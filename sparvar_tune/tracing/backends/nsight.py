"""Nsight Systems and Nsight Compute: they run our own command with NVTX ranges under them. Here are their command lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sparvar_tune.tracing.backends.nvtx import DOMAIN
from sparvar_tune.tracing.ranges import OUTER

OURS = "regex:gathered|fetched|mass|select"  # the kernels of this package; a picture has thousands of others


def nsys(stem: Path, words: Sequence[str]) -> list[str]:
    """The timeline: every kernel, also those of a CUDA graph one by one, under the ranges it was launched or captured in."""
    return ["nsys", "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", f"--nvtx-domain-include={DOMAIN}",
            "--sample=none", "--force-overwrite=true", f"--output={stem}", *_ours(words)]  # fmt: skip


def ncu(stem: Path, words: Sequence[str]) -> list[str]:
    """Every counter of our kernels inside the traced run, none of the warm-up's."""
    return ["ncu", "--nvtx", f"--nvtx-include={DOMAIN}@{OUTER}/", f"--kernel-name={OURS}", "--set=full", "--force-overwrite",
            f"--export={stem}", *_ours(words)]  # fmt: skip


def _ours(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "sparvar_tune", *words]


TOOLS: dict[str, Callable[[Path, Sequence[str]], list[str]]] = {"nsys": nsys, "ncu": ncu}
WRITES = {"nsys": "nsys-rep", "ncu": "ncu-rep"}
