"""From options to policies: the paper's fixed setting, the menu a search chooses from, and how a budget is spent.

Each (layer, head, scale) may take any option of the menu. What an option costs in time and error is measured once, on
a capture, into a `OptionTable`; a policy then falls out of prices: every head takes the choice (an option at each scale) with the
least time + price[scale] * error. The search only turns the prices and a few structural knobs.
"""

from __future__ import annotations

import itertools
import math
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.policy import Policy, Rule, Step
from sparvar_kernels.variants import Cs4a, Csla, Dense, NearFar, Pooled, Reuse, Variant
from sparvar_tune.generation import CacheBudget, DropUnconditional, Precision, PruneTokens, SkipScales

PAPER_WINDOWS = (1, 1, 3, 5, 7)  # the last five key scales; the ones before are sinks or unseen
WIDE_WINDOWS = (1, 3, 5, 9, 13)
PAPER_BANDS = (7, 9)
PAPER_SOURCE = "the paper's fixed setting (arXiv 2602.04361), carried to this schedule"
UNVERIFIED = "the policy's fidelity on this model was not measured: no activations of it were at hand"
SPARSE_SCALES = 3  # the paper touches the last three scales
PAPER_SCALES = 6  # fewer do not hold its sinks, its windows and a decision scale
SKIP = "drop last scale"
TOKENS, KEYS = "tokens", "cached keys"
THIN_SHARES = (0.75, 0.5)  # of the last scale's tokens, or of the keys before it, that are kept: the first harms least
TILES = ("8x16", "8x8")  # query tiles of the search, on the last grid
SHARES, SAMPLE = (0.06, 0.12), 4  # of keys kept by CS4A, which ranks them by every fourth query's mass
# (cells, near, query tile on the last grid) of near-far heads, from cheap to exact: on pocketvar all are on the front
NEAR_FAR = ((4, 0, "16x16"), (6, 0, "16x16"), (10, 0, "8x8"), (8, 1, "8x8"), (12, 1, "8x8"))


def paper_sinks(schedule: ScaleSchedule) -> int:
    """Five scales when the first is 1x1; where a text prefix stands in for it (HART) four and the prefix.

    Of short schedules all but the last, where a window would otherwise hide nothing.
    """
    return min(len(schedule) - 1, 5 if schedule.grids[0] == (1, 1) else 4)


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
    if n < PAPER_SCALES:
        raise ValueError(f"{n} scales: the paper's setting needs at least {PAPER_SCALES}")
    first = decision_scale(schedule)
    cs4a_layers = min(11, round(layers * 11 / 32))
    rules: list[Rule] = []
    if cs4a_layers:
        cs4a = Cs4a(first, 0.2, Tile(0, 192), "index", bands=PAPER_BANDS)
        rules += [Rule(s, "A", cs4a) for s in range(first + 1, n)]
    csla = Csla(paper_windows(schedule), paper_sinks(schedule), Tile(0, 128), "block128")
    rules += [Rule(s, "B", csla) for s in range(first, n)]
    return Policy(("A" * heads,) * cs4a_layers + ("B" * heads,) * (layers - cs4a_layers), tuple(rules))


def fixed_points(
    schedule: ScaleSchedule, layers: int, heads: int, shipped: Mapping[str, Policy] | None = None,
    can: Collection[str] = (SkipScales.kind,), formats: Sequence[str] = (),
) -> dict[str, Policy]:  # fmt: skip
    """Name -> policy a search looks at first: `shipped` ones, as they are and with products of 8 bits, the paper's where the
    schedule is long enough, and those of `step_menu`, whose attention is dense."""
    out = dict(shipped or {})
    if formats and Precision.kind in can:
        first, fmt = decision_scale(schedule), formats[0]
        out |= {
            f"{name}, {fmt} products from {s}": replace(policy, steps=(*policy.steps, Precision(s, ((0, layers - 1),), fmt)))
            for name, policy in out.items() if not {step.kind for step in policy.steps} & {Precision.kind, CacheBudget.kind}
            for s in (first, first + 1)
        }  # fmt: skip
    if len(schedule) >= PAPER_SCALES:
        out["paper"] = paper_policy(schedule, layers, heads)
    dense = Policy(("A" * heads,) * layers)
    return out | {name: replace(dense, steps=option.steps) for name, option in step_menu(schedule, can, layers, formats).items()}


