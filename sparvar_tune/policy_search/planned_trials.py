"""The trials that are planned, before it is the sampler's turn: the fixed points, one common price, what is foreseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from sparvar_tune.policy_search.trial import DEFAULT_TILT, HIGH_PRICE, LOW_PRICE, FinishedTrial, Knobs

FIXED_POINTS = ("paper", "drop last scale")
STEPS: Mapping[str, tuple[str, ...]] = {"drop last scale": ()}  # those of them that are generation steps alone
NO_LIMIT: Mapping[str, float] = {}  # to what attention may save on top of steps
FIRST_PRICE = 25.0  # where it begins
SLOPE_DB = 4.0  # dB that a decade of price buys, for the first steps: on pocketvar 3 to 5
PRICE_STEPS, CLOSE_ENOUGH = 6, 0.06  # trials, decades
LINES = 2  # of steps that leave room: the fastest get a common price of their own, the sampler looks at the others
LIE_DB = 2.0  # what a trial not finished (of another process, or failed) is taken to fall short by: so two look to both sides
# What an error does to the picture, measured on pocketvar by changing one scale at a time: it comes to 1.65 and 4.3 times as much
# at the second- and third-last scale as at the last.
SCALE_WEIGHTS = (1.0, 1.65, 4.3)


def next_planned(
    found: Sequence[FinishedTrial], settled: Collection[Knobs], points: Sequence[str] = FIXED_POINTS,
    steps: Mapping[str, tuple[str, ...]] = STEPS, saves: Mapping[str, float] = NO_LIMIT,
    foresee: Callable[[Sequence[FinishedTrial], str], Knobs | None] = lambda found, name: None,
) -> Knobs | None:  # fmt: skip
    """The fixed points, then one common price by interpolation, on every steps that leave room for it and on none, where most can
    be saved first, then what is foreseen of these. None when all is known. settled: under way or failed.
    """
    known = {f.knobs for f in found}
    within = roomy(found, steps)
    for form in points:
        seed = Knobs(form=form)
        if seed not in known and seed not in settled and set(steps.get(form, ())) <= set(within):
            return seed
    alone = {f.knobs.form: f.verdict.time_ratio for f in found} | {"": 1.0}
    lines = sorted((*roomy(found, steps, saves)[:LINES], ""), key=lambda name: alone[name] - saves.get(name, math.inf))
    common = next((knobs for name in lines if (knobs := _next_common_price(found, settled, name))), None)
    return common or next((knobs for name in lines if (knobs := foresee(found, name)) and knobs not in settled), None)


def roomy(found: Sequence[FinishedTrial], steps: Collection[str], saves: Mapping[str, float] = NO_LIMIT) -> list[str]:
    """The steps whose pictures are within the bound while attention is dense, the fastest first: errors add, so with others
    there is no need to try what attention may leave out. One that was given up because others are faster counts, but not where
    `saves` says that attention cannot make it the fastest any more.
    """
    met = [f for f in found if f.verdict.shortfall_db <= 0]
    alone, best = {f.knobs.form: f.verdict for f in met}, min((f.verdict.time_ratio for f in met), default=math.inf)
    room = (name for name in steps if name in alone and alone[name].time_ratio - saves.get(name, math.inf) <= best)
    return sorted(room, key=lambda name: alone[name].time_ratio)


def common_price(price: float, steps: str = "") -> Knobs:
    """One price, scales in a fixed ratio."""
    last, second, third = (min(price * weight, HIGH_PRICE) for weight in SCALE_WEIGHTS)
    return Knobs("priced", last, second, third, DEFAULT_TILT, steps)


def _next_common_price(found: Sequence[FinishedTrial], settled: Collection[Knobs], steps: str = "") -> Knobs | None:
    """Towards the cheapest common price that meets the constraint, by the shortfall's slope over the price's logarithm."""
    points = {f.knobs: f.verdict.shortfall_db for f in found}
    points |= {knobs: LIE_DB for knobs in settled if knobs not in points}
    line = {math.log10(k.price_last): short for k, short in points.items() if k == common_price(k.price_last, steps)}
    missed = max(((at, short) for at, short in line.items() if short > 0), default=(-math.inf, 0.0))  # the dearest
    met = min(((at, short) for at, short in line.items() if short <= 0), default=(math.inf, 0.0))  # the cheapest
    if not line:
        return common_price(FIRST_PRICE, steps)
    if len(line) >= PRICE_STEPS or met[0] - missed[0] < CLOSE_ENOUGH:
        return None
    if math.isinf(missed[0] + met[0]):  # one side is still open: go as far as a typical slope says, a decade at most
        at, short = met if math.isinf(missed[0]) else missed
        at += min(1.0, max(-1.0, short / SLOPE_DB + (0.1 if short > 0 else -0.1)))
    else:
        at = met[0] + min(0.8, max(0.2, met[1] / (met[1] - missed[1]))) * (missed[0] - met[0])
    return common_price(10**at, steps) if math.log10(LOW_PRICE) <= at <= math.log10(HIGH_PRICE) else None
