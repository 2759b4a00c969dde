"""From a few finished trials to the prices that are worth a trial next: what an error does to the picture, as a law of the model.

A bit of the picture flips where an error of attention outweighs its margin, so flips go with the error's size and not with its
square. With E_s the squared error of all heads at scale s, measured on pocketvar over fifteen policies to a few per cent:

    mse ** 1.5 = rest + sum over s of a_s * E_s ** 0.75

mse: of the picture against dense, from the mean PSNR; rest: of generation steps alone. The a_s are fitted to a search's trials,
leaning on the ratio that pocketvar has. Given them, every price triple has a predicted time and a predicted mse, and the fastest
that just keeps the bound is proposed. A trial then says how far that was off, and the next fit knows it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sparvar_kernels.policy import Step
from sparvar_tune.policy_search.menu import OptionTable, StepOption
from sparvar_tune.policy_search.planned_trials import common_price
from sparvar_tune.policy_search.trial import DEFAULT_TILT, HIGH_PRICE, LOW_PRICE, FinishedTrial, Knobs, Verdict

RATIO = (1.65, 1.0, 1.1)  # a_s of pocketvar, third-last scale first, up to a factor
LEAN = 0.3  # what the ratio counts for, in trials
NEAR_DB = 3.0  # trials farther from the bound say little of what happens at it
FEWEST = 2  # trials, for a fit
COARSE, FINE = 12, 7  # prices a scale, over the whole range and then around the best
MOST = 250_000  # (head, choice) pairs of one step of the grid; of larger models some heads stand for all
TRIED = 0.04  # decades: a trial so near says as much
PROPOSALS = 6  # for the same generation steps; then it is the sampler's turn


class Foresight:
    """Callable: finished trials and the name of the steps that attention comes on top of ("": none) -> knobs, or None where
    nothing better is foreseen than what was tried.
    """

    def __init__(self, table: OptionTable, steps: Mapping[str, StepOption]) -> None:
        self.table, self.steps = table, steps
        self.heads: dict[str, _Heads] = {}
        self.said: dict[str, tuple[list[FinishedTrial], Knobs | None]] = {}  # by steps: a sampler that repeats itself asks again

    def __call__(self, found: Sequence[FinishedTrial], name: str = "") -> Knobs | None:
        alone = next((f.verdict for f in found if f.knobs.form == name), None)
        near = [f for f in found if f.knobs.form == "priced" and f.knobs.steps == name and abs(f.verdict.shortfall_db) < NEAR_DB]
        if len(near) < FEWEST or (name and alone is None) or self._proposed(found, name) >= PROPOSALS:
            return None
        if self.said.get(name, ([], None))[0] != near:
            self.said[name] = near, self._foreseen(near, alone, name)
        return self.said[name][1]

    def _foreseen(self, near: list[FinishedTrial], alone: Verdict | None, name: str) -> Knobs | None:
        if name not in self.heads:
            self.heads[name] = _Heads(self.table, self.steps[name].steps if name else ())
        heads, rest = self.heads[name], _damage(alone.lead) if alone else 0.0
        closest = min(near, key=lambda f: abs(f.verdict.shortfall_db)).verdict
        allowed = _damage(closest.lead + closest.shortfall_db) - rest
        rows = np.stack([heads.run(_by_scale(f.knobs), f.knobs.tilt)[0] for f in near]) ** 0.75
        weights = fitted(rows, np.array([_damage(f.verdict.lead) - rest for f in near]))
        best = heads.fastest(weights, allowed)
        if best is None or any(np.abs(np.log10(_by_scale(f.knobs)) - np.log10(best)).max() < TRIED for f in near):
            return None
        third, second, last = (float(price) for price in best)
        return Knobs("priced", last, second, third, DEFAULT_TILT, name)

    @staticmethod
    def _proposed(found: Sequence[FinishedTrial], name: str) -> int:
        """How many trials came from here: a sampler's tilt is another one, and the common price has a ratio of its own."""
        priced = [f.knobs for f in found if f.knobs.form == "priced" and f.knobs.steps == name]
        return sum(knobs.tilt == DEFAULT_TILT and knobs != common_price(knobs.price_last, name) for knobs in priced)


