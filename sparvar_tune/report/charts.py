"""The charts, each drawn twice: for a desk and for a phone. Legends are the page's own, so that they wrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sparvar_tune.catalog.metrics import LEAD
from sparvar_tune.report.facts import Facts, HeadKind
from sparvar_tune.report.sources import Point
from sparvar_tune.report.svg import Ink, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 9.4, 4.6  # inches
WIDE_TEXT, NARROW_TEXT = 9.0, 10.0  # points
TEXT, MUTED, LINE, PAPER = "var(--text)", "var(--muted)", "var(--line)", "var(--paper)"
DENSE, TUNED, PAPER_WAY, BEST = "var(--dense)", "var(--tuned)", "var(--paper-way)", "var(--best)"
SERIES = tuple(f"var(--series-{i})" for i in range(1, 9))
KINDS = {"dense": "var(--kind-dense)", "csla": "var(--kind-csla)", "cs4a": "var(--kind-cs4a)", "pooled": "var(--kind-pooled)",
         "near_far": "var(--kind-near-far)",
         "reuse": "var(--kind-reuse)"}  # fmt: skip
SHADES = ("", " 66%, var(--text)", " 72%, var(--paper)", " 44%, var(--text)", " 52%, var(--paper)")
MARKS = {"certified": "*", "preset": "o", "paper": "s", "other": "D"}
COLOURS = {"certified": BEST, "preset": TUNED, "paper": PAPER_WAY, "other": MUTED}
MOST_CELLS = 50_000  # of a map; Infinity-8B has 3,360
LETTERS = 14  # heads beside each other that leave room for a letter in each cell


@dataclass(frozen=True)
class Key:
    """A line of a legend. mark: "box", "line", "dash", or the shape of a point: "star", "dot", "small", "square", "diamond",
    "ring", "circled". letter: in the box.
    """

    colour: str
    label: str
    mark: str = "box"
    letter: str = ""


@dataclass(frozen=True)
class Chart:
    """wide, narrow: SVG elements. alt: in a sentence."""

    wide: str
    narrow: str
    alt: str
    legend: tuple[Key, ...]


Paint = Callable[["Figure", Ink, bool], None]


def _chart(name: str, paint: Paint, heights: tuple[float, float], alt: str, legend: Sequence[Key]) -> Chart:
    return Chart(
        draw(lambda figure, ink: paint(figure, ink, True), WIDE, heights[0], WIDE_TEXT, f"{name}-w", alt),
        draw(lambda figure, ink: paint(figure, ink, False), NARROW, heights[1], NARROW_TEXT, f"{name}-n", alt),
        alt, tuple(legend),
    )  # fmt: skip


def front(facts: Facts) -> Chart | None:
    """Speed-up against PSNR: the trials of the search, and whole pictures on held-out pairs. None where there is neither."""
    panels: list[Callable[[Axes, Ink], None]] = []
    if facts.trials is not None:
        panels.append(lambda axes, ink: _trials(axes, ink, facts))
    if facts.points:
        panels.append(lambda axes, ink: _points(axes, ink, facts))
    if not panels:
        return None

    def paint(figure: Figure, ink: Ink, wide: bool) -> None:
        shape = (1, len(panels)) if wide else (len(panels), 1)
        axes = figure.subplots(*shape, sharey=wide, squeeze=False).flatten()
        for i, (one, panel) in enumerate(zip(axes, panels, strict=True)):
            panel(one, ink)
            _levels(one, ink, facts)
            one.grid(True)
            if i == 0 or not wide:
                one.set_ylabel(f"{LEAD.title} against dense, {LEAD.unit}")

    legend = [Key(BEST, "this profile, certified", "star")] if facts.points else []
    kinds = {p.kind for p in facts.points}
    legend += [Key(TUNED, "other presets", "dot")] if "preset" in kinds else []
    legend += [Key(PAPER_WAY, "the paper's setting", "square")] if "paper" in kinds or _has_paper(facts) else []
    legend += [Key(MUTED, "other ways", "diamond")] if "other" in kinds else []
    if facts.trials is not None:
        legend += [
            Key(TUNED, "trial", "small"), Key(MUTED, "trial given up early", "ring"), Key(TUNED, "front of the trials", "line"),
            Key(BEST, "fastest trial that met the bound", "circled"),
        ]  # fmt: skip
    legend += [Key(TEXT, "what the bound had to reach", "dash")] if _required(facts) is not None else []
    alt = "Speed-up against PSNR. " + "; ".join(f"{p.name}: {p.speedup.median:.2f}x at {p.mean:.2f} dB" for p in facts.points)
    return _chart("front", paint, (3.7, 3.3 * len(panels)), alt, legend)


def _has_paper(facts: Facts) -> bool:
    return facts.trials is not None and "paper" in set(facts.trials["form"])


def _required(facts: Facts) -> float | None:
    evidence = facts.profile.evidence
    return next((m.required for name, m in evidence.metrics if name == LEAD.name), None) if evidence else None


def _levels(axes: Axes, ink: Ink, facts: Facts) -> None:
    """The bound that was asked for."""
    required = _required(facts)
    if required is not None:
        axes.axhline(required, color=ink(TEXT), linewidth=1, dashes=(4, 3), zorder=1)


def _trials(axes: Axes, ink: Ink, facts: Facts) -> None:
    table: Any = facts.trials
    speed, close, complete = 1 / table["time_ratio"], table[LEAD.name], table["complete"]
    axes.set_title(f"{len(table)} trials, on search pairs", loc="left")
    axes.set_xlabel("speed-up of what attention can change")
    axes.scatter(speed[~complete], close[~complete], s=22, facecolors="none", edgecolors=ink(MUTED), linewidths=1, zorder=2)
    axes.scatter(speed[complete], close[complete], s=22, color=ink(TUNED), zorder=3)
    paper = table["form"] == "paper"
    axes.scatter(speed[paper], close[paper], s=46, color=ink(PAPER_WAY), marker="s", zorder=4)
    if "front" in table:
        best = sorted((s, c) for s, c, on in zip(speed, close, table["front"], strict=True) if str(on) == "True")
        axes.plot([s for s, _ in best], [c for _, c in best], color=ink(TUNED), linewidth=1.2, zorder=2)
    met = table[complete & (table["shortfall_db"] <= 0)]
    if len(met):
        row = met.loc[met["time_ratio"].idxmin()]
        at = [1 / row["time_ratio"]], [row[LEAD.name]]
        axes.scatter(*at, s=110, facecolors="none", edgecolors=ink(BEST), linewidths=1.8, zorder=5)


def _points(axes: Axes, ink: Ink, facts: Facts) -> None:
    axes.set_title("whole pictures, on held-out pairs", loc="left")
    axes.set_xlabel("speed-up of a whole picture (95 %)")
    for p in sorted(facts.points, key=lambda p: p.kind == "certified"):
        _point(axes, ink, p)
    axes.margins(0.18, 0.14)


def _point(axes: Axes, ink: Ink, p: Point) -> None:
    colour, s = ink(COLOURS[p.kind]), p.speedup
    down = p.mean - p.bound if p.bound is not None else 0.0
    axes.errorbar(
        [s.median], [p.mean], xerr=[[s.median - s.low], [s.high - s.median]], yerr=[[max(down, 0.0)], [0.0]], color=colour,
        marker=MARKS[p.kind], markersize=12 if p.kind == "certified" else 7, linewidth=1.4, capsize=2, zorder=4,
    )  # fmt: skip
    axes.annotate(p.name, (s.median, p.mean), xytext=(7, 6), textcoords="offset points", color=ink(TEXT))


def times(facts: Facts) -> Chart | None:
    """A picture's time by scale, dense above tuned."""
    parts = facts.parts
    if not parts:
        return None
    colours = [DENSE if p.scale is None else SERIES[i % len(SERIES)] for i, p in enumerate(parts)]
    unit, factor, say = _unit(max(sum(p.dense_ms for p in parts), sum(p.tuned_ms for p in parts)))
    sums = [sum(p.dense_ms for p in parts) * factor, sum(p.tuned_ms for p in parts) * factor]

    def paint(figure: Figure, ink: Ink, wide: bool) -> None:
        axes = figure.subplots()
        left = [0.0, 0.0]
        for part, colour in zip(parts, colours, strict=True):
            widths = [part.dense_ms * factor, part.tuned_ms * factor]
            axes.barh(["dense", "tuned"], widths, left=left, color=ink(colour), edgecolor=ink(PAPER), linewidth=1.2, height=0.62)
            for y, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width > (0.07 if wide else 0.14) * max(sums):
                    axes.text(start + width / 2, y, say(width), ha="center", va="center", color=ink("var(--on-fill)"))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate(left):
            axes.text(total + 0.01 * max(sums), y, f"{say(total)} {unit}", va="center", fontweight="bold", color=ink(TEXT))
        axes.set_xlim(0, max(sums) * (1.1 if wide else 1.24))
        axes.invert_yaxis()
        what = "a picture" if facts.profile.generation else "in all layers"
        axes.set_xlabel(f"{'seconds' if unit == 's' else unit} {what}{', predicted' if facts.predicted else ''}")
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(True, axis="x")

    alt = f"Time by scale: dense {say(sums[0])} {unit}, tuned {say(sums[1])} {unit}"
    return _chart("times", paint, (1.9, 2.1), alt, [Key(c, p.label) for c, p in zip(colours, parts, strict=True)])


