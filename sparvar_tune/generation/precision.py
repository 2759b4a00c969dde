"""Precision: from some scale on, in some layers, the products of the blocks are of 8-bit numbers, scaled row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.path.scaled_rows import FORMATS
from sparvar_kernels.policy import LATER

WORDS = {"e4m3": "8-bit floats", "int8": "8-bit integers"}


@dataclass(frozen=True)
class Precision:
    """From scale `from_scale` on, in layers first..last of each of the groups `layers`, a block's products take 8-bit operands.

    Products: qkv, attention's output projection and those of the MLP. Of Infinity's attention to the text none: its products are
    a seventh of a block's, and on the fused path the text is folded into them. All must be plain Linears.

    y = x W^T + b becomes: each row of x and each row of W (an output channel) in the products' dtype times the format's largest
    value over its own largest |value|, rounded to the format (to nearest, ties to even); multiplied, summed in fp32; times both
    scales; b added; rounded once. An x with a NaN or an infinity gives a row of NaN. Rows of W are scaled once.

    fmt, the format: "e4m3", floats of 4 exponent bits and 3 of mantissa up to 448, of whose sums tensor cores keep fewer bits on
    the way (on an H100 relative errors of 1e-4); or "int8", whole numbers up to 127, whose sums are exact. Where a row's numbers
    are of a kind, int8 errs half as much; an outlier costs it more.

    Where a device does not multiply the format (`scaled_product.why_no_gain`) the same is emulated, of E4M3 with sums in another
    order. That is slower than no step at all: a search does not offer it there, and a profile that brings it goes without.

    Oracle: the same in fp64, both formats by hand from their definition (tests/shared/eight_bits.py). Sources: Micikevicius et
    al., FP8 Formats for Deep Learning (arXiv 2209.05433); scales by row and output channel: Xiao et al., SmoothQuant
    (arXiv 2211.10438, section 3).
    """

    from_scale: int
    layers: tuple[tuple[int, int], ...]
    fmt: str = field(default="e4m3", metadata={LATER: True})
    kind: ClassVar[str] = "precision"
    meaning: ClassVar[int] = 1
    thins: ClassVar[bool] = False

    @property
    def skips(self) -> tuple[int, ...]:
        return ()

    def at(self, scale_index: int | None, layer: int) -> bool:
        """Whether a layer's products are so at this scale; None: before the first grid."""
        return scale_index is not None and scale_index >= self.from_scale and any(a <= layer <= b for a, b in self.layers)

    def why_not(self, schedule: ScaleSchedule, layers: int) -> str | None:
        if not 0 <= self.from_scale < len(schedule):
            return f"precision: from_scale={self.from_scale}, want 0..{len(schedule) - 1}"
        if self.fmt not in FORMATS:
            return f"precision: fmt: got {self.fmt!r}, want {' or '.join(FORMATS)}"
        if not self.layers:
            return "precision: layers: got none, want groups (first, last)"
        for first, last in self.layers:
            if not 0 <= first <= last < layers:
                return f"precision: layers {first}..{last}, want some of 0..{layers - 1}"
        for (_, end), (begin, _) in pairwise(self.layers):
            if begin <= end:
                return f"precision: layers: a group begins at {begin} where one before ends at {end}; want them ascending, apart"
        return None

    def describe(self) -> str:
        groups = ", ".join(f"{first} to {last}" if first < last else f"{first}" for first, last in self.layers)
        return f"products of {WORDS[self.fmt]} from scale {self.from_scale} on in layers {groups}"
