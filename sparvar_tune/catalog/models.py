"""The models this project knows, as the shapes of their attention calls. To add one, add a row to `MODELS`.

Shapes, dtypes and layouts are those of each model's public inference code; weights are never read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparvar_kernels.geometry.problem import DTYPES
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.catalog.names import unknown_name

Schedules = Mapping[str, Mapping[str, ScaleSchedule]]

# cosine attention multiplies unit queries by exp(min(s, ln 100)), s learned per head
COSINE_BOUND = 100.0
MAX_IMAGES = 256  # at once
SLUG = "[a-z0-9]+(?:[._-][a-z0-9]+)*"  # a model's name names files, whose parts "--" joins
MOST_LAYERS = MOST_HEADS = 4096


@dataclass(frozen=True)
class Model:
    """One model.

    attention: "cosine" (q and k of unit length, the learned factor already in q) or "plain".
    logit_bound: no |logit| is above it; None when nothing bounds them.
    guidance_batch: batch rows of one image; 2 where classifier-free guidance runs both halves together.
    layout: of q, k, v at the attention call; "BHND" is [B, heads, N, dim], "BNHD" is [B, N, heads, dim].
    resolutions: resolution name -> aspect name (height / width, three decimals) -> schedule.
    adapter: name of the adapter that opens the model with nothing else given, None where it needs its authors' code and weights.
    family: the adapter that knows a live model of this row, built by its authors' code, in `sparvar_tune.apply`.
    """

    slug: str
    title: str
    layers: int
    heads: int
    head_dim: int
    width: int
    attention: Literal["cosine", "plain"]
    softmax_scale: float
    logit_bound: float | None
    dtype: Literal["bf16", "fp16", "fp32"]
    guidance_batch: int
    layout: Literal["BHND", "BNHD"]
    resolutions: Schedules = field(hash=False, repr=False)
    default_resolution: str
    default_aspect: str
    adapter: str | None
    family: str
    source: str

    def schedule(self, resolution: str | None = None, aspect: str | None = None) -> ScaleSchedule:
        """The schedule of `resolution` and `aspect`, None for the default; raises ValueError if unknown."""
        resolution = self.default_resolution if resolution is None else resolution
        aspect = self.default_aspect if aspect is None else aspect
        if not isinstance(resolution, str) or resolution not in self.resolutions:
            raise unknown_name(f"{self.slug} resolution", resolution, self.resolutions)
        aspects = self.resolutions[resolution]
        if not isinstance(aspect, str) or aspect not in aspects:
            raise unknown_name(f"{self.slug} aspect at {resolution}", aspect, aspects)
        return aspects[aspect]


# height / width, then the grids; the template for h/w below 1 is the transpose
_INFINITY_GRIDS = """
1.000  1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64
1.250  1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56
1.333  1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54
1.500  1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52
1.750  1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48
2.000  1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45
2.500  1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40
3.000  1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37
"""
# a smaller picture stops earlier
_INFINITY_SCALES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}


def _infinity_schedules() -> Schedules:
    grids: dict[str, tuple[tuple[int, int], ...]] = {}
    for line in _INFINITY_GRIDS.strip().splitlines():
        aspect, *cells = line.split()
        pairs = [tuple(map(int, cell.split("x"))) for cell in cells]
        grids[aspect] = tuple((h, w) for h, w in pairs)
        grids[f"{1 / float(aspect):.3f}"] = tuple((w, h) for h, w in pairs)
    return {
        resolution: {aspect: ScaleSchedule(grids[aspect][:scales]) for aspect in sorted(grids)}
        for resolution, scales in _INFINITY_SCALES.items()
    }


def _square(resolution: str, sides: str, prefix: int = 0) -> Schedules:
    return {resolution: {"1.000": ScaleSchedule.square(tuple(map(int, sides.split())), prefix)}}


_INFINITY = _infinity_schedules()
_VAR_256 = _square("256", "1 2 3 4 5 6 8 10 13 16")
_VAR_512 = _square("512", "1 2 3 4 6 9 13 18 24 32")

_EMOJI_GRIDS = ((1, 1), (2, 2), (3, 4), (6, 8), (9, 12), (12, 16), (15, 20), (18, 24), (24, 32))


def _infinity(size: str, layers: int, heads: int, resolutions: Schedules = _INFINITY) -> Model:
    return Model(
        slug=f"infinity-{size.lower()}",
        title=f"Infinity-{size}",
        layers=layers,
        heads=heads,
        head_dim=128,
        width=heads * 128,
        attention="cosine",
        softmax_scale=1.0,
        logit_bound=COSINE_BOUND,
        dtype="bf16",
        guidance_batch=2,
        layout="BHND",
        resolutions=resolutions,
        default_resolution=list(resolutions)[-1],
        default_aspect="1.000",
        adapter=None,
        family="infinity",
        source="github.com/FoundationVision/Infinity",
    )


def _var(depth: int, schedules: Schedules) -> Model:
    return Model(
        slug=f"var-d{depth}",
        title=f"VAR-d{depth}",
        layers=depth,
        heads=depth,
        head_dim=64,
        width=depth * 64,
        attention="cosine",
        softmax_scale=1.0,
        logit_bound=COSINE_BOUND,
        dtype="fp16",
        guidance_batch=2,
        layout="BNHD",
        resolutions=schedules,
        default_resolution=next(iter(schedules)),
        default_aspect="1.000",
        adapter=None,
        family="var",
        source="github.com/FoundationVision/VAR",
    )


_ROWS = (
    _infinity("2B", layers=32, heads=16),
    _infinity("8B", layers=40, heads=28),
    _infinity("8B-512", layers=40, heads=28, resolutions={"0.25M": _INFINITY["0.25M"]}),
    Model(
        slug="hart",
        title="HART-0.7B",
        # heads, width and layers live in the checkpoint's config; an adapter must compare them with these
        layers=24,
        heads=24,
        head_dim=64,
        width=1536,
        attention="plain",
        softmax_scale=0.25 / 64**0.5,
        logit_bound=None,
        dtype="fp16",
        guidance_batch=2,
        layout="BNHD",
        # 300 context tokens stand in for the 1x1 scale and stay visible to every scale
        resolutions=_square("1024", "2 3 4 5 7 9 12 16 21 27 36 48 64", prefix=300),
        default_resolution="1024",
        default_aspect="1.000",
        adapter=None,
        family="hart",
        source="github.com/mit-han-lab/hart",
    ),
    _var(16, _VAR_256),
    _var(20, _VAR_256),
    _var(24, _VAR_256),
    _var(30, _VAR_256),
    _var(36, _VAR_512),
    Model(
        slug="pocketvar",
        title="pocketvar",
        layers=8,
        heads=4,
        head_dim=64,
        width=256,
        attention="cosine",
        softmax_scale=1.0,
        # its code does not cap the learned factor; a test holds the shipped weights to this bound
        logit_bound=COSINE_BOUND,
        dtype="fp32",
        guidance_batch=1,
        layout="BHND",
        resolutions={"256": {"1.000": _INFINITY["1M"]["1.000"]}},
        default_resolution="256",
        default_aspect="1.000",
        adapter="pocketvar",
        family="pocketvar",
        source="sparvar_tune/pocketvar",
    ),
    Model(
        slug="emojivar",
        title="emojivar",
        layers=8,
        heads=5,
        head_dim=64,
        width=320,
        attention="plain",
        softmax_scale=64**-0.5,
        logit_bound=None,
        dtype="fp32",
        guidance_batch=2,
        layout="BHND",
        # a caption of eight tokens stands before the 1x1 scale
        resolutions={"192x256": {"0.750": ScaleSchedule(_EMOJI_GRIDS, prefix=8)}},
        default_resolution="192x256",
        default_aspect="0.750",
        adapter="emojivar",
        family="emojivar",
        source="sparvar_tune/emojivar",
    ),
)

MODELS: dict[str, Model] = {model.slug: model for model in _ROWS}


def own_model(
    slug: str, schedule: ScaleSchedule, *, layers: int, heads: int, head_dim: int, dtype: str = "bf16", softmax_scale: float,
    logit_bound: float | None = None, guidance_batch: int = 1, family: str = "own",
) -> Model:  # fmt: skip
    """The row of a model that is in no table, drawn at one size: that of `schedule`.

    dtype: of q, k and v, "bf16", "fp16" or "fp32". guidance_batch: their batch rows for one picture. Raises ValueError, in one
    line, for a name that is another model's or no name of a file, and for numbers out of range.
    """
    if not isinstance(slug, str) or not re.fullmatch(SLUG, slug) or len(slug) > 64:
        raise ValueError(
            f"model name: got {str(slug)[:80]!r}, want small letters and digits, parted by single . _ or -, at most 64"
        )
    if slug in MODELS:
        raise ValueError(f"model name: {slug} is that of a model of the table; choose another")
    counts = {"layers": (layers, MOST_LAYERS), "heads": (heads, MOST_HEADS), "head_dim": (head_dim, 1024),
              "guidance_batch": (guidance_batch, MAX_IMAGES)}  # fmt: skip
    for name, (got, most) in counts.items():
        if not isinstance(got, int) or isinstance(got, bool) or not 1 <= got <= most:
            raise ValueError(f"{name}: got {str(got)[:40]}, want a whole number, 1..{most}")
    if not isinstance(schedule, ScaleSchedule):
        raise ValueError(f"schedule: got a {type(schedule).__name__}, want a sparvar_kernels.ScaleSchedule")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {str(dtype)[:40]!r}, want one of {', '.join(DTYPES)}")
    height, width = schedule.grids[-1]
    resolution, aspect = f"{height}x{width}", f"{height / width:.3f}"
    return Model(
        slug=slug, title=slug, layers=layers, heads=heads, head_dim=head_dim, width=heads * head_dim,
        attention="plain" if logit_bound is None else "cosine", softmax_scale=float(softmax_scale),
        logit_bound=None if logit_bound is None else float(logit_bound), dtype=dtype,  # type: ignore[arg-type]
        guidance_batch=guidance_batch, layout="BHND", resolutions={resolution: {aspect: schedule}},
        default_resolution=resolution, default_aspect=aspect, adapter=None, family=family, source="your own",
    )  # fmt: skip


def find_model(slug: str) -> Model:
    """The row of `slug`; raises ValueError naming the nearest."""
    if not isinstance(slug, str) or slug not in MODELS:
        raise unknown_name("model", slug, MODELS)
    return MODELS[slug]