def _damage(lead: float) -> float:
    """mse ** 1.5 of a PSNR (dB); of 30 dB 1."""
    return float(10 ** (-0.15 * (lead - 30)))


def _by_scale(knobs: Knobs) -> np.ndarray:
    return np.array([knobs.price_third, knobs.price_second, knobs.price_last])


def fitted(rows: np.ndarray, damages: np.ndarray) -> np.ndarray:
    """[scales] a_s > 0 of damages [n] = rows [n, scales] @ a, by relative least squares that lean on RATIO."""
    ratio = np.array(RATIO)
    size = np.median(damages.clip(1e-9) / (rows @ ratio).clip(1e-12))
    relative = damages.clip(1e-9)[:, None]
    left = np.concatenate([rows * (ratio * size) / relative, math.sqrt(LEAN) * np.eye(len(ratio))])
    right = np.concatenate([np.ones(len(rows)), np.full(len(ratio), math.sqrt(LEAN))])
    share = np.linalg.lstsq(left, right, rcond=None)[0]
    return np.asarray(share.clip(0.1) * ratio * size)


class _Heads:
    """What every head may choose, as tensors, for a generation with these steps."""

    def __init__(self, table: OptionTable, steps: tuple[Step, ...]) -> None:
        scales, self.unit = list(table.time_ms), table.time_ms[max(table.time_ms)]["dense"]
        table = table.under(steps)
        choices, dense = table.choices(), table.error[scales[0]]["dense"]
        at = [(layer, head) for layer in range(len(dense)) for head in range(len(dense[0]))]
        some = at[:: max(1, math.ceil(len(at) * len(choices) / MOST))]
        self.each = len(at) / len(some)  # heads that one stands for
        self.depth = torch.tensor([2 * layer / max(1, len(dense) - 1) - 1 for layer, _ in some]).double()
        self.error = torch.tensor(
            [[[table.error[s][c[i]][layer][head] for c in choices] for layer, head in some] for i, s in enumerate(scales)]
        ).double()  # [scales, heads, choices]
        self.time = torch.tensor(list(choices.values())).double()

    def run(self, prices: Sequence[float] | np.ndarray, tilt: float) -> tuple[np.ndarray, float]:
        """E of each scale, where late layers weigh more, and the ms of a picture's attention, of what `assign` makes of these."""
        priced = self.error * (torch.as_tensor(prices).double()[:, None] * (self.unit * (tilt * self.depth).exp()))[..., None]
        chosen = (self.time + priced.sum(0)).argmin(1)
        errors = self.error.gather(2, chosen.expand(len(self.error), -1)[..., None])[..., 0]
        seen = (errors * (DEFAULT_TILT * self.depth).exp()).sum(1)
        return self.each * seen.numpy(), self.each * float(self.time[chosen].sum())

    def fastest(self, weights: np.ndarray, allowed: float) -> np.ndarray | None:
        """The prices [scales] of the fastest policy foreseen to do no more damage than allowed, None where there is none."""
        low, high = math.log10(LOW_PRICE), math.log10(HIGH_PRICE)
        best, reach = None, (high - low) / (COARSE - 1)
        for points in (COARSE, FINE):
            axes = [np.linspace(low, high, points)] * 3 if best is None else [
                np.linspace(at - reach, at + reach, points).clip(low, high) for at in np.log10(best)
            ]  # fmt: skip
            found = [(ms, prices) for prices in itertools.product(*(10**axis for axis in axes))
                     for errors, ms in (self.run(prices, DEFAULT_TILT),) if errors**0.75 @ weights <= allowed]  # fmt: skip
            if not found:
                break
            best = np.array(min(found)[1])
        return best