@dataclass(frozen=True)
class StepOption:
    """Generation steps that a search may take together. after: weaker options; where one of them misses the bound by itself,
    this one does so too and is not looked at.
    """

    steps: tuple[Step, ...]
    after: tuple[str, ...] = ()


def step_menu(
    schedule: ScaleSchedule, can: Collection[str], layers: int, formats: Sequence[str] = ()
) -> dict[str, StepOption]:  # fmt: skip
    """Name -> steps for who can do steps of the kinds `can`: the last scale left out, the unconditional half dropped from one of
    the last scales on, and both; tokens or cached keys thinned at the last scale, where no rule may stand then; the half dropped
    early and half of the cached keys cut, which on emojivar pay together; products of 8-bit numbers alone, and of the first of
    `formats` with either.
    """
    options: dict[str, StepOption] = {}
    skip, last = SkipScales.last(schedule), len(schedule) - 1
    if SkipScales.kind in can:
        options[SKIP] = StepOption((skip,))
    options |= {name: option for name, option in _thinned(schedule, layers).items() if option.steps[0].kind in can}
    scaled = [_scaled(schedule, layers, fmt) for fmt in formats if Precision.kind in can]
    options |= {name: option for each in scaled for name, option in each.items()}
    narrow = next(reversed(scaled[0])) if scaled else None  # the boldest of its kind
    if narrow and SKIP in options:
        options[f"{narrow}, {SKIP}"] = StepOption((skip, *options[narrow].steps), (SKIP, narrow))
    if DropUnconditional.kind not in can:
        return options
    for s in range(last, decision_scale(schedule) - 1, -1):  # the latest saves and harms least
        options[_half(s)] = StepOption((DropUnconditional(s),), (_half(s + 1),) if s < last else ())
    with_half = {SKIP: options[SKIP]} if SKIP in options else {}
    with_half |= {name: option for name, option in options.items() if name in (_thin(THIN_SHARES[-1], KEYS, last), narrow)}
    for name, option in with_half.items():
        for s in range(last - 1, decision_scale(schedule) - 1, -1):
            options[f"{_half(s)}, {name}"] = StepOption((*option.steps, DropUnconditional(s)), (_half(s), name))
    return options


def _scaled(schedule: ScaleSchedule, layers: int, fmt: str) -> dict[str, StepOption]:
    """Products of 8 bits from the last scale on, then from the decision scale on; all layers but the first and the last."""
    last, first = len(schedule) - 1, decision_scale(schedule)
    inner = ((1, layers - 2),) if layers > 2 else ((0, layers - 1),)
    weak, bold = (f"{fmt} products from {s}" for s in (last, first))
    return {weak: StepOption((Precision(last, inner, fmt),)), bold: StepOption((Precision(first, inner, fmt),), (weak,))}


def _thinned(schedule: ScaleSchedule, layers: int) -> dict[str, StepOption]:
    """Pruning and budgets of the last scale, each weaker one before the stronger; those that the schedule has room for."""
    last, made = len(schedule) - 1, dict[str, StepOption]()
    edge = max(1, round(layers * 3 / 32))  # FastVAR leaves the first 3 of Infinity-2B's 32 layers whole
    tokens, past = schedule.num_queries(last), schedule.num_keys(last) - schedule.num_queries(last)
    before: dict[str, tuple[str, ...]] = {}
    for share in THIN_SHARES:
        steps: tuple[Step, ...] = (
            PruneTokens(last, (round(tokens * share),), last - 1, edge, layers - 1),
            CacheBudget(last, ((round(past * share),) * layers,)),
        )  # fmt: skip
        for step, what in zip(steps, (TOKENS, KEYS), strict=True):
            if step.why_not(schedule, layers) is None:
                name = _thin(share, what, last)
                made[name] = StepOption((step,), before.get(step.kind, ()))
                before[step.kind] = (name,)
    return made


