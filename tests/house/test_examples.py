"""Every script in examples/ runs as it stands, in a process and a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "apply": "PSNR of tuned against dense", "one_call": "scale 12: q (1, 4, 4096, 64)", "read_profile": "h100-sxm",
    "own_model": "(1, 6): (1, 2, 256, 32)",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path, tmp_path):
    assert path.read_text().count("\n") <= 70, "an example is read in one go"
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "SPARVAR_TUNE_HOME": str(tmp_path)
    }  # fmt: skip
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout, done.stdout
