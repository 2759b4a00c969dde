"""Guidance drop: from some scale on only the conditional half of guidance is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparvar_kernels.geometry.scales import ScaleSchedule


@dataclass(frozen=True)
class DropUnconditional:
    """The unconditional half is not run from `from_scale` on, whose guidance is then 1.

    Oracle: for Infinity the untouched model with 1 there in its `cfg_list`, bit for bit; for HART and VAR the untouched model
    whose unconditional rows are the conditional ones there, up to the rounding of (1 + t) l - t l.
    Source: the public SparVAR code's `drop_uncond_last_scales` (arXiv 2602.04361); the idea is SkipVAR's and Switti's.
    """

    from_scale: int
    kind: ClassVar[str] = "drop_unconditional"
    meaning: ClassVar[int] = 1
    thins: ClassVar[bool] = False

    @property
    def skips(self) -> tuple[int, ...]:
        return ()

    def why_not(self, schedule: ScaleSchedule, layers: int) -> str | None:
        if not 0 <= self.from_scale < len(schedule):
            return f"drop_unconditional: from_scale={self.from_scale}, want 0..{len(schedule) - 1}"
        return None

    def describe(self) -> str:
        return f"unconditional half dropped from scale {self.from_scale} on"
