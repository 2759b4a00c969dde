"""Recorded launch spaces: the measured time of every launch configuration of one attention problem, read from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparvar_tune.profile.reader import Reader, unique_keys
from sparvar_tune.profile.schema import one_line
from sparvar_tune.profile.store import write_atomic

Point = tuple[int, ...]  # a configuration: for each parameter the index of its value


@dataclass(frozen=True)
class TriedConfig:
    """A configuration that was tried: its times and how many calls they are of, or why it failed."""

    config: dict[str, Any]
    p20: float | None
    p50: float | None
    p80: float | None
    n: int | None
    failure: str | None

    def why_not(self) -> str | None:
        times = (self.p20, self.p50, self.p80, self.n)
        if self.failure is not None:
            return "failure: want no p20, p50, p80 and n beside it" if times != (None,) * 4 else None
        if self.p20 is None or self.p50 is None or self.p80 is None or self.n is None:
            return "p20, p50, p80, n: want all of them, or a failure"
        return None if 0 < self.p20 <= self.p50 <= self.p80 and self.n > 0 else "want 0 < p20 <= p50 <= p80 and n > 0"

    @property
    def value(self) -> float:
        """The p50; infinite after a failure."""
        return math.inf if self.p50 is None else self.p50


@dataclass(frozen=True)
class File:
    """A recorded space as it is written, schema 1. Configurations without a row are illegal; one that ran is needed."""

    schema: int
    gpu: str
    problem: str
    unit: str
    space: dict[str, Any]
    rows: tuple[TriedConfig, ...]

    def why_not(self) -> str | None:
        if self.schema != 1 or self.unit != "ms":
            return f'schema, unit: got {self.schema}, {self.unit!r}, want 1, "ms"'
        for name, values in self.space.items():
            kinds = {type(v) for v in values} if isinstance(values, list) else set()
            if len(kinds) != 1 or not kinds <= {int, float, str, bool} or not all(abs(v) < 1e300 for v in numbers(values)):
                return f"space.{name}: want a list of integers, of finite numbers, of texts or of booleans"
            if len(set(values)) != len(values) or numbers(values) != sorted(numbers(values)):
                return f"space.{name}: want every value once, and numbers ascending"
        first: dict[Point, int] = {}
        for i, row in enumerate(self.rows):
            if set(row.config) != set(self.space):
                return f"rows[{i}].config: got {sorted(row.config)}, want {sorted(self.space)}"
            for name, value in row.config.items():
                if not any(value == v and type(value) is type(v) for v in self.space[name]):
                    return f"rows[{i}].config.{name}: got {value!r}, want one of {self.space[name]}"
            same = first.setdefault(self.point(row), i)
            if same != i:
                return f"rows[{i}].config: the same as that of rows[{same}]"
        return None if any(row.failure is None for row in self.rows) else "rows: want one that did not fail"

    def point(self, row: TriedConfig) -> Point:
        return tuple(values.index(row.config[name]) for name, values in self.space.items())


@dataclass(frozen=True)
class Space:
    """A recorded space. `rows` has the legal configurations in lexicographic order."""

    gpu: str
    problem: str
    choices: dict[str, list[Any]]
    rows: dict[Point, TriedConfig]

    @property
    def optimum(self) -> float:
        return min(row.value for row in self.rows.values())


def write_space(file: File, path: Path) -> None:
    """Writes what `read_space` reads, atomically; a row leaves out what it does not have. Raises ValueError on a bad file."""
    if reason := file.why_not() or next((f"rows[{i}]: {why}" for i, row in enumerate(file.rows) if (why := row.why_not())), None):
        raise ValueError(f"{path}: {reason}")
    rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in file.rows]
    lines = ",\n".join(f"  {json.dumps(row, sort_keys=True)}" for row in rows)
    head = json.dumps({k: v for k, v in asdict(file).items() if k != "rows"}, indent=1, sort_keys=True)
    write_atomic(path, f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'.encode())


def read_space(path: Path) -> Space:
    """The space in a file like `File`, where a row may leave out what is null. Raises ValueError: the file, the field."""
    try:
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys)
        if isinstance(data, dict) and isinstance(data.get("rows"), list):
            nothing = dict.fromkeys(("p20", "p50", "p80", "n", "failure"))
            data["rows"] = [nothing | row if isinstance(row, dict) else row for row in data["rows"]]
        file = Reader().read(File, data, "")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: not a recorded space: {one_line(str(reason))}") from None
    rows = sorted((file.point(row), row) for row in file.rows)
    return Space(file.gpu, file.problem, file.space, dict(rows))


def numbers(values: list[Any]) -> list[Any]:
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
