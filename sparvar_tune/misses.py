"""Workloads the runtime was asked for and had no profile of, kept so that a later run can tune them.

One JSON line each, appended in one write, so that several processes may record at once; a line a kill cut short is skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from sparvar_tune.json_reader import Reader, unique_keys
from sparvar_tune.models import MAX_IMAGES
from sparvar_tune.profiles import user_folder, write_atomic
from sparvar_tune.schema import ProfileError


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
    """Remembers it, once. Raises ProfileError where the folder cannot be written."""
    if missed in read():
        return
    line = json.dumps(asdict(missed), sort_keys=True) + "\n"
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # a line feed first: what a killed process left half-written must not swallow this line
            os.write(handle, (line if _whole() else "\n" + line).encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise ProfileError(f"{file()}: cannot record a miss ({error.strerror})") from None


def _whole() -> bool:
    raw = file().read_bytes()
    return not raw or raw.endswith(b"\n")


def read() -> list[Missed]:
    """Everything recorded, oldest first, each once; lines that are not one of ours are skipped."""
    try:
        lines = file().read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    found: dict[Missed, None] = {}
    for line in lines:
        try:
            data = json.loads(line, object_pairs_hook=unique_keys)
            if isinstance(data, dict):
                data.setdefault("images", 1)  # lines from before several were counted
            found[Reader().read(Missed, data, "")] = None
        except (ValueError, RecursionError):
            continue
    return list(found)


def forget(missed: Missed) -> None:
    """Takes it off the list: it was tuned."""
    left = [m for m in read() if m != missed]
    write_atomic(file(), "".join(json.dumps(asdict(m), sort_keys=True) + "\n" for m in left).encode())
