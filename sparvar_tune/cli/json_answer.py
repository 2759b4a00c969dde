"""What commands answer with `--json`: one object, alone on stdout. docs/json.md names every field.

An answer is the value that a command's words are made of, so that both say the same. Another field keeps the version; one
that is renamed, removed or comes to mean something else raises it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparvar_tune.cli.exit_codes import ExitCode

if TYPE_CHECKING:  # `doctor` answers where torch cannot be imported
    from sparvar_tune.ways.subject import Subject

VERSION = 1


@dataclass(frozen=True)
class Asked:
    """Which profile a command was asked about; gpu is the silicon it is for."""

    model: str
    gpu: str
    quality: str
    resolution: str
    aspect: str
    images: int

    @classmethod
    def of(cls, subject: Subject) -> Asked:
        s = subject
        return cls(s.model.slug, s.gpu.slug, s.quality, s.resolution, s.aspect, s.images)


def print_answer(command: str, code: ExitCode, *parts: Any) -> None:
    """Prints the object. parts: dataclasses, or dicts of JSON values; their fields stand beside one another."""
    found: dict[str, Any] = {"answer": command, "version": VERSION, "exit_code": int(code)}
    for part in parts:
        if not isinstance(part, dict):
            from sparvar_tune.profile.reader import to_plain

            part = to_plain(part)
        found |= part
    print(json.dumps(found, indent=1, allow_nan=False), flush=True)  # ASCII: no terminal or pipe can spoil it
