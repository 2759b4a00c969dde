"""Freed memory kept or given back: whole pictures of pocketvar in processes of both kinds, in turn.

    python -m lab.kept_memory --out reports/cpu/kept-memory.txt      adds a line a process; ten minutes on two idle cores

A process draws dense and tuned in turn, after one of each. What memory is at hand depends on where its heap ends: take many.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from sparvar_tune import keep_memory
from sparvar_tune.ways.subject import Subject

ROUNDS, WAYS = 5, ("back", "kept")


def measure(way: str) -> str:
    """This process's line."""
    if way == "kept" and not keep_memory():
        raise SystemExit("keep_memory: got False, want glibc")
    subject = Subject.of("pocketvar", "cpu")
    adapter, attend = subject.adapter, subject.load().sparse_attention()

    def drawn(by: Any) -> tuple[float, int]:
        state, before, begun = adapter.start((1, 5), 0), _faults(), time.perf_counter()
        adapter.finish(state, by)
        return time.perf_counter() - begun, _faults() - before

    turns = [(drawn(adapter.dense), drawn(attend)) for _ in range(ROUNDS + 1)][1:]
    dense, tuned = zip(*turns, strict=True)
    said = [
        f"{name} {median(s for s, _ in seen):.3f} ({median(n for _, n in seen):.0f} faults)"
        for name, seen in (("dense", dense), ("tuned", tuned))
    ]
    return "  ".join((way, *said, f"ratio {median(d / t for (d, _), (t, _) in turns):.3f}"))


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="text file that lines are added to")
    parser.add_argument("--processes", type=int, default=10, help="half of them of each kind")
    parser.add_argument("--way", choices=WAYS, help="only this process")
    args = parser.parse_args()
    if args.way:
        print(measure(args.way))
        return
    for i in range(args.processes):
        run = [sys.executable, "-m", "lab.kept_memory", "--way", WAYS[i % 2]]
        line = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        print(line, end="", flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line)


if __name__ == "__main__":
    main()
