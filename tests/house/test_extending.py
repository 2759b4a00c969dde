"""The diffs of docs/extending.md fit the sources as they are, and what they add works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from places import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text("utf-8")
CODE = """
import torch, own_model
from sparvar_tune.catalog import gpus, models
from sparvar_tune.cli import parser
from sparvar_tune.catalog.metrics import METRICS
import sparvar_tune
assert gpus.distance(gpus.find_gpu("rtx4080"), gpus.find_gpu("rtx4090")) < 1
assert models.find_model("tiny").schedule().grids == own_model.SCHEDULE.grids
assert (1, 6) in sparvar_tune.capture(own_model.open_model("cpu"))
picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
assert abs(METRICS["uqi"].compare(picture, picture) - 1) < 1e-3
sys_exit = parser.main(["--gpu", "cpu", "--model", "pocketvar", "--min", "uqi=2", "--dry-run"])
assert sys_exit == 2
from sparvar_kernels import AttentionProblem, Policy, ScaleSchedule, SparseAttention, Tile
from sparvar_kernels.attention import Launch
from sparvar_kernels.variants import VARIANTS, variant_from_dict, variant_to_dict
schedule = ScaleSchedule(((1, 1), (4, 4), (7, 9)))
variant = VARIANTS["strided"](3, Tile(4, 4))
assert variant_from_dict(variant_to_dict(variant), "") == variant
p = AttentionProblem(schedule, 2, 1, 2, 16)
q, k, v = p.make_inputs(0)
for backend in ("cpu", "eager"):
    attend = SparseAttention(Policy.uniform(1, 2, {2: variant}), schedule, launches={s: Launch(backend) for s in range(3)})
    assert (attend(q, k, v, 0, 2) - variant.oracle(q, k, v, p, None)).abs().max() < 1e-5
"""


def hunks() -> list[tuple[str, str, str]]:
    """(file, the lines that stand there, those that shall) of every hunk."""
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```$", TEXT, re.M | re.S):
        file = re.search(r"^\+\+\+ b/(\S+)$", block, re.M)[1]
        for hunk in block.split("\n@@\n")[1:]:
            lines = hunk.splitlines()
            before, after = ("\n".join(line[1:] for line in lines if line[:1] in (sign, " ", "")) for sign in "-+")
            found.append((file, before, after))
    return found


@pytest.mark.parametrize(("file", "before"), sorted({(file, before) for file, before, _ in hunks()}))
def test_a_diff_fits(file, before):
    path = ROOT / file
    assert not before or f"{before}\n" in path.read_text("utf-8"), f"{file} has no longer:\n{before}"


@pytest.mark.slow
def test_what_the_diffs_add_works(tmp_path):
    for package in ("sparvar_tune", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copy(ROOT / "examples" / "own_model.py", tmp_path)
    for file, before, after in hunks():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        text = path.read_text("utf-8") if path.exists() else ""
        path.write_text(text.replace(before, after, 1) if before else after + "\n", "utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(tmp_path / "kernels")])}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0..1" in done.stderr
