"""The kernels that run key lists: one literal dict. A new kernel is one file and one row here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sparvar_kernels.problem import AttentionProblem


@dataclass(frozen=True)
class Kernel:
    """A module with `why_not`, `space` and `gathered_attention`, loaded on first use (Triton is optional on a CPU)."""

    name: str
    module: str
    config: str
    fields: tuple[str, ...]  # of the config, so that files can be checked where the module cannot be loaded

    def load(self) -> ModuleType:
        """The module; raises ValueError naming the package to install if it cannot be imported."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(f"kernel {self.name!r} needs {error.name}: pip install 'sparvar-tune[gpu]'") from None

    def make_config(self, **fields: Any) -> Any:
        return getattr(self.load(), self.config)(**fields)


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel("cpu", "sparvar_kernels.gathered_cpu", "CpuConfig", ("score_elements",)),
    "triton": Kernel(
        "triton", "sparvar_kernels.gathered_triton", "TritonConfig", ("block_m", "block_n", "num_warps", "num_stages")
    ),
}


def kernel_for(device: str) -> str:
    """The default kernel of a torch device type."""
    return "cpu" if device == "cpu" else "triton"


def why_not(problem: AttentionProblem, kernel: str, config: Any, capability: tuple[int, int] | None) -> str | None:
    """Why `kernel` with `config` cannot run `problem` on a GPU of `capability` (None: no GPU), or None.

    The one statement of a launch's legality: search prunes with it, the runtime refuses with it, `show` prints it.
    """
    if kernel not in KERNELS:
        return f"kernel {kernel!r}: want one of {', '.join(KERNELS)}"
    return KERNELS[kernel].load().why_not(problem, config, capability)
