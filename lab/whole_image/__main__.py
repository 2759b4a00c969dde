"""Whole pictures of the public models, beside our paths, on this GPU.

    python -m lab.whole_image infinity CHECKOUT infinity-8b --out RAW.json      measure one model, add it to the raw numbers
    python -m lab.whole_image infinity FASTVAR/Infinity infinity-2b --peer FastVAR --out RAW.json      a method's own code
    python -m lab.whole_image report RAW.json --out reports/whole-image-h100.md  the tables from the raw numbers

CHECKOUT is an unmodified tree of the public code. One model a process: their modules' names collide, and memory is counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparvar_tune.profile.store import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.whole_image", description="whole pictures of public models on this GPU")
    commands = parser.add_subparsers(dest="command", required=True)
    for family in ("infinity", "hart", "var"):
        one = commands.add_parser(family)
        one.add_argument("checkout")
        one.add_argument("model")
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--images", type=int, default=1)
        one.add_argument("--large", action="store_true", help="2048 x 2048")
        one.add_argument("--rounds", type=int, default=7)
        one.add_argument("--profiled", type=int, default=2)
        one.add_argument("--layers", action="store_true", help="also each block against the public one")
        one.add_argument("--apart", action="store_true", help="the public code before ours: their caches do not fit side by side")
        one.add_argument("--first", action="store_true", help="only the time of apply and of the first pictures")
        one.add_argument("--ahead", action="store_true", help="the profile is loaded, and compiles, before the model is made")
        if family == "infinity":
            one.add_argument("--peer", choices=("FastVAR", "ScaleKV"), help="CHECKOUT is this method's code; time that alone")
        one.add_argument("--fast-sums", action="store_true", help="8-bit products summed in the hardware's fewer bits")
        one.add_argument("--only", action="append", default=[], help="the start of ways' names; may be given again")
    report = commands.add_parser("report")
    report.add_argument("raw", type=Path, nargs="+")
    report.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "report":
        from lab.whole_image.report import render

        runs = [run for path in args.raw for run in json.loads(path.read_text())]
        if lost := next((run for run in runs if "ways" not in run and "apply_and_first_ms" not in run), None):
            report.error(f"{lost['model']} of {lost['date']}: cut off before its ways were timed; take it out of the raw numbers")
        write_atomic(args.out, render(runs).encode())
        return
    if not Path(args.checkout).is_dir():
        parser.error(f"{args.checkout}: no folder; want a checkout of the public code of {args.command}")
    from lab.whole_image.measure import measure

    begun = time.monotonic()
    say: Callable[[str], None] = lambda text: print(f"[{time.monotonic() - begun:4.0f} s] {text}", flush=True)  # noqa: E731
    raw: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    run = {"date": datetime.date.today().isoformat()}
    raw.append(run)
    for found in measure(args, say):
        run.update(found)
        write_atomic(args.out, json.dumps(raw, indent=1).encode())


if __name__ == "__main__":
    main()
