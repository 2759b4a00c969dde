"""What a caller hands in, checked once where it comes in: each kind of value has one rule and one line that refuses it.

Every function returns the value or raises ValueError: what was got, what was wanted. Imports nothing heavy, `--help` needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparvar_tune.catalog.names import shown

PathLike = str | os.PathLike[str]


def whole(name: str, got: Any, least: int, most: int) -> int:
    """A whole number in range."""
    if not isinstance(got, int) or isinstance(got, bool) or not least <= got <= most:
        raise ValueError(f"{name}: got {shown(repr(got), 40)}, want a whole number, {least}..{most}")
    return got


def yes_or_no(name: str, got: Any) -> bool:
    """True or False: other values would be one of them by accident, "no" is true."""
    if not isinstance(got, bool):
        raise ValueError(f"{name}: got {shown(repr(got), 40)}, want True or False")
    return got


def path_of(name: str, got: Any) -> Path:
    """A path; "" would be the current folder by accident."""
    text = os.fspath(got) if isinstance(got, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name}: got {shown(repr(got), 80)}, want a path")
    return Path(got)


def paths_of(name: str, got: Any) -> tuple[Path, ...]:
    """Paths; one alone is meant as one."""
    if isinstance(got, str | os.PathLike):
        return (path_of(name, got),)
    if not isinstance(got, Iterable):
        raise ValueError(f"{name}: got {shown(repr(got), 80)}, want a path or a list of them")
    return tuple(path_of(name, one) for one in got)


def end_of(name: str, got: Path, ends: Iterable[str]) -> str:
    """Which of `ends`, such as ".md", the name of a file to write ends in, in any case; "" for one without a dot, which may hold
    anything. Any other end would be of another content than its name says."""
    ends = tuple(ends)
    if "." not in got.name:
        return ""
    for end in ends:
        if got.name.lower().endswith(end) and len(got.name) > len(end):
            return end
    more = " and begins with something else" if got.name.lower() in ends else ""
    raise ValueError(f"{name}: got {shown(got.name)}, want a name that ends in {' or '.join(ends)}{more}")
