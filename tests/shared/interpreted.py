"""Runs an expression over a test module in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from places import PYTHONPATH, TESTS


def in_interpreter(module: str, expression: str) -> Any:
    """The JSON value of `expression`, which may use the module as `t`, in a process started with TRITON_INTERPRET=1."""
    folder = next(TESTS.rglob(f"{module}.py")).parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(folder), PYTHONPATH])}
    code = f"import json, {module} as t\nprint(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
