"""Compiling a Triton kernel for a target and launching it with little host work; the only file that knows Triton's insides.

A kernel is specialised on its constants and on whether its tensors are 16-byte aligned, nothing else, so a binary made
ahead of time (on a machine without the GPU, too) is the one that runs: same source, same cache entry.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALIGNMENT = 16


@dataclass(frozen=True)
class Resources:
    """What one program of a binary takes: registers a thread, shared memory and spilled (local) bytes a thread.

    code: sha256 of its instructions; two binaries that agree in all four run alike.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    code: str


def source(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], aligned: bool) -> ASTSource:
    """types: argument -> "*bf16", "i32", "fp32" of everything that is no constant. aligned: pointers and strides."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {}
    for i, name in enumerate(kernel.arg_names):
        if aligned and (signature[name].startswith("*") or name.startswith("stride_")):
            attrs[i,] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attrs)


def compile_for(made: ASTSource, capability: tuple[int, int], options: Mapping[str, int]) -> Any:
    """The binary for GPUs of `capability`; needs no GPU. Taken from Triton's cache on disk when it is there."""
    return triton.compile(made, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=dict(options))


def resources(binary: Any) -> Resources:
    """Read from the machine code, so no GPU is needed."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    where = next(Path(p) for name, p in binary.metadata_group.items() if name.endswith(".cubin"))
    call: list[str | Path] = [tool, "--dump-resource-usage", "--dump-sass", where]
    text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    code = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("/*"))
    return Resources(
        found["REG"], int(binary.metadata.shared), found["STACK"] + found["LOCAL"], hashlib.sha256(code.encode()).hexdigest()
    )


class Launcher:
    """One binary on one device: `launcher(grid, *arguments)`, with pointers as integers and constants in their places.

    In Triton's interpreter tensors must be given instead of pointers; `pointer` does what is right.
    """

    def __init__(
        self, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, int], aligned: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.kernel = kernel
        self.tail = tuple(constants.values())
        if kernel.arg_names[-len(constants) :] != list(constants):
            raise AssertionError(f"{kernel.__name__}: constants must come last, in order")
        if INTERPRETED:
            return
        binary = compile_for(source(kernel, types, constants, aligned), torch.cuda.get_device_capability(device), options)
        binary._init_handles()
        self.run, self.function, self.packed = binary.run, binary.function, binary.packed_metadata
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        self.stream = torch._C._cuda_getCurrentRawStream

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        if INTERPRETED:
            self.kernel[grid](*arguments, *self.tail)
            return
        self.run(*grid, self.stream(self.index), self.function, self.packed, None, None, None, *arguments, *self.tail)


def pointer(t: torch.Tensor) -> Any:
    """The tensor as a launch argument."""
    return t if INTERPRETED else t.data_ptr()


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


@lru_cache(maxsize=512)
def _launcher(
    kernel: Any, types: tuple[tuple[str, str], ...], constants: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, int], ...], aligned: bool, device: torch.device,
) -> Launcher:  # fmt: skip
    return Launcher(kernel, dict(types), dict(constants), dict(options), aligned, device)


def launcher(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, int], aligned: bool,
    device: torch.device,
) -> Launcher:  # fmt: skip
    """The launcher, compiled at first use and kept."""
    return _launcher(kernel, tuple(types.items()), tuple(constants.items()), tuple(sorted(options.items())), aligned, device)
