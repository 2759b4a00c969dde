"""Names of presets, and the one way a name that is in no table is refused; imports nothing heavy, `--help` needs it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile
from operator import eq

PRESETS = ("near-lossless", "paper", "fast")  # closest first
DEFAULT_PRESET, CUSTOM = PRESETS[0], "custom"


def shown(got: object, most: int = 80) -> str:
    """Any value in one printable, short line, whatever a damaged file or a caller put into it."""
    text = str(got)
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def words_of(error: object, most: int) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:most]


def first_line(error: Exception) -> str:
    """The first line of what an error says; what follows is advice of its library."""
    return f"{error}".partition("\n")[0] or type(error).__name__


def unknown_name(kind: str, got: object, known: Iterable[str]) -> ValueError:
    """The error to raise, such as `gpu "h10": unknown; nearest: h100-sxm, h200. Known: a100-40, ...`; `got` may be no text."""
    got = shown(got)
    names = {name.lower(): name for name in known}
    close = get_close_matches(got.lower(), names, n=4, cutoff=0.4)
    # a name is more often cut short than misspelt at the front: most leading letters in common first
    close.sort(key=lambda name: -sum(takewhile(bool, map(eq, name, got.lower()))))
    nearest = f"; nearest: {', '.join(names[c] for c in close[:3])}" if close else ""
    return ValueError(f'{kind} "{got}": unknown{nearest}. Known: {", ".join(names.values())}')
