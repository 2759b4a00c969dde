"""Writes README's tables from the files under reports/ and profiles/: `python -m lab.readme_tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what stands there comes from here and is never typed. With
--check nothing is written, and exit code 1 says that README is not what the files say (a test holds it).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from lab.whole_image.report import PUBLIC
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.measure.timing import paired_speedup, timing
from sparvar_tune.profile import store
from sparvar_tune.runtime.load import prepare

ROOT = Path(__file__).parents[1]
README, REPORTS, PROFILES = ROOT / "README.md", ROOT / "reports", ROOT / "profiles"
KERNELS = ("CSLA 8x8, last scale", "CSLA 8x8, with residual", "CS4A 10 % 8x16", "CS4A 10 % 8x8, with residual",
           "HART CSLA 8x8, no text (9451 keys)", "decision scale 40: dense, mass, lists, residual")  # fmt: skip
PICTURES = ("path, graphs, dense", "path, graphs, CSLA 8x8", "path, graphs, CSLA 8x8, half dropped")
MEASURED = ("infinity-8b", "infinity-2b", "hart", "var-d36", "var-d30")


def markdown_rows(path: Path) -> list[list[str]]:
    """Cells of every table row of a Markdown file, heads included, the rules between them left out."""
    lines = (line for line in path.read_text("utf-8").splitlines() if line.startswith("|"))
    return [cells for line in lines if ((cells := [c.strip() for c in line.strip("|").split("|")]) and cells[0].strip("-") != "")
            or line.startswith("| |")]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def pocketvar() -> str:
    """Whole pictures on a CPU, of reports/cpu/pocketvar.md."""
    _, *rows = markdown_rows(REPORTS / "cpu" / "pocketvar.md")
    return table(
        ["pocketvar on two CPU cores", "a picture, s", "speed-up (95 %)", "PSNR to dense, dB (bound)", "SSIM (bound)"],
        [[row[0], row[1].partition(" ")[0], row[2], row[5], row[6]] for row in rows],
    )


def kernels() -> str:
    """Single launches on a GPU, of reports/kernels-h100.md."""
    head, *rows = markdown_rows(REPORTS / "kernels-h100.md")
    at = {name: i for i, name in enumerate(head)}
    wanted = ("ours", "x FA2", "x cuDNN")
    found = {row[0]: row for row in rows}
    return table(
        ["one launch on an H100", "ms", "x FlashAttention-2", "x cuDNN"],
        [[name, *(found[name][at[w]].partition(" ")[0] for w in wanted)] for name in KERNELS],
    )


def models() -> str:
    """What the shipped profiles measured: attention of the scales they touch, those that run dense and what decides included."""
    gpu, rows = GPUS["h100-sxm"], []
    for name in MEASURED:
        path = PROFILES / gpu.slug / f"{name}.json"
        profile = store.load(path)
        tuned = prepare(profile, path, gpu, [], "")
        dense = sum(r.dense.p50_ms for r in profile.rows if r.dense)
        ours = sum((r.dense if r.scale_index in tuned.demoted else r.tuned).p50_ms for r in profile.rows if r.tuned and r.dense)
        w = profile.workload
        rows.append([MODELS[name].title, f"{w.resolution}, {w.schedule.num_tokens:,} tokens", f"{len(profile.rows)}",
                     f"{dense:.2f}", f"{ours:.2f}", f"{dense / ours:.2f}x", profile.policy_state])  # fmt: skip
    return table(["model on an H100", "size", "scales", "dense, ms a layer", "tuned, ms a layer", "speed-up", "policy"], rows)


def pictures() -> str:
    """Whole pictures of public models on a GPU, of reports/whole-image-h100.json: the decoder and all else included. The last run
    of each model and size.
    """
    rows, last = [], {}
    for run in json.loads((REPORTS / "whole-image-h100.json").read_text("utf-8")):
        if "ways" in run and "peer" not in run:
            last[run["model"], run["tokens"], run["images"]] = run
    for run in last.values():
        public = run["ways"][PUBLIC]
        row = [f"{MODELS[run['model']].title}, {run['tokens']:,} tokens", f"{timing(public['wall_ms']).p50_ms:.0f}"]
        for name in PICTURES:
            way = run["ways"][name]
            ratio = paired_speedup(public["wall_ms"], way["wall_ms"])
            row.append(f"{timing(way['wall_ms']).p50_ms:.0f} ({ratio.median:.1f}x)")
        memory = run["peak_bytes"]
        rows.append([*row, f"{memory['public'] / 2**30:.0f}", f"{memory['ours'] / 2**30:.0f}"])
    return table(
        ["a picture on an H100, ms", "public code", "our path, dense", "with CSLA 8x8",
         "and half of guidance dropped at three scales", "GiB, public", "GiB, ours"], rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {"pocketvar": pocketvar, "kernels": kernels, "models": models, "pictures": pictures}


def with_tables(text: str) -> str:
    """README's text with every table as the files have it today. Raises ValueError for a name that is no table's."""

    def made(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"README.md: table {found[1]!r}: want one of {', '.join(TABLES)}")
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.readme_tables", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where README differs")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", UserWarning)  # that a policy is unverified stands in the tables
    before = README.read_text("utf-8")
    after = with_tables(before)
    if before != after and not args.check:
        store.write_atomic(README, after.encode())
    print("README.md: its tables are those of the files" if before == after else "README.md: its tables were others")
    return int(before != after and args.check)


if __name__ == "__main__":
    sys.exit(main())
