"""Every measurement of a run, kept as a line the moment it is done, and never made twice.

A line is found again by a key over all that its numbers depend on: silicon, kernels, versions, problem, what every head does,
configurations. So a run goes on after a kill, lines of several machines may be put together, and a finished log replays a whole
run without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sparvar_kernels.policy import Policy
from sparvar_tune.launch_search.compiling import Binary, Compiled, compile_all, compilers
from sparvar_tune.launch_search.process_pool import Finished, Job, Pool
from sparvar_tune.launch_search.timing_task import Task, Times, exact, payload_of
from sparvar_tune.profile.files import append_line, read_lines
from sparvar_tune.profile.reader import Reader, ReadError, to_plain
from sparvar_tune.profile.schema import ProfileError, Workload, one_line

if TYPE_CHECKING:
    import pandas

TASK_S = 60.0  # a task takes well under a second; the first of a scale also plans lists
Compiler = Callable[[Iterable[Binary], Pool, Callable[[str], None]], dict[Binary, Compiled]]
FINAL = "raised"  # failures that a second try would repeat


@dataclass(frozen=True)
class Identity:
    """What every number of a run depends on beside its task."""

    gpu: str
    device: str
    kernel_hash: str
    torch: str
    triton: str | None
    mode: str


@dataclass(frozen=True)
class Line:
    """One measurement: a binary or the times of a task, or why there is none. what: for people."""

    key: str
    what: str
    compiled: Compiled | None
    times: Times | None
    failure: str | None

    def why_not(self) -> str | None:
        given = [x for x in (self.compiled, self.times, self.failure) if x is not None]
        return None if len(given) == 1 else "want exactly one of compiled, times and failure"


class Log:
    """The lines of a run by key. `path` None: kept in memory only. `others`: logs of other runs or machines, read only."""

    def __init__(self, path: Path | None, others: Sequence[Path] = ()) -> None:
        self.path = path
        self.lines: dict[str, Line] = {}
        for file in (*others, *([path] if path else [])):
            for line in read_log(file):
                if line.key not in self.lines or self.lines[line.key].failure:
                    self.lines[line.key] = line

    def keep(self, line: Line) -> Line:
        """Adds the line, as it would be read back. Raises ProfileError when it cannot be written: nothing before it is lost."""
        plain = to_plain(line)
        if self.path is not None:
            try:
                append_line(self.path, plain)
            except OSError as error:
                raise ProfileError(
                    f"{self.path}: cannot keep measurements ({error.strerror}); make room and give --resume"
                ) from None
        self.lines[line.key] = kept = Reader().read(Line, plain, "")
        return kept


def to_frame(lines: Iterable[Line]) -> pandas.DataFrame:
    """Lines as a table, a row each: `key`, `what`, `kind` ("binary", "times" or "failure"); of a binary what it takes; of times
    the p50 of dense (`dense_ms`, if it was in the turns) and of the fastest configuration (`tuned_ms`), and `setup_ms`.
    """
    import pandas

    rows = []
    for line in lines:
        row: dict[str, Any] = {"key": line.key, "what": line.what, "kind": "failure" if line.failure else "binary"}
        row["failure"] = line.failure
        if line.compiled:
            row |= {name: value for name, value in asdict(line.compiled).items() if name not in ("failure", "code")}
        if line.times:
            t = line.times
            row |= {
                "kind": "times", "setup_ms": t.setup_ms, "dense_ms": median(t.dense_ms) if t.dense_ms else None,
                "tuned_ms": min(map(median, t.tuned_ms)),
            }  # fmt: skip
        rows.append(row)
    return pandas.DataFrame(rows)


def read_log(path: Path) -> list[Line]:
    """Every sound line of a log; one that a kill cut short, or that is not one of ours, is skipped."""
    found = []
    for data in read_lines(path):
        try:
            found.append(Reader().read(Line, data, ""))
        except (ReadError, TypeError):
            continue
    return found


class Workshop:
    """Answers what a run wants to know: from its log, else by processes that compile and processes that own a GPU each.

    environments: one mapping of environment variables per GPU worker; empty for a replay, which asks the log alone.
    timer, compiler: what times and compiles (tests put others in their place).
    """

    def __init__(
        self, identity: Identity, log: Log, processes: int, environments: Sequence[Mapping[str, str]],
        timer: str = "sparvar_tune.launch_search.timing_task:time_task", compiler: Compiler = compile_all, task_s: float = TASK_S,
    ) -> None:  # fmt: skip
        self.identity, self.log, self.compiler, self.task_s = identity, log, compiler, task_s
        self.pool = Pool(timer, environments) if environments else None
        self.compilers = compilers(processes)
        if self.pool:
            self.pool.start()  # while the first binaries are made

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.compilers.close()
        if self.pool:
            self.pool.close()

    def compile(self, wanted: Iterable[Binary], status: Callable[[str], None]) -> dict[Binary, Compiled]:
        """What every binary takes, or its failure. Those the log has are in Triton's cache, or made at first use."""
        binaries = list(dict.fromkeys(wanted))
        keys = {b: self._key("binary", asdict(b)) for b in binaries}
        missing = [b for b in binaries if self._missing(keys[b])]
        self._need(len(missing))
        for b, made in (self.compiler(missing, self.compilers, status) if missing else {}).items():
            what = f"binary {b.build.kernel}: {_words(dict((*b.build.constants, *b.build.options)))}"[:480]
            self.log.keep(
                Line(keys[b], what, None if made.failure else made, None, made.failure and one_line(made.failure)[:300])
            )
        lines = {b: self.log.lines[keys[b]] for b in binaries}
        return {b: line.compiled or Compiled(failure=line.failure) for b, line in lines.items()}

    def time(
        self, tasks: Sequence[Task], workload: Workload, policy: Policy, status: Callable[[str], None]
    ) -> dict[Task, Times | str]:
        """The times of every task, or why there are none."""
        layers = {layer: self._layer(workload, policy, layer) for layer in {t.layer for t in tasks}}
        keys = {t: self._key("times", layers[t.layer], asdict(t)) for t in tasks}
        missing = {keys[t]: t for t in tasks if self._missing(keys[t])}
        self._need(len(missing))
        begun, done, tries = time.monotonic(), 0, dict.fromkeys(missing, 2)
        while again := [key for key in missing if tries[key]]:
            assert self.pool
            jobs = (
                Job(k, payload_of(missing[k], workload, policy, self.identity.mode, self.identity.gpu), self.task_s)
                for k in again
            )
            for outcome in self.pool.run(jobs):
                died = outcome.failure == "died" and tries[outcome.key] > 1  # perhaps not by its own fault: once more
                tries[outcome.key] = 1 if died else 0
                if died:
                    continue
                self.log.keep(_line(outcome, missing[outcome.key]))
                done += 1
                left = (time.monotonic() - begun) / done * (len(missing) - done)
                status(f"timing: {done}/{len(missing)}, {left:.0f} s left ({self.log.lines[outcome.key].what})")
        found = {t: self.log.lines[keys[t]] for t in tasks}
        return {t: line.times or line.failure or "" for t, line in found.items()}

    def _missing(self, key: str) -> bool:
        line = self.log.lines.get(key)
        return line is None or (line.failure is not None and not line.failure.startswith(FINAL) and self.pool is not None)

    def _need(self, missing: int) -> None:
        if missing and self.pool is None:
            raise ValueError(f"replay: the log lacks {missing} measurements of this run")

    def _key(self, kind: str, *parts: Any) -> str:
        text = json.dumps([kind, asdict(self.identity), *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def _layer(workload: Workload, policy: Policy, layer: int) -> dict[str, Any]:
        """All that a layer's times depend on; the rest of the model does not matter."""
        shape = {
            n: v for n, v in asdict(workload).items() if n not in ("model", "resolution", "aspect", "layers", "weights_sha256")
        }
        return {"workload": shape, "policy": exact(Policy((policy.heads[layer],), policy.rules, ()))}


def _line(outcome: Finished, task: Task) -> Line:
    what = f"scale {task.scale_index}, layer {task.layer}: " + "; ".join(_words(asdict(c)) for c in task.configs)
    what += ", with dense" if task.dense else ""
    if outcome.failure is None:
        try:
            return Line(outcome.key, what[:480], None, Reader().read(Times, outcome.value, "times"), None)
        except ReadError as error:  # a time of zero, say
            return Line(outcome.key, what[:480], None, None, one_line(f"raised: {error}")[:300])
    return Line(outcome.key, what[:480], None, None, one_line(f"{outcome.failure}: {outcome.detail}")[:300])


def _words(config: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())
