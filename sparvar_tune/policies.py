"""From options to policies: the paper's fixed setting, the menu a search chooses from, and how a budget is spent.

Each (layer, head, scale) may take any option of the menu. What an option costs in time and error is measured once, on
a capture, into a `Table`; a policy then falls out of prices: every head takes the option with the least
time + price[scale] * error. The search only turns the prices and a few structural knobs.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from sparvar_kernels.policy import Policy, Rule
from sparvar_kernels.scales import ScaleSchedule, Tile
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant

PAPER_WINDOWS = (1, 1, 3, 5, 7)  # the last five key scales; the ones before are sinks or unseen
WIDE_WINDOWS = (1, 3, 5, 9, 13)
PAPER_BANDS = (7, 9)
PAPER_SOURCE = "the paper's fixed setting (arXiv 2602.04361), carried to this schedule"
UNVERIFIED = "the policy's fidelity on this model was not measured: no activations of it were at hand"
SPARSE_SCALES = 3  # the paper touches the last three scales


def paper_sinks(schedule: ScaleSchedule) -> int:
    """Five scales when the first is 1x1; where a text prefix stands in for it (HART) four and the prefix."""
    return min(len(schedule), 5 if schedule.grids[0] == (1, 1) else 4)


def _windows(schedule: ScaleSchedule, last: tuple[int, ...]) -> tuple[int, ...]:
    return ((-1,) * len(schedule) + last)[-len(schedule) :]


def paper_windows(schedule: ScaleSchedule) -> tuple[int, ...]:
    """The side of the window on each key scale, negative where it is unseen."""
    return _windows(schedule, PAPER_WINDOWS)


def paper_policy(schedule: ScaleSchedule, layers: int, heads: int) -> Policy:
    """The paper's fixed setting in its exact forms, carried to `schedule` (its section 4 and public defaults).

    The first 11 layers (of 32; fewer in shallower models in proportion) are CS4A from the third-last scale on, the others
    CSLA over the last three scales. Raises ValueError for schedules of fewer than six scales.
    """
    n = len(schedule)
    if n < 6:
        raise ValueError(f"{n} scales: the paper's setting needs at least 6")
    first = n - SPARSE_SCALES
    cs4a_layers = min(11, round(layers * 11 / 32))
    rules: list[Rule] = []
    if cs4a_layers:
        cs4a = Cs4a(first, 0.2, Tile(0, 192), "index", bands=PAPER_BANDS)
        rules += [Rule(s, "A", cs4a) for s in range(first + 1, n)]
    csla = Csla(paper_windows(schedule), paper_sinks(schedule), Tile(0, 128), "block128")
    rules += [Rule(s, "B", csla) for s in range(first, n)]
    return Policy(("A" * heads,) * cs4a_layers + ("B" * heads,) * (layers - cs4a_layers), tuple(rules))


@dataclass(frozen=True)
class Frame:
    """The structural knobs of a menu: where keys are chosen, how queries are tiled, how often mass is sampled."""

    decision_scale: int
    tile: str  # on the last grid
    sample: int

    def sparse_scales(self, schedule: ScaleSchedule) -> range:
        return range(self.decision_scale + 1, len(schedule))


def frames(schedule: ScaleSchedule) -> tuple[Frame, ...]:
    """Every frame a search may use, the default first."""
    n = len(schedule)
    return (Frame(n - 3, "8x16", 4), Frame(n - 3, "8x8", 4))


def menu(schedule: ScaleSchedule, frame: Frame, scale_index: int) -> dict[str, Variant]:
    """Name -> variant for one sparse scale of a frame; "dense" comes first."""
    tile = Tile.parse(frame.tile).scaled(schedule.grids[-1], schedule.grids[scale_index])
    sinks, decision = paper_sinks(schedule), frame.decision_scale
    options: dict[str, Variant] = {"dense": Dense()}
    for share in (0.03, 0.06, 0.12):
        options[f"cs4a {share:g}"] = Cs4a(decision, share, tile, sample=frame.sample)
    options["csla"] = Csla(_windows(schedule, PAPER_WINDOWS), sinks, tile, decision_scale=decision)
    options["csla wide"] = Csla(_windows(schedule, WIDE_WINDOWS), sinks, tile, decision_scale=decision)
    for factor in (2, 4):
        options[f"pooled {factor}"] = Pooled(max(0, len(schedule) - 4), factor)
    options["reuse"] = Reuse(decision)
    return options


@dataclass(frozen=True)
class Table:
    """What each option costs in one frame, measured on a capture.

    error[scale][option][layer][head]: squared error of the head's output over the layer's squared output.
    time_ms[scale][option]: one head of one layer, with its share of the decision scale's extra work.
    """

    frame: Frame
    error: Mapping[int, Mapping[str, tuple[tuple[float, ...], ...]]]
    time_ms: Mapping[int, Mapping[str, float]]


def assign(table: Table, schedule: ScaleSchedule, prices: Mapping[int, float], tilt: float) -> Policy:
    """The policy in which every head takes the option of least time + price * error (the Lagrangian of a budget).

    prices[scale]: what one unit of error is worth, in dense times of one head at the last scale.
    tilt: errors of the last layer weigh exp(tilt), of the first exp(-tilt).
    """
    scales = list(table.frame.sparse_scales(schedule))
    layers = len(next(iter(next(iter(table.error.values())).values())))
    options = {s: menu(schedule, table.frame, s) for s in scales}
    unit = table.time_ms[scales[-1]]["dense"]  # makes prices mean the same on a CPU and on a GPU
    letters: dict[tuple[str, ...], str] = {}
    rows = []
    for layer in range(layers):
        weight = 2.718281828 ** (tilt * (2 * layer / max(1, layers - 1) - 1))
        row = ""
        for head in range(len(table.error[scales[0]]["dense"][layer])):
            choice = tuple(
                min(options[s], key=lambda o: table.time_ms[s][o] + prices[s] * unit * weight * table.error[s][o][layer][head])
                for s in scales
            )
            row += letters.setdefault(choice, string.ascii_letters[len(letters)])
        rows.append(row)
    rules = [
        Rule(s, letter, options[s][name])
        for choice, letter in letters.items()
        for s, name in zip(scales, choice, strict=True)
        if name != "dense"
    ]
    return Policy(tuple(rows), tuple(sorted(rules, key=lambda r: (r.scale_index, r.head_class))))


def describe(policy: Policy) -> str:
    """One line: how many heads do what at each scale that has a rule."""
    parts = []
    for s in sorted({r.scale_index for r in policy.rules}):
        counts: dict[str, int] = {}
        for layer, letters in enumerate(policy.heads):
            for head in range(len(letters)):
                name = short_name(policy.variant(layer, head, s))
                counts[name] = counts.get(name, 0) + 1
        parts.append(f"scale {s}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda x: -x[1])))
    if policy.skip_scales:
        parts.append(f"scales {policy.skip_scales} left out")
    return "; ".join(parts) or "dense everywhere"


def short_name(variant: Variant) -> str:
    """Such as "cs4a 5% 8x8" or "csla 1,1,3,5,7 8x16"."""
    if isinstance(variant, Cs4a):
        return f"cs4a {variant.top_k:.0%} {variant.tile}" + (" paper" if variant.keys == "index" else "")
    if isinstance(variant, Csla):
        sides = ",".join(str(w) for w in variant.windows if w >= 0)
        return f"csla {sides} {variant.tile}" + (" block128" if variant.form == "block128" else "")
    if isinstance(variant, Pooled):
        return f"pooled {variant.factor}x{variant.factor}"
    return variant.kind
