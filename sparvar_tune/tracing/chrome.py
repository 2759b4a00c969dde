"""Files of the trace-event format, which Perfetto and chrome://tracing open: read, checked, their kernels by name.

The format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

PHASES = set("BEXiIsntfPNODMVvRcbe(),C")  # what `ph` may be
# A kernel's name -> the step it belongs to, the first that fits: what is seen of a CUDA graph's replay, where ranges are not.
KERNELS = (
    ("gathered_kernel|fetched_kernel", "gathered"),
    ("mass_kernel|select_kernel", "decide"),
    ("sdpa|flash|fmha|attention", "dense"),
    ("gemm|nvjet|cutlass|cublas", "products"),
)


def read_trace(path: Path) -> dict[str, Any]:
    """The file's JSON value. Raises ValueError, in one line, where it is none or breaks the format."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no trace file ({error}); trace again") from None
    reason = why_not_trace(data)
    if reason:
        raise ValueError(f"{path}: no trace file: {reason}; trace again")
    return data


def why_not_trace(data: Any) -> str | None:
    """Why a JSON value is no trace that Perfetto opens, or None: the fields each phase needs, and times that nest on a thread."""
    events = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(events, list) or not events:
        return "traceEvents: want a list of events"
    threads: dict[tuple[Any, Any], list[tuple[float, float]]] = {}
    for i, event in enumerate(events):
        where = f"traceEvents[{i}]"
        if not isinstance(event, dict) or not isinstance(event.get("ph"), str) or event["ph"] not in PHASES:
            return f"{where}.ph: got {str(event)[:60]}, want one of {''.join(sorted(PHASES))}"
        if not isinstance(event.get("name", "" if event["ph"] in "Ef" else None), str):
            return f"{where}.name: want a text"
        if event["ph"] == "M":
            continue
        wanted = ("ts", "dur") if event["ph"] == "X" else ("ts",)
        for name in wanted:
            got = event.get(name)
            if not isinstance(got, int | float) or not math.isfinite(got) or (name == "dur" and got < 0):
                return f"{where}.{name}: got {got!r}, want a number of microseconds"
        if event["ph"] == "X" and event.get("cat") == "user_annotation":
            threads.setdefault((event.get("pid"), event.get("tid")), []).append((event["ts"], event["ts"] + event["dur"]))
    return next((reason for ranges in threads.values() if (reason := _why_not_nested(ranges))), None)


def _why_not_nested(ranges: list[tuple[float, float]]) -> str | None:
    """Why ranges of one thread, (begin, end), are not one inside the other or apart; a microsecond is what times are good for."""
    under_way: list[float] = []
    for begin, end in sorted(ranges, key=lambda r: (r[0], -r[1])):
        while under_way and under_way[-1] <= begin + 1:
            under_way.pop()
        if under_way and end > under_way[-1] + 1:
            return f"a range from {begin} to {end} us ends after the one around it, at {under_way[-1]} us"
        under_way.append(end)
    return None


def kernels(data: dict[str, Any]) -> pandas.DataFrame:
    """One row a kernel that ran on a GPU, longest first: `kernel`, `step`, `calls`, `ms`. Empty for a run on a CPU."""
    import pandas

    found = [(event["name"], event["dur"] / 1e3) for event in data["traceEvents"] if event.get("cat") == "kernel"]
    seen = pandas.DataFrame(found, columns=["kernel", "ms"])
    table = seen.groupby("kernel").agg(calls=("ms", "size"), ms=("ms", "sum")).reset_index()
    table["step"] = [step_of(name) for name in table.kernel]
    return table.sort_values("ms", ascending=False)[["kernel", "step", "calls", "ms"]].reset_index(drop=True)


def step_of(kernel: str) -> str:
    """The step that a kernel of this name belongs to."""
    return next((step for pattern, step in KERNELS if re.search(pattern, kernel, re.IGNORECASE)), "rest")
