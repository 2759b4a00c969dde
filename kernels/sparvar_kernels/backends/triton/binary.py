"""Compiling a Triton kernel for a target and launching it with little host work; the only file that knows Triton's insides.

A kernel is specialised on its constants and on whether its tensors are 16-byte aligned, nothing else, so a binary made
ahead of time (on a machine without the GPU, too) is the one that runs: same source, same cache entry.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
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


# Kernels go by these names in logs, whose keys a move of files must not change.
_HOMES = {
    "gathered_triton": "gathered",
    "gathered_gluon": "fetching",
    "selecting_triton": "selecting",
    "choosing_triton": "choosing",
}


@dataclass(frozen=True)
class Build:
    """Everything a binary is made of but the target. kernel: "module.function" of this package.

    types: argument -> "*bf16", "i32", "fp32" of everything that is no constant. aligned: pointers and strides are
    multiples of 16. Plain values, so that a process without the GPU can be asked for it.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int], ...]
    aligned: bool

    @classmethod
    def of(
        cls, kernel: Any, types: Mapping[str, str], constants: Mapping[str, int], options: Mapping[str, int], aligned: bool
    ) -> Build:
        """constants: they come last among the kernel's arguments, in order."""
        if kernel.arg_names[-len(constants) :] != list(constants):
            raise AssertionError(f"{kernel.fn.__name__}: constants must come last, in order")
        home = kernel.fn.__module__.rpartition(".")[2]
        name = f"{next(old for old, new in _HOMES.items() if new == home)}.{kernel.fn.__name__}"
        return cls(name, tuple(types.items()), tuple(constants.items()), tuple(sorted(options.items())), aligned)

    @property
    def function(self) -> Any:
        module, _, name = self.kernel.partition(".")
        return getattr(importlib.import_module(f"sparvar_kernels.backends.triton.{_HOMES[module]}"), name)

    @property
    def source(self) -> ASTSource:
        types, attrs = dict(self.types), {}
        signature = {name: types.get(name, "constexpr") for name in self.function.arg_names}
        for i, name in enumerate(signature):
            if self.aligned and (signature[name].startswith("*") or name.startswith("stride_")):
                attrs[i,] = [["tt.divisibility", ALIGNMENT]]
        parts: dict[str, Any] = {"fn": self.function, "signature": signature, "constexprs": dict(self.constants), "attrs": attrs}
        if not self.function.is_gluon():
            return ASTSource(**parts)
        from triton.experimental.gluon._runtime import GluonASTSource  # not in every Triton

        return GluonASTSource(**parts)


class NotMade(LookupError):
    """A binary is not in Triton's cache on disk, and `only_made` is on."""


_ONLY_MADE = ContextVar("only_made", default=False)


@contextmanager
def only_made() -> Iterator[None]:
    """While it lasts this thread compiles nothing: NotMade is raised in place of it."""
    before = _ONLY_MADE.set(True)
    try:
        yield
    finally:
        _ONLY_MADE.reset(before)


def _make_nothing(*_: Any) -> Any:
    raise NotMade


_READING_SOURCE = threading.Lock()


def _renew_lock() -> None:
    """In the child of a fork, where the thread that held it is not."""
    global _READING_SOURCE
    _READING_SOURCE = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _alone(read: Callable[..., Any], *args: Any) -> Any:
    """read(*args), of one thread at a time: it makes syntax trees.

    CPython 3.11 counts a tree's depth for all threads together and raises SystemError ("AST constructor recursion depth
    mismatch") where two make one at once. Nothing is lost, since reading holds Python's lock anyway.
    """
    with _READING_SOURCE:
        return read(*args)


def compile_for(build: Build, capability: tuple[int, int]) -> Any:
    """The binary for GPUs of `capability`; needs no GPU. Taken from Triton's cache on disk when it is there."""
    target, source = GPUTarget("cuda", capability[0] * 10 + capability[1], 32), build.source
    # the first that is called of a source whose binary is not in the cache
    source.make_ir = _make_nothing if _ONLY_MADE.get() else partial(_alone, source.make_ir)
    _alone(lambda: source.fn.cache_key)  # Triton keeps it
    return triton.compile(source, target=target, options=dict(build.options))


def link(binary: Any) -> None:
    """Makes the module that launches a binary, where Triton makes one of C for each signature (up to 3.6); needs no GPU."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(binary.src, binary.metadata)


def load_driver() -> None:
    """Makes what all launchers share: a module of C, too."""
    _ = triton.runtime.driver.active.utils


def machine_code(binary: Any) -> str:
    """Its listing, with what it takes; needs no GPU."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    where = next(Path(p) for name, p in binary.metadata_group.items() if name.endswith(".cubin"))
    call: list[str | Path] = [tool, "--dump-resource-usage", "--dump-sass", where]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def resources(binary: Any) -> Resources:
    """Read from the machine code, so no GPU is needed."""
    text = machine_code(binary)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    code = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("/*"))
    return Resources(
        found["REG"], int(binary.metadata.shared), found["STACK"] + found["LOCAL"], hashlib.sha256(code.encode()).hexdigest()
    )


class Launcher:
    """One binary on one device: `launcher(grid, *arguments)`, with pointers as integers and constants in their places.

    In Triton's interpreter tensors must be given instead of pointers; `pointer` does what is right.
    """

    def __init__(self, build: Build, device: torch.device) -> None:
        self.kernel = build.function
        self.tail = tuple(value for _, value in build.constants)
        if INTERPRETED:
            return
        binary = compile_for(build, torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):  # the handles are of whatever device is current
            binary._init_handles()
        self.run, self.function = binary.run, binary.function
        self.before: tuple[Any, ...] = (binary.packed_metadata, None, None, None)  # and no hooks
        if triton.__version__.startswith("3.6.") and not (self.run.global_scratch_size or self.run.profile_scratch_size):
            # what `run` would call, without the Python around it: 1.2 us of a call
            self.before = (self.run.launch_cooperative_grid, self.run.launch_pdl, None, None, *self.before)
            self.run = self.run.launch
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        self.stream = torch._C._cuda_getCurrentRawStream

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        if INTERPRETED:
            self.kernel[grid](*arguments, *self.tail)
            return
        self.run(*grid, self.stream(self.index), self.function, *self.before, *arguments, *self.tail)


def pointer(t: torch.Tensor) -> Any:
    """The tensor as a launch argument."""
    return t if INTERPRETED else t.data_ptr()


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


@lru_cache(maxsize=512)
def launcher(build: Build, device: torch.device) -> Launcher:
    """The launcher, compiled at first use and kept."""
    return Launcher(build, device)
