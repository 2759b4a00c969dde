"""What `load_profile` and `apply` are handed: another model, weights, dtype, bound, GPU or home never give a wrong picture."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from made_profiles import profile
from places import ROOT

import sparvar_tune
from sparvar_kernels import AttentionProblem, Csla, Policy, Rule, Tile, why_not
from sparvar_kernels.backends.dense import dense_attention
from sparvar_tune import runtime
from sparvar_tune.pocketvar.model import DENSE, PocketConfig, PocketVAR
from sparvar_tune.profile import store

pytestmark = pytest.mark.filterwarnings("ignore:.*(unverified|predicted|other weights)")


@pytest.fixture
def tuned(tmp_path, home):
    store.save(profile(), tmp_path / "cpu" / "pocketvar.json")
    return runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))


def inputs(problem: AttentionProblem, times: float = 1.0):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, problem.heads, n, problem.head_dim, generator=g)
               for n in (problem.num_queries, problem.num_keys, problem.num_keys))  # fmt: skip
    return q * times, k, v


@pytest.mark.parametrize("bound", [None, 100.0])
def test_the_problems_own_bound_is_used_where_it_is_larger(tmp_path, home, bound):
    """Logits of 98 under a profile certified for 20: exp without the running maximum would overflow."""
    policy = Policy(("AA", "AA"), (Rule(6, "A", Csla((0, 0, 0, 0, 1, 3, 5), 3, Tile(4, 4))),))
    store.save(profile(policy=policy, rows=profile().rows[1:]), tmp_path / "cpu" / "pocketvar.json")
    tuned = runtime.load_profile("pocketvar", gpu="cpu", folders=tmp_path)
    w = tuned.profile.workload
    p = AttentionProblem(w.schedule, 6, 1, w.heads, w.head_dim, "fp32", 1.0, bound)
    q, k, v = inputs(p)
    q = q / (q @ k.transpose(-1, -2)).abs().amax() * 98
    assert tuned.attention(p)(q, k, v, layer=0).isfinite().all()
    assert "its gain was not measured" in tuned.explain(p)


@pytest.mark.parametrize("change", [
    {"dtype": "bf16"}, {"head_dim": 16}, {"heads": 1}, {"softmax_scale": 0.5}, {"schedule": "another"},
])  # fmt: skip
def test_a_problem_of_another_shape_runs_dense_and_says_so(tuned, change):
    w = tuned.profile.workload
    schedule = w.schedule if "schedule" not in change else dataclasses.replace(w.schedule, prefix=1)
    fields = {"heads": w.heads, "head_dim": w.head_dim, "dtype": "fp32", "softmax_scale": 1.0, "logit_bound": w.logit_bound}
    p = AttentionProblem(schedule, 6, 1, **(fields | {k: v for k, v in change.items() if k != "schedule"}))
    q, k, v = p.make_inputs(0)
    assert torch.equal(tuned.attention(p)(q, k, v, layer=0), dense_attention(q, k, v, p))
    with pytest.raises(ValueError, match="q: got a NoneType"):
        tuned.attention(p)(None, k, v, layer=0)
    with pytest.raises(ValueError, match="v: got "):
        tuned.attention(p)(q, k, v[..., :-1, :], layer=0)
    for ask in (tuned.attention, tuned.explain):
        with pytest.raises(ValueError, match="problem: got a dict, want a"):
            ask({"heads": 4})
    said = tuned.explain(p)
    assert f"dense: {next(iter(change))} is" in said and "x measured" not in said


@pytest.mark.parametrize(("given", "said"), [
    ({"tuned": None}, "tuned: got a NoneType, want what sparvar_tune.load_profile"), ({"tuned": "pocketvar"}, "got a str"),
    ({"graphs": "no"}, "graphs: got 'no', want True or False"), ({"path": "quick"}, "path='quick': want one of"),
    ({"path": ["auto"]}, "path=['auto']: want one of"),
])  # fmt: skip
def test_apply_takes_nothing_but_what_it_names(tuned, given, said):
    model = tiny.make_model()
    for found in (tuned, dataclasses.replace(tuned, profile=None)):
        with pytest.raises(ValueError) as refused:
            sparvar_tune.apply(**{"model": model, "tuned": found, **given})
        assert said in str(refused.value) and "\n" not in str(refused.value)
    assert model.attend is DENSE


@pytest.mark.parametrize("bound", [math.nan, -1.0, "20", [1.0]])
def test_a_bound_of_logits_that_is_no_number_is_refused(tuned, bound):
    with pytest.raises(ValueError, match="logit_bound: got"):
        tuned.sparse_attention(bound)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0)])
def test_undone_in_any_order_the_model_is_dense_again(tuned, order):
    model = tiny.make_model()
    applied = [sparvar_tune.apply(model, tuned) for _ in range(3)]
    left = [0, 1, 2]
    for i in order:
        applied[i].undo()
        applied[i].undo()
        left.remove(i)
        assert (model.attend is DENSE) == (not left)
    assert "attend" in vars(model) or model.attend is DENSE


def test_undo_leaves_what_somebody_else_put_in(tuned):
    model, other = tiny.make_model(), object()
    with sparvar_tune.apply(model, tuned):
        model.attend = other
    assert model.attend is other


def test_an_exception_mid_image_takes_the_attention_out(tuned):
    model = tiny.make_model()
    with pytest.raises(RuntimeError), sparvar_tune.apply(model, tuned):
        assert model.attend is not DENSE
        raise RuntimeError("mid-image")
    assert model.attend is DENSE


@pytest.mark.parametrize(("config", "said"), [
    ({"sides": (1, 2, 4, 6, 8, 12, 14)}, "schedule is"), ({"head_dim": 16}, "head_dim is 16"), ({"heads": 3}, "heads is 3"),
    ({"depth": 3}, "layers is 3"),
])  # fmt: skip
def test_a_model_of_another_shape_is_refused(tuned, config, said):
    shape = {"depth": 2, "heads": 2, "head_dim": 32, "mlp": 32, "sides": tiny.SIDES}
    with pytest.raises(ValueError, match=said) as refused:
        sparvar_tune.apply(PocketVAR(PocketConfig(**(shape | config))), tuned)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("default:.*other weights")
def test_other_weights_are_said_and_their_bound_is_kept(tmp_path, home):
    store.save(profile(), tmp_path / "cpu" / "pocketvar.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = runtime.load_profile("pocketvar", gpu="cpu", folders=tmp_path)
    model = tiny.make_model()
    with torch.no_grad():
        for block in model.blocks:
            block.log_scale.fill_(math.log(100.0))
    with pytest.warns(UserWarning, match="does not hold"):
        applied = sparvar_tune.apply(model, tuned)
    assert model.attend.logit_bound >= 99.9 and len(applied.reasons) == 2


def test_paths_may_be_texts(tmp_path, home):
    store.save(profile(), tmp_path / "cpu" / "pocketvar.json")
    assert runtime.load_profile("pocketvar", gpu="cpu", path=str(tmp_path / "cpu" / "pocketvar.json")).profile is not None
    for folders in (str(tmp_path), [str(tmp_path)], tmp_path, (tmp_path,)):
        assert runtime.load_profile("pocketvar", gpu="cpu", folders=folders).profile is not None


DEVICES = (  # name, capability, multiprocessors, bytes: as drivers report them; whose profile serves
    ("NVIDIA H100 NVL", (9, 0), 132, 100_034_543_616, "h100-sxm"),
    ("NVIDIA GH200 480GB", (9, 0), 132, 101_997_215_744, "h100-sxm"),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 60, 42_412_802_048, None),
    ("NVIDIA A100 80GB PCIe", (8, 0), 108, 84_974_239_744, "a100-80"),
    ("NVIDIA RTX 6000 Ada Generation", (8, 9), 142, 50_876_841_984, "l40s"),
    ("NVIDIA B300 SXM6 AC", (10, 3), 148, 287_428_968_448, None),
)  # fmt: skip


def put_in(monkeypatch, name, capability, sms, memory):
    device = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=sms, total_memory=memory
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: device)


@pytest.mark.parametrize(("name", "capability", "sms", "memory", "lends"), DEVICES, ids=lambda v: str(v).replace(" ", "-"))
def test_a_gpu_in_no_row_takes_the_nearest_profile_or_runs_dense(monkeypatch, home, name, capability, sms, memory, lends):
    put_in(monkeypatch, name, capability, sms, memory)
    tuned = runtime.load_profile("infinity-8b")
    assert any(name in reason and "in no row" in reason for reason in tuned.reasons) and name in tuned.explain()
    assert (tuned.profile.silicon.gpu if tuned.profile else None) == lends
    assert not any("exact silicon" in reason for reason in tuned.reasons)


@pytest.mark.parametrize(("name", "capability", "sms", "memory", "lends"), DEVICES, ids=lambda v: str(v).replace(" ", "-"))
def test_naming_another_gpu_than_is_here_never_passes_for_it(monkeypatch, home, name, capability, sms, memory, lends):
    put_in(monkeypatch, name, capability, sms, memory)
    tuned = runtime.load_profile("infinity-8b", gpu="h100-sxm")
    assert any("h100-sxm was named, but this machine's GPU is " + name in reason for reason in tuned.reasons)
    assert not any("exact silicon" in reason or "here NVIDIA" in reason for reason in tuned.reasons)
    for row in tuned.profile.rows:
        launch = runtime.launch_of(row)
        runs = why_not(tuned.profile.workload.problem(row.scale_index), row.kernel, launch.config, capability) is None
        assert runs or "cannot run here" in tuned.demoted[row.scale_index]


def in_a_process(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("home_of", ["nobody", "a folder that is no folder", "a locked one"])
def test_without_a_home_the_shipped_profile_serves(monkeypatch, tmp_path, home_of):
    monkeypatch.delenv("SPARVAR_TUNE_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    if home_of == "nobody":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    elif home_of == "a locked one":
        monkeypatch.setenv("SPARVAR_TUNE_HOME", str(tmp_path / "locked"))
        real = Path.stat

        def stat(self, **options):
            if self.is_relative_to(tmp_path / "locked"):
                raise PermissionError(13, "Permission denied")
            return real(self, **options)

        monkeypatch.setattr(Path, "stat", stat)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SPARVAR_TUNE_HOME", str(tmp_path / "file"))
    tuned = runtime.load_profile("pocketvar", gpu="cpu")
    assert tuned.profile is not None and tuned.path.is_relative_to(store.shipped_folder())
    if home_of != "a folder that is no folder":
        assert any("could not be looked at" in reason for reason in tuned.reasons)
    missed = runtime.load_profile("hart", gpu="rtx5090", record_miss=True) if home_of == "nobody" else None
    assert missed is None or any("not recorded" in reason for reason in missed.reasons)


def test_a_tilde_is_this_users_home(monkeypatch):
    monkeypatch.setenv("SPARVAR_TUNE_HOME", "~/tuned")
    assert store.user_folder() == Path.home() / "tuned" / "profiles"


@pytest.mark.slow
def test_the_runtime_and_the_command_line_need_nothing_of_unix():
    """As on Windows: no fcntl, no pwd, no resource, no termios."""
    blocked = "import sys\nfor name in ('fcntl', 'pwd', 'grp', 'resource', 'termios'): sys.modules[name] = None\n"
    code = blocked + "import sparvar_tune.cli\nfrom sparvar_tune.runtime import load_profile\n"
    code += "print(load_profile('pocketvar', gpu='cpu').path.name)"
    assert in_a_process(code, SPARVAR_TUNE_HOME="/nowhere") == "pocketvar.json"
