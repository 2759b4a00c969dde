"""(class, seed) pairs, split so that what a search saw is never what certifies it.

Seeds come in ranges by purpose; classes go round in turn, so every set is balanced.
"""

from __future__ import annotations

_SEARCH, _HELD_OUT, _YARDSTICK = 1_000_000, 2_000_000, 3_000_000


def _pairs(classes: int, n: int, first_seed: int) -> tuple[tuple[int, int], ...]:
    # a stride coprime to the number of classes mixes them when n is smaller than the number of classes
    stride = next(s for s in (3, 7, 11, 1) if classes % s or s == 1)
    return tuple((stride * i % classes, first_seed + i) for i in range(n))


def search_pairs(classes: int, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs the search may look at."""
    return _pairs(classes, n, _SEARCH)


def held_out_pairs(classes: int, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs for certification only."""
    return _pairs(classes, n, _HELD_OUT)


def yardstick_pairs(classes: int, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs the yardsticks of a model are measured on."""
    return _pairs(classes, n, _YARDSTICK)
