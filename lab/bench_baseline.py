"""The facts of a benchmark run against the committed baseline; `make bench` ends with it.

pytest tests/benchmarks --benchmark-enable --benchmark-json build/bench.json
python -m lab.bench_baseline build/bench.json                 compare; exit code 1 where something became worse
python -m lab.bench_baseline build/bench.json --write         the baseline anew; facts of other machines and versions stay
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from sparvar_tune.profile.reader import Reader
from sparvar_tune.regression import baseline

BASELINE = Path(__file__).parent.parent / "tests" / "benchmarks" / "baseline.json"


def facts_of(path: Path) -> list[baseline.Fact]:
    """What the tests left in pytest-benchmark's file."""
    runs = json.loads(path.read_text())["benchmarks"]
    found = (Reader().read(baseline.Fact, fact, run["name"]) for run in runs for fact in run["extra_info"].get("facts", ()))
    return [replace(fact, of="make bench") for fact in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="pytest-benchmark's file")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    try:
        facts = facts_of(options.run)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.run}: no file of pytest-benchmark ({error}); run make bench")
    if options.write:
        baseline.save(facts, options.baseline)
        print(f"wrote {len(facts)} facts to {options.baseline}")
        return 0
    compared = baseline.compare(baseline.load(options.baseline).facts, facts)
    print("\n".join(compared.lines))
    return 0 if compared.good else 1


if __name__ == "__main__":
    sys.exit(main())
