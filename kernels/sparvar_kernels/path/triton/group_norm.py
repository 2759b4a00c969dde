"""Group norm + SiLU of pictures: moments of parts, moments of groups, one pass over the picture.

Both memory formats are one tile [SPAN pixels, CHANNELS]: of channels_last a tile is a few whole lines of neighbouring channels,
of the usual order it is one channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

TILE, WARPS = 2048, 4  # numbers a program holds at a time
MOST_CHANNELS = 128  # of a tile
PROGRAMS = 2048  # of the first pass, about: enough to fill a GPU, few enough that their parts are little to add up
LEAST = 4  # tiles of a program of the first pass
PARTS = 1024  # that a program of the second pass holds at a time


@triton.jit
def picture_tile(  # type: ignore[no-untyped-def]
    ptr, stride_b, stride_line, size, first,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(addresses, mask, channels) of the tile that begins at pixel `first`, of the program's channels and picture.

    stride_line: C of channels_last (between pixels), H * W of the usual order (between channels).
    """
    begin = tl.program_id(0) % tl.cdiv(ALL, CHANNELS) * CHANNELS
    c = begin + tl.arange(0, CHANNELS)
    s = tl.arange(0, SPAN)
    base = ptr + tl.program_id(1).to(tl.int64) * stride_b
    if LAST:
        at = base + first.to(tl.int64) * stride_line + (s[:, None] * stride_line + c[None, :])
    else:
        at = base + begin.to(tl.int64) * stride_line + first + s[:, None] + (c * 0)[None, :]
    if EVEN:
        mask = tl.full([SPAN, CHANNELS], 1, tl.int1)
    else:
        mask = (first + s < size)[:, None] & (c < ALL)[None, :]
    return at, mask, c