def steps(facts: Facts) -> Chart | None:
    """The traces' time by scale and step, stacked."""
    if not facts.traces:
        return None
    names, rows = facts.steps
    colours = {step: SERIES[i % len(SERIES)] for i, step in enumerate(names)} | {"rest": DENSE, "other": MUTED}
    bars = [(label.split(" (")[0], trace, ms) for label, found in rows.items() for trace, ms in found]
    unit, factor, say = _unit(max(sum(ms.values()) for _, _, ms in bars))

    def paint(figure: Figure, ink: Ink, wide: bool) -> None:
        axes, left = figure.subplots(), [0.0] * len(bars)
        for step in names:
            widths = [ms[step] * factor for _, _, ms in bars]
            look: Any = {"color": ink(colours[step]), "edgecolor": ink(PAPER), "linewidth": 0.8, "height": 0.7}
            axes.barh(range(len(bars)), widths, left=left, **look)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate(left):
            axes.text(total + 0.01 * max(left), y, say(total), va="center", color=ink(TEXT))
        axes.set_yticks(range(len(bars)), [_short(f"{scale}, {trace}", 34 if wide else 20) for scale, trace, _ in bars])
        axes.set_xlim(0, max(left) * 1.15 or 1)
        axes.invert_yaxis()
        axes.set_xlabel(f"{'seconds' if unit == 's' else unit}, one traced run each")
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(True, axis="x")

    alt = f"Time of {len(facts.traces)} traced runs by scale and step"
    return _chart("steps", paint, (0.9 + 0.32 * len(bars), 0.9 + 0.34 * len(bars)), alt, [Key(colours[s], s) for s in names])


