"""What a report is about: one profile, and whatever was found beside it, as plain values that tables and charts are made from."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sparvar_kernels.variants import Dense, Variant
from sparvar_tune.catalog.metrics import LEAD
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.profile.schema import Profile, Row
from sparvar_tune.profile.store import images_of
from sparvar_tune.report.cost import Bill, ImageTime, Load, bill
from sparvar_tune.report.pictures import PicturePair
from sparvar_tune.report.sources import Measurements, Point, Trace

if TYPE_CHECKING:
    import pandas

FEW = 0.01  # of a trace's time: steps and scales below it are shown together
DENSE = Dense()


@dataclass(frozen=True)
class Portion:
    """One scale's attention over all layers, or the rest of a picture (scale None), in ms."""

    scale: int | None
    label: str
    dense_ms: float
    tuned_ms: float


@dataclass(frozen=True)
class HeadKind:
    """A variant that heads use. letter: in head maps. shade: its place among those of its kind."""

    letter: str
    name: str
    kind: str
    shade: int


@dataclass(frozen=True)
class Facts:
    """profile, file: the subject, and its file's name. demoted: scale -> why it runs dense all the same, by the code of today.
    here: how the profile was found and what differs on this machine. others: profiles of the same model and silicon.
    trials: as `ways.trials.trials_of`; trials_from: whose they are. no_pictures: why there are none.
    """

    profile: Profile
    file: str
    demoted: dict[int, str]
    load: Load
    here: tuple[str, ...] = ()
    others: tuple[Profile, ...] = ()
    trials: pandas.DataFrame | None = None
    trials_from: str = ""
    measurements: Measurements | None = None
    traces: tuple[Trace, ...] = ()
    compared: tuple[Point, ...] = ()
    pictures: tuple[PicturePair, ...] = ()
    no_pictures: str = ""

    @property
    def predicted(self) -> bool:
        return self.profile.state == "predicted"

    @cached_property
    def images(self) -> int:
        """How many images one call of the attention holds."""
        workload = self.profile.workload
        return images_of(workload, MODELS[workload.model]) if workload.model in MODELS else 1

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Whole pictures: this profile's certificate, those of the other presets, what was compared beside them."""
        found = [point for p in (self.profile, *self.others) if (point := _certified(p, p is self.profile))]
        known = {point.name for point in found}
        return (*found, *(point for point in self.compared if point.name not in known))

    @cached_property
    def parts(self) -> tuple[Portion, ...]:
        """A picture's time: attention of every scale with a row, then the rest where whole pictures were timed.

        Where none was, a row that runs dense all the same counts as dense.
        """
        layers, whole, out = self.profile.workload.layers, self.profile.generation, []
        for row in self.profile.rows:
            dense, tuned = times_of(row)
            used = dense if whole is None and row.scale_index in self.demoted else tuned
            out.append(Portion(row.scale_index, self.scale_name(row.scale_index), dense * layers, used * layers))
        if whole is not None:
            rest = [whole.dense.p50_ms - sum(p.dense_ms for p in out), whole.tuned.p50_ms - sum(p.tuned_ms for p in out)]
            out.append(Portion(None, "everything else", max(rest[0], 0.0), max(rest[1], 0.0)))
        return tuple(out)

    @cached_property
    def work(self) -> ImageTime | None:
        """What an image takes, measured; None where nothing was."""
        if self.predicted or not self.profile.rows:
            return None
        whole = self.profile.generation
        if whole is not None:
            s = whole.speedup
            return ImageTime(whole.dense.p50_ms / 1e3, s.median, s.low, s.high, True)
        dense = sum(part.dense_ms for part in self.parts)
        ends = [sum(part.dense_ms / self._gain(row, end) for part, row in zip(self.parts, self.profile.rows, strict=True))
                for end in ("low", "high")]  # fmt: skip
        ratio = dense / sum(part.tuned_ms for part in self.parts)
        low, high = dense / ends[0], dense / ends[1]
        return ImageTime(dense / 1e3 / self.images, ratio, min(low, ratio), max(high, ratio), False)

    def _gain(self, row: Row, end: str) -> float:
        return 1.0 if row.scale_index in self.demoted or row.speedup is None else float(getattr(row.speedup, end))

    @cached_property
    def bill(self) -> Bill | None:
        return bill(self.work, self.load) if self.work else None

    def scale_name(self, scale: int) -> str:
        grid = self.profile.workload.grids[scale]
        return f"scale {scale} ({grid[0]}x{grid[1]})"

    @cached_property
    def head_scales(self) -> tuple[int, ...]:
        """Scales at which some head is not dense."""
        return tuple(sorted({r.scale_index for r in self.profile.policy.rules}))

    @cached_property
    def head_kinds(self) -> dict[Variant, HeadKind]:
        """Every variant in use, dense first, then by kind and how many heads use it."""
        uses: Counter[Variant] = Counter()
        for s in self.head_scales:
            for layer, letters in enumerate(self.profile.policy.heads):
                uses.update(self.profile.policy.variant(layer, head, s) for head in range(len(letters)))
        names = {v: _name(v, self.profile.workload.grids) for v in uses}
        kinds, order = dict[str, HeadKind](), dict[Variant, HeadKind]()
        shades: Counter[str] = Counter()
        free = iter(string.ascii_letters + string.digits)
        for v in sorted(uses, key=lambda v: (v.kind != "dense", v.kind, names[v], -uses[v])):
            if names[v] not in kinds:  # the same words at another scale are the same thing to the reader
                letter = "\u00b7" if v.kind == "dense" else next(free, "?")
                kinds[names[v]] = HeadKind(letter, names[v], v.kind, shades[v.kind])
                shades[v.kind] += 1
            order[v] = kinds[names[v]]
        return order

    def head_map(self, scale: int) -> list[list[HeadKind]]:
        """[layer][head] of one scale."""
        policy = self.profile.policy
        return [
            [self.head_kinds[policy.variant(layer, head, scale)] for head in range(len(letters))]
            for layer, letters in enumerate(policy.heads)
        ]

    @cached_property
    def steps(self) -> tuple[list[str], dict[str, list[tuple[str, dict[str, float]]]]]:
        """Of the traces: the steps in order, and by scale (label) the ms of every step of each trace."""
        total = max((sum(t.ms.values()) for t in self.traces), default=0.0)
        by_step: Counter[str] = Counter()
        by_scale: Counter[int | None] = Counter()
        for trace in self.traces:
            for (scale, step), ms in trace.ms.items():
                by_step[step] += ms  # type: ignore[assignment]
                by_scale[scale] += ms  # type: ignore[assignment]
        shown = [step for step, ms in by_step.items() if ms >= FEW * total]
        steps = [*shown, *(["other"] if len(shown) < len(by_step) else [])]
        late = sorted((s for s in by_scale if s is not None and by_scale[s] >= FEW * total), reverse=True)
        labels = {s: self.scale_name(s) if s < len(self.profile.workload.grids) else f"scale {s}" for s in late}
        rows: dict[str, list[tuple[str, dict[str, float]]]] = {label: [] for label in labels.values()}
        if len(labels) < len(by_scale):
            rows["all else"] = []
        for trace in self.traces:
            sums: dict[str, Counter[str]] = {label: Counter() for label in rows}
            for (scale, step), ms in trace.ms.items():
                where = labels.get(scale, "all else") if scale is not None else "all else"
                sums[where][step if step in shown else "other"] += ms  # type: ignore[assignment]
            for label in rows:
                rows[label].append((trace.name, {step: float(sums[label][step]) for step in steps}))
        return steps, rows


def times_of(row: Row) -> tuple[float, float]:
    """ms of a layer, dense and tuned; predicted where nothing was measured."""
    if row.dense and row.tuned:
        return row.dense.p50_ms, row.tuned.p50_ms
    return row.dense_predicted_ms or 0.0, row.tuned_predicted_ms or 0.0


def _certified(profile: Profile, own: bool) -> Point | None:
    if profile.generation is None or profile.evidence is None:
        return None
    try:
        psnr = profile.evidence.of(LEAD.name)
    except ValueError:
        return None
    return Point(f"tuned, {profile.preset}", "certified" if own else "preset", profile.generation.speedup, psnr.mean, psnr.bound)


def _name(variant: Variant, grids: tuple[tuple[int, int], ...]) -> str:
    """`describe` without the tile, which a scale sets, and with what it takes from a decision scale."""
    words = variant.describe()
    tile = getattr(variant, "tile", None)
    if tile is not None:
        words = words.replace(f" {tile}", "", 1)
    if getattr(variant, "first_scale", None) is not None:
        words += f" from scale {variant.first_scale}"  # type: ignore[attr-defined]
    if variant.residual and variant.kind != "reuse":
        words += " + residual"
    return words
