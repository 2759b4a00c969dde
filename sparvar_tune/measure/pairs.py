"""(class, seed) pairs, split so that what a search saw is never what certifies it, nor what certified it what verifies it.

Seeds come in ranges by purpose; classes go round in turn, so every set is balanced.
"""

from __future__ import annotations

MOST_PAIRS = 10_000  # of one set: ranges of seeds must not meet
_SEARCH, _HELD_OUT, _YARDSTICK, _VERIFY = 1_000_000, 2_000_000, 3_000_000, 4_000_000


def _pairs(classes: int, n: int, first_seed: int) -> tuple[tuple[int, int], ...]:
    if n > MOST_PAIRS:
        raise ValueError(f"pairs: got {n}, want at most {MOST_PAIRS}")
    # a stride coprime to the number of classes mixes them when n is smaller than the number of classes
    stride = next(s for s in (3, 7, 11, 1) if classes % s or s == 1)
    return tuple((stride * i % classes, first_seed + i) for i in range(n))


def search_pairs(classes: int, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs the search may look at."""
    return _pairs(classes, n, _SEARCH)


def held_out_pairs(classes: int, n: int, attempt: int = 0) -> tuple[tuple[int, int], ...]:
    """Pairs for certification only; every attempt (0..99) has its own, as what one saw may choose what the next looks at."""
    if not 0 <= attempt < 100:
        raise ValueError(f"attempt: got {attempt}, want 0..99")
    return _pairs(classes, n, _HELD_OUT + attempt * MOST_PAIRS)


def verify_pairs(classes: int, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs for looking at a certified profile again."""
    return _pairs(classes, n, _VERIFY)


def yardstick_pairs(classes: int, n: int) -> tuple[tuple[int, int], ...]:
    """Pairs the yardsticks of a model are measured on."""
    return _pairs(classes, n, _YARDSTICK)
