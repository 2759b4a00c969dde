"""Which binary a pass launches; compiling and launching are those of the attention kernels."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from sparvar_kernels.backends.triton.binary import Build


class PathBuild(Build):
    """A `Build` of a kernel in this folder."""

    @classmethod
    def of(
        cls, kernel: Any, types: Mapping[str, str], constants: Mapping[str, int], options: Mapping[str, int], aligned: bool
    ) -> PathBuild:
        """constants: they come last among the kernel's arguments, in order."""
        if kernel.arg_names[-len(constants) :] != list(constants):
            raise AssertionError(f"{kernel.fn.__name__}: constants must come last, in order")
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        return cls(name, tuple(types.items()), tuple(constants.items()), tuple(sorted(options.items())), aligned)

    @property
    def function(self) -> Any:
        module, _, name = self.kernel.partition(".")
        return getattr(importlib.import_module(f"sparvar_kernels.path.triton.{module}"), name)
