"""Writes reports/adapters-cpu.md: what ran on which commit of the public code, and whether it held.

    python tests/models/public_models/report.py infinity=CHECKOUT[@COMMIT] hart=CHECKOUT[@COMMIT] var=CHECKOUT[@COMMIT]
                                         scalekv=CHECKOUT[@COMMIT] fastvar=CHECKOUT[@COMMIT]

Without @COMMIT git is asked for the checkout's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parents[2] / "reports" / "adapters-cpu.md"
SOURCES = {
    "infinity": "github.com/FoundationVision/Infinity", "hart": "github.com/mit-han-lab/hart",
    "var": "github.com/FoundationVision/VAR", "scalekv": "github.com/StargazerX0/ScaleKV", "fastvar": "github.com/csguoh/FastVAR",
}  # fmt: skip
PEERS = {"scalekv": [("scalekv", "infinity")], "fastvar": [("fastvar", "infinity"), ("fastvar_hart", "hart")]}
HEAD = """# Adapters on the public code, on a CPU

Tiny models with random weights, built from unmodified checkouts; the sizes are in tests/models/public_models. One thread.
Written by `python tests/models/public_models/report.py infinity=CHECKOUT hart=CHECKOUT ...`. "Untouched" and "bit for bit"
compare the picture and the logits of every scale with `torch.equal`; "= oracle" compares the logits with the fp64 oracle put into
the public module's globals (relative error 1e-4 in fp32; in bf16 3e-2, the last scale left out, since a token may differ by
then).
"windows" is CSLA and Pooled at the last two scales, "reuse" is Reuse and Pooled there with a decision scale before them.
"""


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def commit_of(checkout: str) -> str:
    return subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def rows_of(model: str, checkouts: dict[str, str]) -> list[dict]:
    """What run.py finds of a model, or peers.py of a step's public code beside ours."""
    calls = [("peers.py", peer, checkouts[of], checkouts[model]) for peer, of in PEERS.get(model, ())]
    lines = []
    for script, *arguments in calls or [("run.py", model, checkouts[model])]:
        call = [sys.executable, str(HERE / script), *arguments]
        lines += subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def table(rows: list[dict]) -> list[str]:
    """A line for each setting and check; settings that share a verdict are not merged, so that nothing hides."""
    lines = ["| dtype | batch | aspect | setting | check | holds |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row["dtype"], row.get("batch", 1), row.get("aspect", 1.0), row.get("options", ""), row["check"],
                 "yes" if row["holds"] else "**no**")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "timm", "accelerate", "flash-attn"))
    lines = [HEAD, f"sparvar-tune at {commit_of(str(HERE))}; Python {sys.version.split()[0]}, {packages}.", ""]
    places = dict(argument.split("=", 1) for argument in sys.argv[1:])
    checkouts = {model: place.partition("@")[0] for model, place in places.items()}
    for model, checkout in checkouts.items():
        commit = places[model].partition("@")[2]
        rows = rows_of(model, checkouts)
        held = sum(row["holds"] for row in rows)
        lines += [f"## {model}", "", f"{SOURCES[model]} at {commit or commit_of(checkout)}: {held} of {len(rows)} hold.", ""]
        lines += [*table(rows), ""]
    OUT.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
