"""How close a sparse picture or attention output is to the dense one, and what a tuned policy must reach.

Pictures are compared with the same noise on both sides, so the only difference is the attention. Metrics are those of
catalog/metrics.py; the constraint is on the worse end of a one-sided confidence interval of the mean over held-out pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, variance

import torch
from torch import Tensor

from sparvar_tune.catalog.metrics import LEAD, METRICS, Metric, always, find_metric

CONFIDENCE = 0.95
Fidelity = Mapping[str, float]  # of one sparse picture against its dense twin: value by metric


def compare_pictures(sparse: Tensor, dense: Tensor, more: Sequence[Metric] = (), prompt: str = "") -> dict[str, float]:
    """Every metric that needs no weights, and those of `more`, of sparse [1, 3, H, W] against dense, both in 0..1 and drawn from
    `prompt`. Raises ValueError on other shapes or NaN.
    """
    if sparse.shape != dense.shape or sparse.ndim != 4 or sparse.shape[0] != 1:
        raise ValueError(f"pictures: got {tuple(sparse.shape)} and {tuple(dense.shape)}, want the same [1, 3, H, W]")
    if not bool(torch.isfinite(sparse).all() and torch.isfinite(dense).all()):
        raise ValueError("pictures: got NaN or infinity; the attention of one of them is broken")
    return {metric.name: metric.compare(sparse, dense, *([prompt] if metric.prompted else [])) for metric in (*always(), *more)}


def relative_l2(sparse: Tensor, dense: Tensor) -> float:
    """||sparse - dense|| / ||dense|| over everything, in fp64."""
    return float((sparse.double() - dense.double()).norm() / dense.double().norm().clamp(min=1e-300))


def recall_of_mass(q: Tensor, k: Tensor, scale: float, keys: Tensor) -> float:
    """Mean share of the dense softmax of queries q [Nq, D] over k [Nk, D] that falls on the positions `keys` [K]."""
    return float(torch.softmax(q.double() @ k.double().T * scale, -1)[:, keys.long()].sum(-1).mean())


def t_quantile(p: float, degrees: float) -> float:
    """Student's t quantile: by Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), 3 digits, from 5 degrees on; for fewer,
    where that is up to two times too small, from the integral itself.
    """
    if degrees < 5:
        return _few_degrees_quantile(p, degrees)
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**i for i, term in enumerate(terms))


@lru_cache(maxsize=4096)
def _few_degrees_quantile(p: float, degrees: float) -> float:
    """By bisection. With t = sqrt(degrees) tan(a) the density becomes cos(a)^(degrees - 1), which Simpson's rule integrates."""
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)

    def below(angle: float, steps: int = 256) -> float:
        h = angle / steps
        odd, even = (sum(math.cos(i * h) ** (degrees - 1) for i in range(first, steps, 2)) for first in (1, 2))
        return 0.5 + scale * h / 3 * (1 + 4 * odd + 2 * even + math.cos(angle) ** (degrees - 1))

    low, high = -math.pi / 2 + 1e-9, math.pi / 2 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def class_mean(values: Sequence[float], strata: Sequence[int]) -> float:
    """Mean of class means: what balanced pairs estimate, also where the last round of classes was not finished."""
    return fmean(map(fmean, _by_class(values, strata).values()))


def _by_class(values: Sequence[float], strata: Sequence[int]) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = {}
    for value, stratum in zip(values, strata, strict=True):
        groups.setdefault(stratum, []).append(value)
    return groups


def lower_bound(values: Sequence[float], strata: Sequence[int], confidence: float = CONFIDENCE) -> float:
    """One-sided lower confidence bound of the mean. -inf for fewer than two values.

    strata: the class of each value. Pairs are drawn class by class, each class as often as every other, so classes differ
    by design and not by chance: with two values or more of every class the bound is the stratified one (Cochran, Sampling
    Techniques, 5.4), the mean of class means less Student's t with Satterthwaite's degrees of freedom times its error.
    Otherwise it is the plain one, which also counts the classes' differences as chance.
    """
    if len(values) < 2:
        return -math.inf
    members = list(_by_class(values, strata).values())
    if min(map(len, members)) < 2:
        members = [list(values)]
    shares = [variance(found) / len(found) / len(members) ** 2 for found in members]
    total = sum(shares)
    if total == 0:
        return fmean(map(fmean, members))
    degrees = total**2 / sum(share**2 / (len(found) - 1) for share, found in zip(shares, members, strict=True))
    return fmean(map(fmean, members)) - t_quantile(confidence, degrees) * math.sqrt(total)