def speedups(facts: Facts) -> Chart | None:
    """Dense over tuned for each scale's attention, and the whole picture, with 95 % intervals. None where none was measured."""
    rows = [(facts.scale_name(r.scale_index), r.speedup, r.scale_index in facts.demoted) for r in facts.profile.rows if r.speedup]
    whole = facts.profile.generation
    rows += [("whole picture", whole.speedup, False)] if whole else []
    if not rows:
        return None

    def paint(figure: Figure, ink: Ink, wide: bool) -> None:
        axes = figure.subplots()
        for y, (name, s, demoted) in enumerate(rows):
            colour = ink(MUTED if demoted else BEST if name == "whole picture" else TUNED)
            axes.errorbar([s.median], [y], xerr=[[s.median - s.low], [s.high - s.median]], color=colour, marker="o", markersize=7,
                          markerfacecolor="none" if demoted else colour, linewidth=2.2, capsize=4)  # fmt: skip
            words = f"{s.median:.2f}x{' (runs dense)' if demoted else ''}"
            behind = {"facecolor": ink(PAPER), "edgecolor": "none", "pad": 1.5}  # the line at 1 must not strike it through
            look: Any = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "color": ink(TEXT), "bbox": behind}
            axes.annotate(words, (s.high, y), **look)
        axes.axvline(1, color=ink(TEXT), linewidth=1, dashes=(4, 3), zorder=1)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        most = max(s.high for _, s, _ in rows)
        axes.set_xlim(0, most * (1.12 if wide else 1.3))
        axes.set_xlabel("times as fast as dense (95 % interval)")
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(True, axis="x")

    alt = "Speed-up: " + "; ".join(f"{name} {s.median:.2f}x, {s.low:.2f} to {s.high:.2f}" for name, s, _ in rows)
    return _chart("speedups", paint, (0.8 + 0.36 * len(rows), 0.8 + 0.42 * len(rows)), alt, [])


