"""Skip: the last scales are not drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparvar_kernels.geometry.scales import ScaleSchedule


@dataclass(frozen=True)
class SkipScales:
    """`scales`, the last ones in order, are left out; the picture is decoded from what was summed up before them.

    Oracle: Infinity's own `trunk_scale`; elsewhere the model's decoder on its own sum before the first of them. Bit for bit.
    """

    scales: tuple[int, ...]
    kind: ClassVar[str] = "skip_scales"
    meaning: ClassVar[int] = 1
    thins: ClassVar[bool] = False

    @classmethod
    def last(cls, schedule: ScaleSchedule, scales: int = 1) -> SkipScales:
        """The last so many scales of a schedule."""
        return cls(tuple(range(len(schedule) - scales, len(schedule))))

    @property
    def from_scale(self) -> int:
        return self.scales[0] if self.scales else -1  # none at all: `why_not` refuses that

    @property
    def skips(self) -> tuple[int, ...]:
        return self.scales

    def why_not(self, schedule: ScaleSchedule, layers: int) -> str | None:
        want = tuple(range(len(schedule) - len(self.scales), len(schedule)))
        if not self.scales or self.scales != want or len(want) >= len(schedule):
            return f"skip_scales={self.scales}: want the last scales in order, such as {(len(schedule) - 1,)}"
        return None

    def describe(self) -> str:
        return f"scale{'s' * (len(self.scales) > 1)} {', '.join(map(str, self.scales))} left out"