def _thin(share: float, what: str, s: int) -> str:
    return f"{share:.0%} of {what} at {s}".replace("%", " %")


def _half(s: int) -> str:
    return f"drop half from {s}"


def decision_scale(schedule: ScaleSchedule) -> int:
    """Where heads that choose keys choose them: the first scale a searched policy may act on (the paper's third-last).

    Raises ValueError for schedules of fewer than three scales.
    """
    if len(schedule) < SPARSE_SCALES:
        raise ValueError(f"{len(schedule)} scales: a policy acts on the last {SPARSE_SCALES}, want at least as many")
    return len(schedule) - SPARSE_SCALES


def menu(schedule: ScaleSchedule, scale_index: int) -> dict[str, Variant]:
    """Name -> variant for one scale from the decision scale on, "dense" first; at the decision scale what needs no decision.

    Options that show every key, as all windows do at a short schedule's first scales, and illegal ones are left out.
    """
    sinks, decision = paper_sinks(schedule), decision_scale(schedule)
    narrow, wide = _windows(schedule, PAPER_WINDOWS), _windows(schedule, WIDE_WINDOWS)
    options: dict[str, Variant] = {"dense": Dense()}
    for first in (max(0, len(schedule) - 4), max(0, len(schedule) - 6)):
        options |= {f"pooled {factor} from {first}": Pooled(first, factor) for factor in (2, 4)}
    for cells, near, text in NEAR_FAR:
        tile = Tile.parse(text).scaled(schedule.grids[-1], schedule.grids[scale_index])
        options[f"near-far {cells} + {near} {text}"] = NearFar(cells, near, tile)
    if scale_index > decision:
        options["reuse"] = Reuse(decision)
    for text in TILES:
        tile = Tile.parse(text).scaled(schedule.grids[-1], schedule.grids[scale_index])
        options |= {f"csla {text}": Csla(narrow, sinks, tile), f"csla wide {text}": Csla(wide, sinks, tile)}
        if scale_index > decision:
            options[f"csla {text} + residual"] = Csla(narrow, sinks, tile, decision_scale=decision)
            options |= {f"cs4a {share:g} {text}": Cs4a(decision, share, tile, sample=SAMPLE) for share in SHARES}
    return {
        name: variant for name, variant in options.items()
        if Policy.uniform(1, 1, {scale_index: variant}).why_not(schedule, 1, 1) is None
        and not (isinstance(variant, Csla) and scale_index < sinks)
        and not (isinstance(variant, NearFar) and max(map(max, schedule.grids[: scale_index + 1])) <= variant.cells)
    }  # fmt: skip


