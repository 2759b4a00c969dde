"""How close a sparse picture or attention output is to the dense one, and what a tuned policy must reach.

Pictures are compared with the same noise on both sides, so the only difference is the attention. Metrics come from
torchmetrics; the constraint is the lower end of a one-sided confidence interval of the mean over held-out pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

CONFIDENCE = 0.95
WINDOW = 11  # pixels, of SSIM's Gaussian
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al., "Multiscale structural similarity", 2003
PSNR_CAP = 100.0  # identical pictures: a finite number keeps means and files finite


@dataclass(frozen=True)
class PictureFidelity:
    """One sparse picture against its dense twin: PSNR in dB (data range 0..1), SSIM and MS-SSIM in 0..1.

    MS-SSIM takes fewer levels where a side is under 176 pixels; under 11 both are SSIM with a uniform window that fits.
    """

    psnr_db: float
    ssim: float
    ms_ssim: float


def compare_pictures(sparse: Tensor, dense: Tensor) -> PictureFidelity:
    """Fidelity of sparse [1, 3, H, W] against dense, both in 0..1. Raises ValueError on other shapes or NaN."""
    if sparse.shape != dense.shape or sparse.ndim != 4 or sparse.shape[0] != 1:
        raise ValueError(f"pictures: got {tuple(sparse.shape)} and {tuple(dense.shape)}, want the same [1, 3, H, W]")
    if not bool(torch.isfinite(sparse).all() and torch.isfinite(dense).all()):
        raise ValueError("pictures: got NaN or infinity; the attention of one of them is broken")
    psnr = float(peak_signal_noise_ratio(sparse, dense, data_range=1.0))
    side = min(sparse.shape[-2:])
    if side < WINDOW:
        window = side - 1 + side % 2  # the largest odd one, and no Gaussian: there is no room for its tails
        ssim = structural_similarity_index_measure(sparse, dense, gaussian_kernel=False, kernel_size=window, data_range=1.0)
        ms_ssim: object = ssim
    else:
        ssim = structural_similarity_index_measure(sparse, dense, data_range=1.0)
        betas = MS_SSIM_BETAS[: ms_ssim_levels(side)]
        ms_ssim = multiscale_structural_similarity_index_measure(sparse, dense, data_range=1.0, betas=betas)
    return PictureFidelity(min(psnr, PSNR_CAP), float(ssim), float(ms_ssim))  # type: ignore[arg-type]


def ms_ssim_levels(side: int) -> int:
    """How many of MS-SSIM's five levels a picture's shorter side (pixels, >= WINDOW) has room for.

    torchmetrics wants side // max(1, levels - 1)**2 to be WINDOW at least: 176 pixels for five, 99, 44 and 11 for fewer.
    """
    return max(n for n in range(1, len(MS_SSIM_BETAS) + 1) if n == 1 or (side // (n - 1) ** 2 >= WINDOW and side >> (n - 1) > 5))


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


@dataclass(frozen=True)
class Constraint:
    """What a policy must reach: the lower bound of mean PSNR (dB) and of mean SSIM, over held-out pairs."""

    psnr_db: float
    ssim: float

    def shortfall(self, psnr_lower_db: float, ssim_lower: float) -> float:
        """<= 0 when both lower bounds reach the constraint; else dB missing (SSIM counted as 0.01 = 1 dB)."""
        return max(self.psnr_db - psnr_lower_db, 100 * (self.ssim - ssim_lower))


def hash_pairs(pairs: Sequence[tuple[int, int]], weights_sha256: str, temperature: float) -> str:
    """sha256 naming the data a fidelity was measured on: model weights, temperature and (class, seed) pairs."""
    return hashlib.sha256(repr((weights_sha256, temperature, list(pairs))).encode()).hexdigest()
