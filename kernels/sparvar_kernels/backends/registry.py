"""The kernels that run a layer: one literal dict. A new one is a module with a `Layer`, a configuration and a row here."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

from sparvar_kernels.backends.configs import Capability, CpuConfig, LaunchConfig, TritonConfig
from sparvar_kernels.geometry.problem import AttentionProblem


@dataclass(frozen=True)
class Kernel:
    """A module with a class `Layer`, loaded on first use (Triton is optional on a CPU), and its configuration.

    folder: of the modules no other kernel runs; a change in them makes only this kernel's profiles stale.
    meaning: raised when the backend's planner comes to order or choose keys otherwise; profiles of an earlier one are refused.
    added: parameters that a file of an earlier version may lack; they have their default then.
    """

    name: str
    module: str
    config: type[CpuConfig] | type[TritonConfig]
    folder: str
    meaning: int = 1
    added: tuple[str, ...] = ()

    def load(self) -> Any:
        """The module; raises ValueError naming the package to install if it cannot be imported."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(f"kernel {self.name!r} needs {error.name}: pip install 'sparvar-tune[gpu]'") from None

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self.config))


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel("cpu", "sparvar_kernels.backends.cpu.layer", CpuConfig, "cpu"),
    "triton": Kernel(
        "triton", "sparvar_kernels.backends.triton.layer", TritonConfig,
        "triton",
        added=("fetchers",),
    ),
}  # fmt: skip


def kernel_for(device: str) -> str:
    """The default kernel of a torch device type."""
    return "cpu" if device == "cpu" else "triton"


def default_config(problem: AttentionProblem, kernel: str, capability: Capability) -> LaunchConfig:
    """What `kernel` is launched with where nobody chose: its own default, or the nearest to it that fits the GPU."""
    first, *smaller = KERNELS[kernel].config.defaults()
    return next((c for c in (first, *smaller) if why_not(problem, kernel, c, capability) is None), first)


def why_not(problem: AttentionProblem, kernel: str, config: LaunchConfig, capability: Capability) -> str | None:
    """Why `kernel` with `config` cannot run `problem` on a GPU of `capability` (None: no GPU), or None.

    The one statement of a launch's legality: search prunes with it, the runtime refuses with it, `show` prints it.
    """
    if kernel not in KERNELS:
        return f"kernel {kernel!r}: want one of {', '.join(KERNELS)}"
    if not isinstance(config, KERNELS[kernel].config):
        return f"kernel {kernel!r}: got {type(config).__name__}, want {KERNELS[kernel].config.__name__}"
    return config.why_not(problem, capability)
