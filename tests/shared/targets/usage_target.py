"""Compiles as the tuner's compilers do and reads what a binary takes, without its instructions: listing them costs as much time
as a third of compiling.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from sparvar_tune.launch_search.compiling import Binary, Compiled, compile_all, compile_payload
from sparvar_tune.launch_search.process_pool import Pool


def usage_of(payload: dict) -> dict:
    import triton

    from sparvar_kernels.backends.triton import binary

    def usage_alone(made) -> binary.Resources:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        (where,) = (p for name, p in made.metadata_group.items() if name.endswith(".cubin"))
        text = subprocess.run([tool, "--dump-resource-usage", where], capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        return binary.Resources(found["REG"], int(made.metadata.shared), found["STACK"] + found["LOCAL"], "not read")

    binary.resources = usage_alone  # in this process alone
    return compile_payload(payload)


def usage(jobs: Iterable[Binary]) -> dict[Binary, Compiled]:
    """What each distinct binary takes; `code` says that the instructions were not read."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Pool("usage_target:usage_of", [environment] * 2) as pool:
        return compile_all(jobs, pool, lambda text: None)


def plain(made: Compiled) -> dict:
    """All but the instructions."""
    return {**asdict(made), "code": None}
