"""torch.profiler: a file of the trace-event format, which ui.perfetto.dev and chrome://tracing open, with kernels by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sparvar_tune.profile.store import write_atomic
from sparvar_tune.tracing.backends import Session


def why_not(device: str) -> str | None:
    return None


class Functions:
    """record_function, as a stack."""

    def __init__(self) -> None:
        self.stack: list[record_function] = []

    def push(self, name: str) -> None:
        self.stack.append(record_function(name))
        self.stack[-1].__enter__()

    def pop(self) -> None:
        self.stack.pop().__exit__(None, None, None)


@contextmanager
def session(stem: Path) -> Iterator[Session]:
    """Writes <stem>.trace.json."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells its own stages on stderr
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    made = Session(Functions())
    with profile(activities=activities, acc_events=True) as profiler:
        yield made
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:  # the export writes as it goes: the file is there whole or not at all
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        path = stem.with_name(f"{stem.name}.trace.json")
        write_atomic(path, (Path(folder) / "trace.json").read_bytes())
    made.files.append(path)
