"""The adapters on the public code, for each checkout that the environment names (SPARVAR_INFINITY, SPARVAR_HART, SPARVAR_VAR),
and generation steps beside the code they come from (SPARVAR_SCALEKV, SPARVAR_FASTVAR, with those of the models).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN, PEERS = (Path(__file__).with_name(name) for name in ("run.py", "peers.py"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["infinity", "hart", "var"])
def test_every_check_holds(model):
    hold(RUN, model, checkout_of(model))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("peer", "model"), [("scalekv", "infinity"), ("fastvar", "infinity"), ("fastvar_hart", "hart")])
def test_a_step_is_its_public_code(peer, model):
    hold(PEERS, peer, checkout_of(model), checkout_of(peer.split("_")[0]))


def checkout_of(name: str) -> str:
    checkout = os.environ.get(f"SPARVAR_{name.upper()}")
    if not checkout:
        pytest.skip(f"SPARVAR_{name.upper()} names no checkout")
    return checkout


def hold(script: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows and not [row for row in rows if not row["holds"]]
