"""The adapters on the public code, for each checkout that the environment names (SPARVAR_INFINITY, SPARVAR_HART, SPARVAR_VAR)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["infinity", "hart", "var"])
def test_every_check_holds(model):
    checkout = os.environ.get(f"SPARVAR_{model.upper()}")
    if not checkout:
        pytest.skip(f"SPARVAR_{model.upper()} names no checkout")
    done = subprocess.run([sys.executable, str(RUN), model, checkout], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows and not [row for row in rows if not row["holds"]]