@dataclass(frozen=True)
class OptionTable:
    """What each option of the menu costs, measured on a capture.

    error[scale][option][layer][head]: squared error of the head's output over the layer's squared output.
    time_ms[scale][option]: one head of one layer. decision_ms[option]: what a head that uses it later adds to its dense
    pass at the decision scale (ranking keys, making the residual); options that decide nothing are not in it.
    """

    error: Mapping[int, Mapping[str, tuple[tuple[float, ...], ...]]]
    time_ms: Mapping[int, Mapping[str, float]]
    decision_ms: Mapping[str, float]

    def choices(self) -> dict[tuple[str, ...], float]:
        """Everything one head may do, an option per scale, with its time in ms: what decides needs dense before it."""
        first, *later = self.time_ms
        out = {}
        for choice in itertools.product(*self.time_ms.values()):
            deciding = {o for o in choice if o in self.decision_ms}
            if choice[0] == "dense" or not deciding:
                times = (self.time_ms[s][o] for s, o in zip((first, *later), choice, strict=True))
                out[choice] = sum(times) + sum(self.decision_ms[o] for o in deciding)
        return out

    def under(self, steps: tuple[Step, ...]) -> OptionTable:
        """The table of a generation with these steps: at a scale that is left out nothing is to be chosen or gained, where tokens
        are left out heads are dense, and where the unconditional half is dropped a head takes half the time.
        """
        skipped = {s for step in steps for s in step.skips}
        halved = min((step.from_scale for step in steps if step.kind == DropUnconditional.kind), default=max(self.time_ms) + 1)
        thin = min((step.from_scale for step in steps if step.thins), default=max(self.time_ms) + 1)
        ruled = {
            s: {"dense": 0.0 if s in skipped else options["dense"]} if s in skipped or s >= thin else options
            for s, options in self.time_ms.items()
        }
        error = {s: {o: options[o] for o in ruled[s]} for s, options in self.error.items()}
        time_ms = {s: {o: ms / 2 if s >= halved else ms for o, ms in options.items()} for s, options in ruled.items()}
        first = next(iter(self.time_ms))
        decision_ms = {o: ms / 2 if first >= halved else ms for o, ms in self.decision_ms.items()}
        return OptionTable(error, time_ms, decision_ms)

    def most_saved(self, steps: tuple[Step, ...], layers: int, heads: int) -> float:
        """The milliseconds of a picture that attention can save at most on top of these steps, whatever the error."""
        table = self.under(steps)
        dense = sum(options["dense"] for options in table.time_ms.values())
        return layers * heads * (dense - min(table.choices().values()))

    def damage(self, choice: tuple[str, ...], layer: int, head: int, prices: Mapping[int, float]) -> float:
        return sum(prices[s] * self.error[s][o][layer][head] for s, o in zip(self.error, choice, strict=True))


def assign(
    table: OptionTable, schedule: ScaleSchedule, prices: Mapping[int, float], tilt: float, steps: tuple[Step, ...] = ()
) -> Policy:  # fmt: skip
    """The policy in which every head takes the choice of least time + price * error (the Lagrangian of a budget).

    prices[scale]: what one unit of error is worth, in dense times of one head at the last scale.
    tilt: errors of the last layer weigh exp(tilt), of the first exp(-tilt). steps: of the generation around it.
    """
    scales = list(table.time_ms)
    layers, heads = (len(x) for x in (table.error[scales[0]]["dense"], table.error[scales[0]]["dense"][0]))
    unit = table.time_ms[scales[-1]]["dense"]  # makes prices mean the same on a CPU and on a GPU
    table = table.under(steps)

    def best(choices: Mapping[tuple[str, ...], float], layer: int, head: int) -> tuple[str, ...]:
        weight = unit * math.exp(tilt * (2 * layer / max(1, layers - 1) - 1))
        return min(choices, key=lambda c: choices[c] + weight * table.damage(c, layer, head, prices))

    everything = table.choices()
    chosen = {(layer, head): best(everything, layer, head) for layer in range(layers) for head in range(heads)}
    common = Counter(chosen.values()).most_common(len(string.ascii_letters))
    if len(set(chosen.values())) > len(common):  # a policy has so many letters; rare choices give way to the nearest
        kept = {c: everything[c] for c, _ in common}
        chosen = {at: c if c in kept else best(kept, *at) for at, c in chosen.items()}
    letters = dict(zip(dict.fromkeys(chosen.values()), string.ascii_letters, strict=False))
    options = {s: menu(schedule, s) for s in scales}
    rules = [
        Rule(s, letter, options[s][name])
        for choice, letter in letters.items()
        for s, name in zip(scales, choice, strict=True)
        if name != "dense"
    ]
    rows = ("".join(letters[chosen[layer, head]] for head in range(heads)) for layer in range(layers))
    return Policy(tuple(rows), tuple(sorted(rules, key=lambda r: (r.scale_index, r.head_class))), steps)
