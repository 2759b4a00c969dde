"""Workloads the runtime was asked for and had no profile of, kept so that a later run can tune them.

One JSON line each, appended in one write, so that several processes may record at once; a line a kill cut short is skipped.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sparvar_tune.catalog.models import MAX_IMAGES
from sparvar_tune.profile.files import append_line, read_lines
from sparvar_tune.profile.reader import Reader, ReadError
from sparvar_tune.profile.schema import ProfileError
from sparvar_tune.profile.store import user_folder, write_atomic


@dataclass(frozen=True)
class Missed:
    """What `load_profile` was asked for. Slugs of the tables, as in a profile's `workload`; images at once."""

    gpu: str
    model: str
    preset: str
    resolution: str
    aspect: str
    images: int = 1

    def why_not(self) -> str | None:
        return None if 1 <= self.images <= MAX_IMAGES else f"images: got {self.images}, want 1..{MAX_IMAGES}"


def file() -> Path:
    return user_folder().parent / "misses.jsonl"


def record(missed: Missed) -> None:
    """Remembers it, once. Raises ProfileError where the file cannot be read or written."""
    if missed in read():
        return
    try:
        append_line(file(), asdict(missed))
    except OSError as error:
        raise ProfileError(f"{file()}: cannot record a miss ({error.strerror})") from None


def read() -> list[Missed]:
    """Everything recorded, oldest first, each once; lines that are not one of ours are skipped.

    Raises ProfileError for a file that is there and cannot be read: what it holds is not nothing.
    """
    found: dict[Missed, None] = {}
    try:
        lines = list(read_lines(file()))
    except OSError as error:
        raise ProfileError(f"{file()}: recorded misses cannot be read ({error.strerror}); mend or move it away") from None
    for data in lines:
        if isinstance(data, dict):
            data.setdefault("images", 1)  # lines from before several were counted
        with suppress(ReadError):
            found[Reader().read(Missed, data, "")] = None
    return list(found)


def forget(missed: Missed) -> None:
    """Takes it off the list: it was tuned. Raises ProfileError as `record` does."""
    left = [m for m in read() if m != missed]
    write_atomic(file(), "".join(json.dumps(asdict(m), sort_keys=True) + "\n" for m in left).encode())