def worst_mean(metric: Metric, values: Sequence[float], strata: Sequence[int], confidence: float = CONFIDENCE) -> float:
    """One-sided confidence bound of the mean on the side away from dense; see `lower_bound`. Of a metric of the worst class: of
    that class's mean.

    For the worst class every class gets a bound of its own, from its own values, with the whole error probability, and the worst
    of them counts. They need not share it: to be too good, the worst bound must be too good for the class that truly is the
    worst, which one bound alone decides (an intersection-union test: Berger, Technometrics 24, 1982).
    """
    signed = [metric.sign * value for value in values]
    if not metric.worst_class:
        return metric.sign * lower_bound(signed, strata, confidence)
    return metric.sign * min(lower_bound(found, [0] * len(found), confidence) for found in _by_class(signed, strata).values())


def mean_of(metric: Metric, values: Sequence[float], strata: Sequence[int]) -> float:
    """The mean of class means, or of the class farthest from dense where the metric is of the worst class."""
    if not metric.worst_class:
        return class_mean(values, strata)
    return min(map(fmean, _by_class(values, strata).values()), key=lambda mean: metric.sign * mean)


def worst_class(metric: Metric, values: Sequence[float], strata: Sequence[int]) -> int:
    """The class whose mean is farthest from dense."""
    means = {label: fmean(found) for label, found in _by_class(values, strata).items()}
    return min(means, key=lambda label: metric.sign * means[label])


@dataclass(frozen=True)
class Constraint:
    """What a policy must reach: by metric, what the confidence bound of the mean over held-out pairs may not miss.

    more: metrics beside those that are always measured, with their weights.
    """

    bounds: Mapping[str, float]
    more: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        known = [name for m in METRICS.values() for name in (m.name, m.of_worst_class().name)]
        object.__setattr__(self, "bounds", {name: self.bounds[name] for name in known if name in self.bounds})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is certified of a policy: all that is measured, the worst class of PSNR, and what else is bound."""
        measured = (*always(), *self.more)
        bound = [find_metric(name) for name in self.bounds]
        return (*measured, LEAD.of_worst_class(), *(m for m in bound if m.worst_class and m.measured != LEAD.name))

    def why_not(self, pairs: int, classes: int, prompts: Sequence[object]) -> str | None:
        """Why so many held-out pairs of a model of `classes`, drawn from `prompts` if from text, cannot certify it, or None."""
        for metric in map(find_metric, self.bounds):
            if metric.loader and metric.measured not in [m.name for m in self.more]:
                return f"{metric.measured}: wants its weights, --metric-weights {metric.measured}=PATH: {metric.wants}"
            if metric.worst_class and pairs < 2 * classes:
                return f"{metric.name}: got {pairs} pairs, want two at least of each of {classes} classes: --pairs {2 * classes}"
        for metric in self.more:
            if metric.prompted and not (prompts and all(isinstance(prompt, str) for prompt in prompts)):
                return f"{metric.name}: judges a picture by its prompt, and this model draws from none; leave it out"
        return None

    def shortfall(self, reached: Mapping[str, float]) -> float:
        """<= 0 when every bound is reached; else what is missing, in dB of PSNR (0.01 of SSIM counts as one)."""
        return max(find_metric(name).missing(reached[name], wanted) for name, wanted in self.bounds.items())

    def __str__(self) -> str:
        return " and ".join(find_metric(name).say_bound(wanted) for name, wanted in self.bounds.items())

    def say(self, reached: Mapping[str, float]) -> str:
        """The means of metrics it is about, such as "PSNR 35.10 dB, SSIM 0.9601"."""
        names = dict.fromkeys(find_metric(name).measured for name in self.bounds)
        return ", ".join(f"{METRICS[name].title} {METRICS[name].say(reached[name])}" for name in names)


def hash_pairs(pairs: Sequence[tuple[int, int]], weights_sha256: str, temperature: float) -> str:
    """sha256 naming the data a fidelity was measured on: model weights, temperature and (class, seed) pairs."""
    return hashlib.sha256(repr((weights_sha256, temperature, list(pairs))).encode()).hexdigest()