def colour_of(kind: HeadKind) -> str:
    base, shade = KINDS.get(kind.kind, "var(--kind-other)"), SHADES[kind.shade % len(SHADES)]
    return f"color-mix(in srgb, {base}{shade})" if shade else base


def heads(facts: Facts) -> Chart | None:
    """Which head does what: layers down, heads across, a panel a scale. None where all are dense, or too many to see."""
    scales = facts.head_scales
    layers, width = facts.profile.workload.layers, facts.profile.workload.heads
    if not scales or layers * width * len(scales) > MOST_CELLS:
        return None

    def paint(figure: Figure, ink: Ink, wide: bool) -> None:
        across = min(len(scales), 3 if wide else 1)
        down = -(-len(scales) // across)
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for i, one in enumerate(axes):
            if i >= len(scales):
                one.set_visible(False)
                continue
            _map(one, ink, facts, scales[i], labelled=i % across == 0, lettered=width <= LETTERS)

    cell = 0.24 if width <= LETTERS else 0.1
    tall = 0.7 + max(layers * cell, 1.2)
    across = min(len(scales), 3)
    used = list(dict.fromkeys(facts.head_kinds.values()))
    legend = [Key(colour_of(k), k.name, "box", k.letter if width <= LETTERS else "") for k in used]
    alt = f"What each of {layers} x {width} heads does at scales {', '.join(map(str, scales))}"
    return _chart("heads", paint, (tall * -(-len(scales) // across), tall * len(scales)), alt, legend)


def _map(axes: Axes, ink: Ink, facts: Facts, scale: int, labelled: bool, lettered: bool) -> None:
    from matplotlib.collections import PolyCollection

    rows = facts.head_map(scale)
    cells: dict[HeadKind, list[list[tuple[float, float]]]] = {}
    for layer, row in enumerate(rows):
        at = 0
        for kind, members in groupby(row):  # neighbours alike are one rectangle: a big model's map stays small
            n = len(list(members))
            sides = [(at + i, at + i + 1) for i in range(n)] if lettered else [(at, at + n)]
            cells.setdefault(kind, []).extend([(a, layer), (b, layer), (b, layer + 1), (a, layer + 1)] for a, b in sides)
            at += n
    for kind, boxes in cells.items():
        axes.add_collection(PolyCollection(boxes, facecolors=ink(colour_of(kind)), edgecolors=ink(PAPER), linewidths=0.5))
    if lettered:
        for layer, row in enumerate(rows):
            for head, kind in enumerate(row):
                colour = ink(MUTED if kind.kind == "dense" else "var(--on-fill)")
                axes.text(head + 0.5, layer + 0.5, kind.letter, ha="center", va="center", color=colour, in_layout=False)
    axes.set_xlim(0, len(rows[0]))
    axes.set_ylim(len(rows), 0)
    axes.set_title(facts.scale_name(scale), loc="left")
    axes.set_xlabel("head")
    for set_ticks, n in ((axes.set_xticks, len(rows[0])), (axes.set_yticks, len(rows))):
        step = max(1, round(n / 8))
        shown = range(0, n, step)
        set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if labelled:
        axes.set_ylabel("layer")


def _unit(most_ms: float) -> tuple[str, float, Callable[[float], str]]:
    """The unit for times up to so many ms, what turns ms into it, and how a number of it is written."""
    digits = 2 if most_ms >= 2000 or most_ms < 10 else 1 if most_ms < 100 else 0
    return ("s" if most_ms >= 2000 else "ms"), (1e-3 if most_ms >= 2000 else 1.0), lambda x: f"{x:.{digits}f}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"
