"""What a speed-up is worth: images an hour, device-hours and money a year, from a profile's own measured times alone.

One rule: hours dense = images / 3600 * seconds dense, hours saved = hours dense * (1 - 1 / speed-up). The page's calculator
does the same sums in `templates/page.js`; a browser test holds the two against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAYS = 365
MOST_IMAGES, MOST_PRICE = 10**12, 1e6


@dataclass(frozen=True)
class Load:
    """What is drawn and what a device costs: stated by whoever asks, never measured. price: of one device for one hour."""

    images_per_day: int = 100_000
    price: float = 2.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        if not 1 <= self.images_per_day <= MOST_IMAGES:
            raise ValueError(f"--images-per-day: got {self.images_per_day}, want 1..{MOST_IMAGES}")
        if not (math.isfinite(self.price) and 0 <= self.price <= MOST_PRICE):
            raise ValueError(f"--price: got {self.price}, want 0..{MOST_PRICE:g} for one device and hour")
        if not 1 <= len(self.currency) <= 8 or not self.currency.isprintable():
            raise ValueError(f"--currency: got {self.currency[:20]!r}, want a short name such as USD")


@dataclass(frozen=True)
class ImageTime:
    """Seconds of one image dense, and the speed-up with its 95 % interval.

    whole: a whole picture, else only the attention that a profile touches, summed over scales and layers.
    """

    dense_s: float
    speedup: float
    low: float
    high: float
    whole: bool

    def saved_s(self, speedup: float) -> float:
        return self.dense_s * (1 - 1 / speedup)


@dataclass(frozen=True)
class Bill:
    """What a load takes in a year. saved_low, saved_high: at the ends of the speed-up's interval."""

    dense_per_hour: float
    tuned_per_hour: float
    dense_hours: float
    tuned_hours: float
    saved_hours: float
    saved_low: float
    saved_high: float
    price: float

    @property
    def saved_money(self) -> float:
        return self.saved_hours * self.price


def bill(work: ImageTime, load: Load) -> Bill:
    """The year's bill of one load."""
    per_year = load.images_per_day * DAYS / 3600
    saved, low, high = (per_year * work.saved_s(s) for s in (work.speedup, work.low, work.high))
    dense = per_year * work.dense_s
    return Bill(
        3600 / work.dense_s, 3600 / work.dense_s * work.speedup, dense, dense - saved, saved, low, high, load.price
    )  # fmt: skip
