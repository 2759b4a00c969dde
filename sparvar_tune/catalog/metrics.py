"""The ways to say how close a sparse picture is to its dense twin: to add one, add a row to `METRICS`.

A bound of any of them can be asked for by name (`--min NAME=VALUE`, `--max` where lower is closer), of the mean over all classes
or of the worst class alone; it is certified on held-out pictures and stands in the profile's evidence. Those that need weights
are measured where the user gives them. Imports nothing heavy until a picture is compared: `--help` needs the names.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparvar_tune.catalog.names import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 11  # pixels, of SSIM's Gaussian
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al., "Multiscale structural similarity", 2003
WORST = "_worst_class"  # after a metric's name: of the class that is farthest from dense
PSNR_CAP = 100.0  # identical pictures: a finite number keeps means and files finite


@dataclass(frozen=True)
class Metric:
    """One way to compare two pictures.

    name: in options, files and columns. unit: "dB" or "". direction: which way is closer to dense, "higher" or "lower".
    least: the worst value there is. low, high: what may be asked for; no value is above high. step: the difference that
    counts as much as 1 dB of PSNR, so that what is missing in several metrics can be weighed. digits: behind the point.
    compare: (sparse, dense), both [1, 3, H, W] float in 0..1, and the prompt where it is `prompted` -> a finite number.
    loader, wants: of one that needs weights, "module:name" of what makes `compare` from a path, and what must be there in words.
    loaded: the path that was given; None: not yet, it cannot compare. worst_class: a bound is of the class farthest from dense.
    """

    name: str
    title: str
    unit: str
    direction: str
    least: float
    low: float
    high: float
    step: float
    digits: int
    compare: Callable[..., float] = field(repr=False)
    loader: str = ""
    wants: str = ""
    prompted: bool = False
    loaded: Path | None = None
    worst_class: bool = False

    def with_weights(self, path: Path) -> Metric:
        """It, able to compare. Raises ValueError, in one line, where the weights or the library that reads them are missing."""
        if not self.loader:
            raise ValueError(f"{self.name}: it needs no weights")
        module, _, name = self.loader.partition(":")
        return replace(self, compare=getattr(importlib.import_module(module), name)(path), loaded=path)

    @property
    def measured(self) -> str:
        """The name of what is measured of each picture."""
        return self.name.removesuffix(WORST)

    def of_worst_class(self) -> Metric:
        """The same, of which the worst class is bound."""
        return replace(self, name=self.name + WORST, title=f"{self.title} of the worst class", worst_class=True)

    @property
    def sign(self) -> int:
        """1 where higher is closer, else -1."""
        return 1 if self.direction == "higher" else -1

    def missing(self, got: float, wanted: float) -> float:
        """By how much `got` misses `wanted`, in steps (dB of PSNR); <= 0 where it does not."""
        return self.sign * (wanted - got) / self.step

    def say(self, value: float) -> str:
        """Such as "34.57 dB"."""
        return f"{value:.{self.digits}f}{' ' + self.unit if self.unit else ''}"

    def say_bound(self, value: float) -> str:
        """Such as "PSNR >= 34.57 dB"."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.title} {'>=' if self.direction == 'higher' else '<='} {value:g}{unit}"

    def why_not_bound(self, value: float) -> str | None:
        """Why nobody can ask for this value, or None."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and self.low <= value <= self.high:
            return None
        return f"{self.name}: got {value!r}, want {self.low:g}..{self.high:g}{' ' + self.unit if self.unit else ''}"


def _psnr(sparse: Tensor, dense: Tensor) -> float:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return min(float(peak_signal_noise_ratio(sparse, dense, data_range=1.0)), PSNR_CAP)


def _ssim(sparse: Tensor, dense: Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    side, options = min(sparse.shape[-2:]), {}
    if side < WINDOW:  # the largest odd window, and no Gaussian: there is no room for its tails
        options = {"gaussian_kernel": False, "kernel_size": side - 1 + side % 2}
    return float(structural_similarity_index_measure(sparse, dense, data_range=1.0, **options))  # type: ignore[arg-type]


def _ms_ssim(sparse: Tensor, dense: Tensor) -> float:
    """Fewer levels where a side is under 176 pixels; SSIM under 11."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    side = min(sparse.shape[-2:])
    if side < WINDOW:
        return _ssim(sparse, dense)
    betas = MS_SSIM_BETAS[: ms_ssim_levels(side)]
    return float(multiscale_structural_similarity_index_measure(sparse, dense, data_range=1.0, betas=betas))


def ms_ssim_levels(side: int) -> int:
    """How many of MS-SSIM's five levels a picture's shorter side (pixels, >= WINDOW) has room for.

    torchmetrics wants side // max(1, levels - 1)**2 to be WINDOW at least: 176 pixels for five, 99, 44 and 11 for fewer.
    """
    return max(n for n in range(1, len(MS_SSIM_BETAS) + 1) if n == 1 or (side // (n - 1) ** 2 >= WINDOW and side >> (n - 1) > 5))


def _no_weights(*_pictures: object) -> float:
    raise ValueError("this metric needs weights that were not given")


_ROWS = (
    Metric("psnr", "PSNR", "dB", "higher", 0.0, 0.0, 200.0, 1.0, 2, _psnr),
    Metric("ssim", "SSIM", "", "higher", -1.0, 0.0, 1.0, 0.01, 4, _ssim),
    Metric("ms_ssim", "MS-SSIM", "", "higher", -1.0, 0.0, 1.0, 0.01, 4, _ms_ssim),
    Metric("lpips", "LPIPS", "", "lower", 1e3, 0.0, 1e3, 0.01, 4, _no_weights, "sparvar_tune.measure.lpips:Lpips",
           "a safetensors file of AlexNet's and its linear heads' weights"),
    # of preferences the gain over the dense picture is meant, below 0 where the sparse one is liked less
    Metric("hpsv2", "HPSv2 gain", "", "higher", -2.0, -2.0, 2.0, 0.002, 5, _no_weights, "sparvar_tune.measure.preference:Hpsv2",
           "a folder that transformers' CLIPModel and its processor open", prompted=True),
    Metric("image_reward", "ImageReward gain", "", "higher", -1e2, -1e2, 1e2, 0.05, 4, _no_weights,
           "sparvar_tune.measure.preference:ImageReward", "a folder with ImageReward.pt and med_config.json", prompted=True),
)  # fmt: skip
METRICS = {metric.name: metric for metric in _ROWS}
LEAD = METRICS["psnr"]  # of fronts, and of what a model's classes are known to differ in beforehand


def always() -> tuple[Metric, ...]:
    """Those that are measured of every picture: they need no weights."""
    return tuple(metric for metric in METRICS.values() if not metric.loader)


def known_metric(name: str) -> Metric | None:
    """The row of a name in a file, also of "psnr_worst_class"; None for one that only its tuner knows."""
    row = METRICS.get(name.removesuffix(WORST))
    return row.of_worst_class() if row and name.endswith(WORST) else row


def find_metric(name: str) -> Metric:
    """The row of a name as people write it, such as "ms-ssim" or "psnr-worst-class"; raises ValueError naming the nearest."""
    if not isinstance(name, str) or (found := known_metric(name.replace("-", "_"))) is None:
        raise unknown_name("metric", name, METRICS)
    return found
