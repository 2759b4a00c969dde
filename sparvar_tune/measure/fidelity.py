"""How close a sparse picture or attention output is to the dense one, and what a tuned policy must reach.

Pictures are compared with the same noise on both sides, so the only difference is the attention. Metrics are those of
catalog/metrics.py; the constraint is on the worse end of a one-sided confidence interval of the mean over held-out pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import torch
from torch import Tensor

from sparvar_tune.catalog.metrics import METRICS, Metric

CONFIDENCE = 0.95
Fidelity = Mapping[str, float]  # of one sparse picture against its dense twin: value by metric


def compare_pictures(sparse: Tensor, dense: Tensor, more: Sequence[Metric] = ()) -> dict[str, float]:
    """Every metric, and those of `more`, of sparse [1, 3, H, W] against dense, both in 0..1. Raises ValueError on other
    shapes or NaN.
    """
    if sparse.shape != dense.shape or sparse.ndim != 4 or sparse.shape[0] != 1:
        raise ValueError(f"pictures: got {tuple(sparse.shape)} and {tuple(dense.shape)}, want the same [1, 3, H, W]")
    if not bool(torch.isfinite(sparse).all() and torch.isfinite(dense).all()):
        raise ValueError("pictures: got NaN or infinity; the attention of one of them is broken")
    return {metric.name: metric.compare(sparse, dense) for metric in (*METRICS.values(), *more)}


def relative_l2(sparse: Tensor, dense: Tensor) -> float:
    """||sparse - dense|| / ||dense|| over everything, in fp64."""
    return float((sparse.double() - dense.double()).norm() / dense.double().norm().clamp(min=1e-300))


def recall_of_mass(q: Tensor, k: Tensor, scale: float, keys: Tensor) -> float:
    """Mean share of the dense softmax of queries q [Nq, D] over k [Nk, D] that falls on the positions `keys` [K]."""
    return float(torch.softmax(q.double() @ k.double().T * scale, -1)[:, keys.long()].sum(-1).mean())


def t_quantile(p: float, degrees: float) -> float:
    """Student's t quantile by Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); 3 digits from 5 degrees on."""
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**i for i, term in enumerate(terms))


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
    """One-sided confidence bound of the mean on the side away from dense; see `lower_bound`."""
    return metric.sign * lower_bound([metric.sign * value for value in values], strata, confidence)


@dataclass(frozen=True)
class Constraint:
    """What a policy must reach: by metric, what the confidence bound of the mean over held-out pairs may not miss."""

    bounds: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", {name: self.bounds[name] for name in METRICS if name in self.bounds})

    def shortfall(self, reached: Mapping[str, float]) -> float:
        """<= 0 when every bound is reached; else what is missing, in dB of PSNR (0.01 of SSIM counts as one)."""
        return max(METRICS[name].missing(reached[name], wanted) for name, wanted in self.bounds.items())

    def __str__(self) -> str:
        return " and ".join(METRICS[name].say_bound(wanted) for name, wanted in self.bounds.items())

    def say(self, reached: Mapping[str, float]) -> str:
        """The metrics it is about, such as "PSNR 35.10 dB, SSIM 0.9601"."""
        return ", ".join(f"{METRICS[name].title} {METRICS[name].say(reached[name])}" for name in self.bounds)


def hash_pairs(pairs: Sequence[tuple[int, int]], weights_sha256: str, temperature: float) -> str:
    """sha256 naming the data a fidelity was measured on: model weights, temperature and (class, seed) pairs."""
    return hashlib.sha256(repr((weights_sha256, temperature, list(pairs))).encode()).hexdigest()