@triton.jit
def with_bias(x, bias_ptr, c, ALL: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile x + its channels' biases, as fp32 that was rounded to x's dtype: as a convolution with that bias gives it."""
    y = x.to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=c < ALL, other=0.0).to(x.dtype).to(tl.float32)
        y = (y + bias[None, :]).to(x.dtype).to(tl.float32)
    return y


@triton.jit
def part_moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr, add_ptr, parts_ptr, stride_b, stride_line, size, many, stride_part,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program (part by channels, picture): mean and sum of squared differences to it, of each channel of `stride_part` pixels.

    Each place of the tile keeps moments of its own (Welford), which are put together at the end.
    parts [2, B, C, many] fp32: means, then sums.
    """
    part = tl.program_id(0) // tl.cdiv(ALL, CHANNELS)
    begin = part * stride_part
    mean, squares = tl.zeros([SPAN, CHANNELS], tl.float32), tl.zeros([SPAN, CHANNELS], tl.float32)
    for i in range(stride_part // SPAN):
        at, mask, c = picture_tile(x_ptr, stride_b, stride_line, size, begin + i * SPAN, SPAN, CHANNELS, ALL, LAST, EVEN)
        x = with_bias(tl.load(at, mask=mask, other=0.0), add_ptr, c, ALL, ADD)
        away = tl.where(mask, x - mean, 0.0)
        mean += away * (1.0 / (i + 1.0))
        squares += tl.where(mask, away * (x - mean), 0.0)
    here = tl.minimum(size - begin, stride_part)
    seen = tl.maximum((here - tl.arange(0, SPAN) + SPAN - 1) // SPAN, 0).to(tl.float32)[:, None]
    total = here.to(tl.float32)
    first = tl.sum(tl.where(tl.arange(0, SPAN)[:, None] == 0, mean, 0.0), 0)  # a value nearby: sums of differences stay small
    whole = first + tl.sum(seen * (mean - first[None, :]), 0) / total
    away = mean - whole[None, :]
    c = tl.program_id(0) % tl.cdiv(ALL, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    out = parts_ptr + (tl.program_id(1).to(tl.int64) * ALL + c) * many + part
    tl.store(out, whole, mask=c < ALL)
    sums = tl.sum(squares + seen * away * away, 0)
    tl.store(out + tl.num_programs(1).to(tl.int64) * ALL * many, sums, mask=c < ALL)


@triton.jit
def group_moments_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, weight_ptr, moments_ptr, stride_b, stride_line, size, many, stride_part, eps,
    ALL: tl.constexpr, OWN: tl.constexpr, WEIGHT: tl.constexpr, ROOM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Program (group, picture): [B, C, 2] fp32 of each of its OWN channels, mean and weight / deviation."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = parts_ptr + (picture * ALL + group * OWN) * many
    sums = start + tl.num_programs(1).to(tl.int64) * ALL * many
    first = tl.load(start)
    offs = tl.arange(0, PARTS)
    difference = tl.zeros([PARTS], tl.float32)
    for i in range(0, OWN * many, PARTS):
        at = i + offs
        pixels = tl.minimum(size - at % many * stride_part, stride_part).to(tl.float32)
        mean = tl.load(start + at, mask=at < OWN * many, other=first)
        difference += pixels * (mean - first)
    total = OWN * size.to(tl.float32)
    whole = first + tl.sum(difference, 0) / total
    squares = tl.zeros([PARTS], tl.float32)
    for i in range(0, OWN * many, PARTS):
        at = i + offs
        pixels = tl.minimum(size - at % many * stride_part, stride_part).to(tl.float32)
        away = tl.load(start + at, mask=at < OWN * many, other=whole) - whole
        squares += tl.load(sums + at, mask=at < OWN * many, other=0.0) + pixels * away * away
    factor = tl.rsqrt(tl.sum(squares, 0) / total + eps)
    own = tl.arange(0, ROOM)
    c = group * OWN + own
    factors = tl.full([ROOM], 1.0, tl.float32) * factor
    if WEIGHT:
        factors *= tl.load(weight_ptr + c, mask=own < OWN, other=0.0).to(tl.float32)
    out = moments_ptr + (picture * ALL + c) * 2
    tl.store(out, tl.full([ROOM], 0.0, tl.float32) + whole, mask=own < OWN)
    tl.store(out + 1, factors, mask=own < OWN)


@triton.jit
def group_norm_silu_kernel(  # type: ignore[no-untyped-def]
    x_ptr, moments_ptr, bias_ptr, add_ptr, out_ptr, stride_b, stride_line, size, many, stride_part,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program (SPAN pixels by channels, picture): one read, one write."""
    first = tl.program_id(0) // tl.cdiv(ALL, CHANNELS) * SPAN
    at, mask, c = picture_tile(x_ptr, stride_b, stride_line, size, first, SPAN, CHANNELS, ALL, LAST, EVEN)
    moments = moments_ptr + (tl.program_id(1).to(tl.int64) * ALL + c) * 2
    mean = tl.load(moments, mask=c < ALL, other=0.0)
    factor = tl.load(moments + 1, mask=c < ALL, other=0.0)
    x = with_bias(tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"), add_ptr, c, ALL, ADD)
    y = (x - mean[None, :]) * factor[None, :]
    if BIAS:
        y += tl.load(bias_ptr + c, mask=c < ALL, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    to, mask, _ = picture_tile(out_ptr, stride_b, stride_line, size, first, SPAN, CHANNELS, ALL, LAST, EVEN)
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=mask)


SIZES = {"stride_b": "i64", "stride_line": "i32", "size": "i32", "many": "i32", "stride_part": "i32"}


@dataclass(frozen=True)
class Cut:
    """How a picture [B, C, size pixels] is cut: tiles of span pixels and `wide` channels, parts of `length` pixels.

    Only what a tile is like is in the binaries, so that one decoder needs few of them.
    """

    batch: int
    channels: int
    size: int
    last: bool

    @property
    def wide(self) -> int:
        if not self.last:
            return 1
        common = self.channels & -self.channels
        whole = common >= 8  # 16 bytes of the half dtypes
        return int(min(common if whole else triton.next_power_of_2(self.channels), MOST_CHANNELS))

    @property
    def span(self) -> int:
        return int(min(TILE // self.wide, max(triton.next_power_of_2(self.size), 1)))

    @property
    def tile(self) -> dict[str, int | bool]:
        """Constants of a kernel that works a tile."""
        return {"SPAN": self.span, "CHANNELS": self.wide, "ALL": self.channels, "LAST": self.last, "EVEN": self.even}

    @property
    def warps(self) -> int:
        """Of a program that works a tile."""
        return max(min(WARPS, self.span * self.wide // 32), 1)

    @property
    def across(self) -> int:
        """Tiles beside one another, of all channels."""
        return -(-self.channels // self.wide)

    @property
    def tiles(self) -> int:
        """Of one picture."""
        return self.across * -(-self.size // self.span)

    @property
    def length(self) -> int:
        """Pixels of a part: whole tiles."""
        spans = triton.next_power_of_2(-(-self.size // self.span))
        return self.span * int(min(max(triton.next_power_of_2(self.tiles * self.batch // PROGRAMS), LEAST), spans))

    @property
    def many(self) -> int:
        """Parts of a channel."""
        return -(-self.size // self.length)

    @property
    def line(self) -> int:
        return self.channels if self.last else self.size

    @property
    def aligned(self) -> bool:
        return gcd(self.line, self.length) % ALIGNMENT == 0

    @property
    def even(self) -> bool:
        return self.size % self.length == 0 and self.channels % self.wide == 0


def group_norm_builds(
    shape: Cut, groups: int, x: torch.dtype, out: torch.dtype, weight: torch.dtype | None, bias: torch.dtype | None,
    silu: bool = True, aligned: bool = True, add: torch.dtype | None = None,
) -> tuple[PathBuild, PathBuild, PathBuild]:  # fmt: skip
    """What a call launches, in order."""
    tile = shape.tile
    own = shape.channels // groups
    options = {"num_warps": shape.warps, "num_stages": 1}
    x_type, of_parts, added = {"x_ptr": f"*{TYPES[x]}"}, {"parts_ptr": "*fp32"}, {"add_ptr": f"*{TYPES[add or x]}"}
    adds = {"ADD": add is not None}
    first = PathBuild.of(part_moments_kernel, x_type | added | of_parts | SIZES, tile | adds, options, aligned)
    second = PathBuild.of(
        group_moments_kernel,
        of_parts | {"weight_ptr": f"*{TYPES[weight or x]}", "moments_ptr": "*fp32"} | SIZES | {"eps": "fp32"},
        {
            "ALL": shape.channels, "OWN": own, "WEIGHT": weight is not None,
            "ROOM": triton.next_power_of_2(own), "PARTS": PARTS,
        }, {"num_warps": WARPS, "num_stages": 1}, aligned,
    )  # fmt: skip
    third = PathBuild.of(
        group_norm_silu_kernel,
        x_type | {"moments_ptr": "*fp32", "bias_ptr": f"*{TYPES[bias or x]}"} | added | {"out_ptr": f"*{TYPES[out]}"} | SIZES,
        {**tile, "BIAS": bias is not None, "SILU": silu, **adds}, options, aligned,
    )  # fmt: skip
    return first, second, third


class GroupNormLaunch:
    """The three binaries for tensors of one form. parts: shape of the first pass's output; sizes: arguments all three take."""

    def __init__(self, shape: Cut, groups: int, builds: tuple[PathBuild, PathBuild, PathBuild], device: torch.device) -> None:
        self.parts = 2, shape.batch, shape.channels, shape.many
        self.sizes = shape.channels * shape.size, shape.line, shape.size, shape.many, shape.length
        programs = shape.across * shape.many, groups, shape.tiles
        grids = [(each, shape.batch, 1) for each in programs]
        self.passes: list[tuple[Launcher, tuple[int, int, int]]] = [
            (launcher(build, device), grid) for build, grid in zip(builds, grids, strict=True)
        ]

    def run(self, *arguments: tuple[Any, ...]) -> None:
        for (run, grid), given in zip(self.passes, arguments, strict=True):
            run(grid, *given)


@lru_cache(maxsize=4096)
def group_norm_launch(
    x: Form, weight: Form, bias: Form, add: Form, groups: int, out: torch.dtype, last: bool, silu: bool, device: torch.device
) -> GroupNormLaunch:
    """The binaries for tensors of this form and what they are launched with."""
    assert x is not None
    batch, channels, height, width = x[0]
    shape = Cut(batch, channels, height * width, last)
    aligned = shape.aligned and not any(t[3] for t in (x, weight, bias, add) if t is not None)
    scale, shift, added = (None if t is None else t[2] for t in (weight, bias, add))
    return GroupNormLaunch(shape, groups, group_norm_builds(shape, groups, x[2], out, scale, shift, silu, aligned, added), device)
