"""Profiling runs: what is off costs nothing, what is on names every step, the table adds up and the files open."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import adapter_checks as checks
import block_lookalikes
import pytest
import tiny
import torch
import var_hart_lookalikes
from command_line import refused, run
from places import PYTHONPATH, ROOT

from sparvar_kernels import AttentionProblem, Cs4a, Csla, Policy, Pooled, Reuse, Rule, ScaleSchedule, SparseAttention, Tile
from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.configs import CpuConfig, TritonConfig
from sparvar_kernels.geometry.scales import partition
from sparvar_kernels.policy import plan_layers
from sparvar_kernels.variants.lists import KeyLists
from sparvar_tune import adapters, fused
from sparvar_tune.catalog import models
from sparvar_tune.cli import parser
from sparvar_tune.generation import Precision
from sparvar_tune.live.pocketvar import PocketAdapter
from sparvar_tune.measure.limits import Limits
from sparvar_tune.tracing import Label, Span, Tracer, backends, chrome, frame, runs, seams, traced, work
from sparvar_tune.tracing.backends import proton
from sparvar_tune.tracing.ranges import Work
from sparvar_tune.tracing.seams import SEAMS, TRITON
from sparvar_tune.tracing.table import text

WINDOWS = (-1, -1, -1, -1, 3, 3, 3)
TRACE = ["trace", "--gpu", "cpu", "--model", "pocketvar", "--way", "paper"]
TILE = Tile(4, 4)
# layer 0: pooled and CS4A heads; layer 1: CSLA heads alone; scale 4 is the decision scale of scale 6
MIXED = Policy(("AC", "BB"), (Rule(5, "A", Pooled(3, 2)), Rule(6, "A", Cs4a(4, 0.2, TILE)), Rule(6, "B", Csla(WINDOWS, 2, TILE)),
                              Rule(6, "C", Reuse(4))))  # fmt: skip


class Steps:
    """A clock that ticks once a look: times are numbers of looks."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def now(self) -> int:
        return next(self.ticks)

    def read(self, marks):
        return [float(mark) for mark in marks]


class Heard:
    """Keeps what it hears, and that ranges nest."""

    def __init__(self) -> None:
        self.names, self.stack = [], []

    def push(self, name: str) -> None:
        self.names.append(name)
        self.stack.append(name)

    def pop(self) -> None:
        self.stack.pop()


@pytest.fixture
def adapter(monkeypatch, home) -> PocketAdapter:
    tiny.install(monkeypatch.setattr)
    return PocketAdapter(models.MODELS["pocketvar"], "cpu")


def attention(adapter, policy=MIXED) -> SparseAttention:
    return SparseAttention(policy, adapter.schedule, softmax_scale=1.0, logit_bound=adapter.logit_bound)


def draw(adapter, attend) -> torch.Tensor:
    return adapter.finish(adapter.start((1, 7), 0), attend)


def places():
    """(module or class, name) of every seam, Triton's too."""
    for seam in SEAMS:
        owner = importlib.import_module(seam.module)
        *classes, name = seam.name.split(".")
        with contextlib.suppress(AttributeError):  # a family's stack has the parts it needs
            owner = functools.reduce(getattr, classes, owner)
            if seam not in seams._STACKS or name in vars(owner):
                yield owner, name


def test_off_is_the_bare_function_again():
    pytest.importorskip("triton")
    before = [(owner, name, vars(owner)[name]) for owner, name in places()]
    with traced(Tracer("m")):
        assert all(vars(owner)[name] is not was for owner, name, was in before)
    assert all(vars(owner)[name] is was for owner, name, was in before)
    with pytest.raises(RuntimeError, match="in the middle"), traced(Tracer("m")):
        raise RuntimeError("in the middle")
    assert all(vars(owner)[name] is was for owner, name, was in before)
    with traced(Tracer("m")):
        with pytest.raises(ValueError, match="one at a time"), traced(Tracer("m")):
            pass
        assert all(vars(owner)[name] is not was for owner, name, was in before)


def test_every_step_is_named_and_no_pixel_changes(adapter):
    attend = attention(adapter)
    plain = draw(adapter, attend)
    tracer = Tracer("tiny", Steps(), heard := Heard())
    with traced(tracer):
        assert torch.equal(draw(adapter, attend), plain)
    spans = tracer.spans()
    assert heard.stack == [] and heard.names[0] == "trace" and len(heard.names) == len(spans)
    assert set(heard.names[1:]) == {str(span.label) for span in spans[1:]}
    assert str(Label("tiny", "qk path", 6, 1, "csla")) == "model=tiny scale=6 layer=1 step=qk-path variant=csla"
    seen = collections.Counter((s.label.step, s.label.scale, s.label.layer, s.label.variant) for s in spans)
    assert {key for key in seen if key[0] == "gathered"} == {
        ("gathered", 6, 0, "cs4a"), ("gathered", 6, 1, "csla"), ("gathered", 4, 0, "cs4a")  # scale 4: its residual
    }  # fmt: skip
    assert {key[1:3] for key in seen if key[0] == "residual"} == {(6, 0)}  # of the CS4A head and of the one that reuses
    assert {key[1:3] for key in seen if key[0] == "pooled"} == {(5, 0)}
    assert {key[1:3] for key in seen if key[0] == "decide"} == {(4, 0)}
    assert {key[1:3] for key in seen if key[0] == "dense"} == {(s, la) for s in range(7) for la in (0, 1)} - {(6, 0), (6, 1)}
    for step in ("qk path", "attention", "products"):
        assert {key[1:3] for key in seen if key[0] == step} >= {(s, la) for s in range(7) for la in (0, 1)}, step
    assert spans[0].own_ms + sum(s.own_ms for s in spans[1:]) == spans[0].ms  # every moment is in one range's own time


@pytest.mark.parametrize("kind", ["infinity", "var", "hart"])
def test_blocks_that_run_as_one_are_named(kind):
    """By family: how many norms and products a layer has outside of attention, and products and texts inside."""
    driven = {"infinity": block_lookalikes.Infinity, "var": var_hart_lookalikes.Var, "hart": var_hart_lookalikes.Hart}[kind]()
    norms, outside, inside, texts = {"infinity": (3, 4, 2, 1), "var": (2, 2, 2, 0), "hart": (3, 3, 2, 0)}[kind]
    layers = len(driven.blocks)
    attend, _ = checks.attention_of(driven, checks.policies(layers, len(driven.grids()))["windows"])
    family, parts = adapters.recognise(driven.model)
    with fused.put_on(family, parts, attend, "fused"):
        plain = checks.draw(driven)
        tracer = Tracer("m", Steps())
        with traced(tracer):
            assert checks.same(checks.draw(driven), plain)
    spans = [s for s in tracer.spans() if s.label.scale is not None]
    seen = collections.Counter((s.label.step, s.label.scale, s.label.layer) for s in spans)
    last = len(driven.grids()) - 1
    for s in range(last + 1):
        assert seen["norm", s, None] == norms * layers + 1 and seen["products", s, None] == outside * layers
        for layer in range(layers):
            assert seen["qk path", s, layer] == 1 and seen["products", s, layer] == inside and seen["text", s, layer] == texts
    assert {key[1] for key in seen if key[0] == "gathered"} == {last - 1, last}
    assert {key[1] for key in seen if key[0] == "dense"} == set(range(last))  # of scale last - 1 some heads


def test_the_models_own_attention_is_dense(adapter):
    tracer = Tracer("tiny", Steps())
    with traced(tracer):
        draw(adapter, adapter.dense)
    dense = [s for s in tracer.spans() if s.label.step == "dense"]
    assert {(s.label.scale, s.label.layer) for s in dense} == {(s, la) for s in range(7) for la in (0, 1)}
    keys = adapter.schedule.num_keys(6)
    assert dense[-1].work == Work(4.0 * 2 * 256 * keys * 32, 2.0 * 2 * (256 + keys) * 32 * 4)


def test_work_of_lists_counts_every_pair_once():
    """By hand, tile by tile; and what a GPU's table says of the same heads is the same."""
    pytest.importorskip("triton")
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11)))
    variant, problem = Csla((-1, -1, 3, 3, 5), 2, Tile(4, 3)), AttentionProblem(schedule, 4, 2, 3, 16)
    lists = variant.lists(schedule, 4, "cpu")
    q, k, v = problem.make_inputs(0)
    got = work.gathered_lists(q, k, v, lists, (0, 1, 2), q, problem, CpuConfig())()
    pairs, seen = 0, set()
    for tile, count in enumerate(lists.counts[0, 0].tolist()):
        pairs += count * int(lists.tiles.counts[tile])
        seen |= set(lists.keys[0, 0, tile, :count].tolist())
    assert got == Work(4.0 * 16 * pairs * 6, 2.0 * 4 * 16 * (99 + len(seen)) * 6)
    # what only fills a list, here key 29, is not read
    short = KeyLists(partition((1, 4), Tile(1, 2)), torch.tensor([[[[0, 1], [1, 29]]]], dtype=torch.int32),
                     torch.tensor([[[2, 1]]], dtype=torch.int32))  # fmt: skip
    assert work.gathered_lists(q, k, v, short, (0,), q, problem, CpuConfig())() == Work(
        4.0 * 16 * (2 * 2 + 2 * 1) * 2, 2.0 * 4 * 16 * (4 + 2) * 2
    )
    from sparvar_kernels.backends.triton.layer import Layer

    policy = Policy.uniform(1, 3, {4: variant})
    problems = [dataclasses.replace(problem, scale_index=s) for s in range(5)]
    layer = Layer(plan_layers(policy, schedule)[0], problems, [TritonConfig()] * 5, "cpu")
    layer.prepare(4)
    ((stage, _),) = layer.stages.values()
    assert work.stage_work(stage, problem) == got


def test_the_table_adds_up():
    limits = Limits(copy_bytes_per_s=1e9, gemm_flops_per_s=1e12)
    spans = [
        Span(Label("m", "trace"), 0, 10.0, 1.0, None),
        Span(Label("m", "gathered", 3, 0, "csla"), 0, 4.0, 4.0, Work(2e9, 1e6)),  # 2 ms of products, 1 ms of copying
        Span(Label("m", "gathered", 3, 1, "cs4a"), 4, 4.0, 4.0, Work(0.0, 2e6)),
        Span(Label("m", "dense", 2, 0), 8, 1.0, 1.0, None),
    ]
    table = frame(spans, limits)
    assert table[["step", "variant", "calls"]].values.tolist() == [
        ["dense", "", 1],
        ["gathered", "cs4a+csla", 2],
        ["rest", "", 1],
    ]
    assert table.scale.isna().tolist() == [False, False, True] and table.share.tolist() == [0.1, 0.8, 0.1]
    assert table.limit_ms[1] == 4.0 and table.of_limit[1] == 0.5 and table.gflop.isna().tolist() == [True, False, True]
    assert [line.split() for line in text(table).splitlines()] == [
        ["ms,", "by", "scale", "and", "step"], ["scale", "gathered", "dense", "rest", "all", "share"],
        ["2", "1.00", "1.00", "10.0%"], ["3", "8.00", "8.00", "80.0%"], ["-", "1.00", "1.00", "10.0%"],
        ["all", "8.00", "1.00", "1.00", "10.00"], ["share", "80.0%", "10.0%", "10.0%"], [],
        "% of limit, where the work of every call is known".split(), ["scale", "gathered"], ["3", "50%"],
    ]  # fmt: skip


def test_more_than_the_limit_is_explained():
    limits = Limits(copy_bytes_per_s=1e9, gemm_flops_per_s=1e12)
    span = Span(Label("m", "dense", 2, 0), 0, 1.0, 1.0, None)
    shown = [text(frame([dataclasses.replace(span, work=Work(flops, 0.0))], limits)) for flops in (1e9, 1.004e9, 1.2e9)]
    assert [("above 100 %" in said, "120%" in said) for said in shown] == [(False, False), (False, False), (True, True)]


def test_products_of_8_bit_numbers_are_not_held_against_a_limit_in_the_models_dtype(adapter):
    """On both paths to them: inside a Linear's forward, and where blocks run as one."""
    attend = attention(adapter, dataclasses.replace(MIXED, rules=(), steps=(Precision(5, ((1, 1),), "int8"),)))
    for adapter.as_one in (False, True):
        with traced(Tracer("m", Steps())) as tracer:
            draw(adapter, attend)
        table = frame(tracer.spans(), Limits(1e10, 1e11))
        products = table[table.step == "products"].set_index("scale")
        assert products.variant[[4, 5, 6]].tolist() == ["", "int8", "int8"], adapter.as_one
        assert products.of_limit[[4, 5, 6]].isna().tolist() == [False, True, True], adapter.as_one


def test_the_trace_file_opens(adapter, tmp_path):
    """The trace-event format's rules, and that each range is there under its name."""
    subject = runs.one_picture(adapter, attention(adapter), (1, 7))
    subject.draw()  # what is planned once is planned
    (path,) = runs.tell(subject, "torch", tmp_path / "a")
    data = chrome.read_trace(path)
    names = [e["name"] for e in data["traceEvents"] if e.get("cat") == "user_annotation"]
    want = ["trace" if s.label.step == "trace" else str(s.label) for s in runs.spans_of(subject)]
    assert collections.Counter(names) == collections.Counter(want) and len(chrome.kernels(data)) == 0

    def broken(**changes):
        first = next(e for e in data["traceEvents"] if e.get("cat") == "user_annotation")
        return chrome.why_not_trace({"traceEvents": [{**first, **changes}, first]})

    assert broken() is None
    assert ".ph" in broken(ph="Z") and ".ts" in broken(ts="soon") and ".dur" in broken(dur=-1.0) and ".name" in broken(name=None)
    outer = next(e for e in data["traceEvents"] if e["name"] == "trace")
    assert "ends after" in chrome.why_not_trace({"traceEvents": [outer, {**outer, "ts": outer["ts"] + outer["dur"] / 2}]})
    for damage in (path.read_text()[:1000], "[]", "{}", '{"traceEvents": [3]}'):
        (tmp_path / "b.json").write_text(damage)
        with pytest.raises(ValueError, match="no trace file"):
            chrome.read_trace(tmp_path / "b.json")


def test_kernels_by_name():
    """What is seen of a CUDA graph's replay."""
    names = {"gathered_kernel": 2.0, "select_kernel": 3.0, "nvjet_tst_128x8_v": 1.0, "elementwise_kernel": 0.5,
             "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": 4.0}  # fmt: skip
    events = [{"ph": "X", "cat": "kernel", "name": n, "ts": 0, "dur": 1e3 * ms} for n, ms in names.items()]
    table = chrome.kernels(
        {"traceEvents": [*events, events[0], {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1}]}
    )
    assert table.step.tolist() == ["dense", "gathered", "decide", "products", "rest"]
    assert table.calls.tolist() == [1, 2, 1, 1, 1] and table.ms.tolist() == [4.0, 4.0, 3.0, 1.0, 0.5]


def test_nvtx_hears_the_ranges_of_its_domain(adapter, monkeypatch, tmp_path):
    nvtx = pytest.importorskip("nvtx")
    heard, domains = Heard(), []

    class Domain:
        get_event_attributes = staticmethod(lambda message: message)
        push_range, pop_range = heard.push, heard.pop

    monkeypatch.setattr(nvtx, "get_domain", lambda name: domains.append(name) or Domain)
    subject = runs.one_picture(adapter, attention(adapter), (1, 7))
    assert runs.tell(subject, "nvtx", tmp_path / "a") == [] and domains == ["sparvar"]
    assert heard.names[0] == "trace" and "model=pocketvar scale=6 layer=1 step=gathered variant=csla" in heard.names
    assert heard.stack == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler here")
def test_a_tool_that_listens_hears_the_ranges(tmp_path):
    """As Nsight does: a library that the process is told to load hears them by NVTX's own way."""
    pytest.importorskip("nvtx")
    library, heard = tmp_path / "listener.so", tmp_path / "heard"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, Path(__file__).with_name("nvtx_listener.c")], check=True)
    told = {"NVTX_INJECTION64_PATH": str(library), "NVTX_HEARD": str(heard), "SPARVAR_TUNE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, tiny.__file__, "0", "1", *TRACE, "--with", "nvtx", "--out", tmp_path / "out"],
                          env={**os.environ, **told}, capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = heard.read_text().splitlines()
    pushed = [line.removeprefix("sparvar push ") for line in lines if line.startswith("sparvar push ")]
    assert pushed[0] == "trace" and "model=pocketvar scale=6 layer=1 step=gathered variant=csla" in pushed
    assert len(pushed) == lines.count("sparvar pop") == len(lines) / 2


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--with nvtx: .* pip install 'sparvar-tune\[profile\]'"):
        backends.open_session("nvtx", "cpu")
    with pytest.raises(ValueError, match="use --with torch"):
        backends.open_session("proton", "cpu")


def test_proton_scopes_nest(monkeypatch):
    profiler, said = pytest.importorskip("triton.profiler"), []
    monkeypatch.setattr(profiler, "enter_scope", lambda name: said.append(f"+{name}"))
    monkeypatch.setattr(profiler, "exit_scope", lambda name: said.append(f"-{name}"))
    scopes = proton.Scopes()
    for name in "ab":
        scopes.push(name)
    scopes.pop(), scopes.pop()
    assert said == ["+a", "+b", "-b", "-a"]


@pytest.fixture
def quick_limits(monkeypatch):
    from sparvar_tune.cli.commands import trace

    monkeypatch.setattr(trace, "machine_limits", lambda device, dtype: Limits(1e10, 1e11))


def test_the_command_writes_table_and_trace(adapter, quick_limits, capsys, tmp_path):
    import pandas

    code, out, err = run(capsys, *TRACE, "--out", str(tmp_path / "out"))
    assert code == 0 and "ui.perfetto.dev" in out and "% of limit" in out, err
    stem = tmp_path / "out" / "pocketvar-cpu-paper"
    table = pandas.read_csv(f"{stem}.csv")
    assert {"qk path", "plan", "decide", "gathered", "dense", "products"} <= set(table.step) and abs(table.share.sum() - 1) < 1e-4
    assert table[table.step == "gathered"].of_limit.notna().all()
    chrome.read_trace(Path(f"{stem}.trace.json"))
    code, out, _ = run(capsys, *TRACE[:-1], "dense", "--layer", "1", "--with", "torch", "--json", "--out", str(tmp_path))
    said = json.loads(out)
    assert code == 0 and {row["step"] for row in said["rows"]} == {"dense", "attention", "rest"} and "layer 1" in said["what"]
    assert all(Path(path).is_file() for path in said["files"]) and len(said["files"]) == 2


def test_a_model_of_a_file_draws_its_picture_and_dense_is_called_dense(quick_limits, home, capfd, tmp_path):
    model = ("--model", f"{ROOT / 'examples' / 'own_model.py'}:open_model", "--gpu", "cpu", "--out", str(tmp_path))
    code, out, err = run(capfd, "trace", *model, "--json")
    said = json.loads(out)
    assert code == 0 and said["what"] == "one picture (shade 0, seed 7)" and said["way"] == "dense", err
    assert err.count("\n") == 1 and err.startswith("no profile: "), err  # and the profiler tells nothing of its own
    first = (tmp_path / "mine-cpu-dense.csv").read_text().splitlines()
    assert first[0].endswith(",model,gpu,layer") and first[1].endswith(",mine,cpu,")
    assert said["files"][0] == str(tmp_path / "mine-cpu-dense.csv") and "products" in {row["step"] for row in said["rows"]}
    assert "one image at a time" in refused(capfd, "trace", *model, "--images", "2")
    _, options = parser.read_options(["trace", *model, "--with", "nsys"])
    assert options.words[:3] == ["trace", *model[:2]]  # what runs under the tool opens the same file


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_a_tool_that_is_not_here_has_its_command_printed(adapter, capsys, tmp_path, monkeypatch, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, _ = run(capsys, *TRACE, "--with", tool, "--layer", "1", "--out", "some where")
    command = shlex.split(out.splitlines()[1])
    assert code == 3 and command[0] == tool and "sparvar" in out.splitlines()[1]
    inner = command[command.index(sys.executable) + 1 :]
    assert inner[:3] == ["-m", "sparvar_tune", "trace"]  # and it says the same as what was typed, but for NVTX
    typed = parser.read_options([*TRACE, "--with", "nvtx", "--layer", "1", "--out", "some where"])
    assert parser.read_options(inner[2:]) == typed


def test_a_tool_that_is_here_is_run(adapter, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    tool = tmp_path / "nsys"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/told\nexit 0\n')
    tool.chmod(0o755)
    code, out, _ = run(capsys, *TRACE, "--with", "nsys", "--out", str(tmp_path / "out"))
    assert code == 0 and "pocketvar-cpu-paper.nsys-rep" in out
    assert (tmp_path / "told").read_text().splitlines()[0] == "profile"
    tool.write_text("#!/bin/sh\nexit 7\n")
    assert "ended with exit code 7" in refused(capsys, *TRACE, "--with", "nsys", "--out", str(tmp_path / "out"))
    (tmp_path / "ncu").symlink_to(tool)
    assert "want a CUDA GPU" in refused(capsys, *TRACE, "--with", "ncu", "--out", str(tmp_path / "out"))


def test_bad_input_is_one_line(adapter, quick_limits, capsys, tmp_path):
    assert "0..1" in refused(capsys, *TRACE, "--layer", "2")
    assert "want a CUDA GPU" in refused(capsys, *TRACE, "--mode", "graph")
    assert "want 0..9" in refused(capsys, *TRACE, "--class", "dog")
    assert "--way tuned" in refused(capsys, *TRACE, "--profile", "x.json")
    assert "not in this machine" in refused(capsys, "trace", "--gpu", "h200", "--model", "hart")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, *TRACE, "--with", "torch", "--layer", "0", "--out", str(tmp_path / "file"))


def test_the_gpus_steps_have_names(monkeypatch):
    """One layer by the GPU's way, planned and called here with launches that do nothing."""
    pytest.importorskip("triton")
    for module in (TRITON, *(f"sparvar_kernels.backends.triton.{name}" for name in ("selecting", "choosing"))):
        monkeypatch.setattr(importlib.import_module(module), "launcher", lambda build, device: lambda grid, *rest: None)
    schedule = ScaleSchedule(((1, 1), (2, 2), (3, 3), (4, 4)))
    policy = Policy(("ABC",), (Rule(3, "A", Cs4a(2, 0.5, Tile(2, 2))), Rule(3, "B", Csla((-1, 3, 3, 3), 1, Tile(2, 2))),
                               Rule(3, "C", Pooled(2, 2))))  # fmt: skip
    attend = SparseAttention(policy, schedule, launches={s: Launch("triton") for s in range(4)})
    problems = [AttentionProblem(schedule, s, 1, 3, 32) for s in range(4)]
    tracer = Tracer("m", Steps())
    with traced(tracer):
        runs.one_layer("m", problems, attend, 0, "cpu").draw()
    spans = tracer.spans()
    assert {(s.label.step, s.label.scale, s.label.variant) for s in spans} >= {
        ("plan", 2, ""), ("decide", 2, ""), ("dense", 2, ""), ("gathered", 2, "cs4a"), ("gathered", 3, "cs4a+csla"),
        ("pooled", 3, "pooled"), ("dense", 0, "")
    }  # fmt: skip
    assert all(s.work.flops > 0 for s in spans if s.label.step == "gathered")


def sparse_layer():
    schedule = ScaleSchedule.square((1, 2, 4, 6, 8))
    policy = Policy(("AB",), (Rule(4, "A", Cs4a(3, 0.5, TILE)), Rule(4, "B", Csla((-1, -1, 3, 3, 3), 1, TILE))))
    problems = [AttentionProblem(schedule, s, 2, 2, 64, "bf16") for s in range(5)]
    return runs.one_layer("m", problems, SparseAttention(policy, schedule), 0, "cuda")


@pytest.mark.gpu
def test_a_graphs_kernels_have_names(tmp_path):
    subject = sparse_layer()
    spans = runs.spans_of(subject)
    assert {s.label.step for s in spans} >= {"gathered", "decide", "dense"} and all(s.ms >= 0 for s in spans)
    (path,) = runs.tell(subject, "torch", tmp_path / "a", graph=True)
    found = chrome.kernels(chrome.read_trace(path))
    assert {"gathered", "decide", "dense"} <= set(found.step)


@pytest.mark.gpu
def test_protons_scopes_name_the_steps(tmp_path):
    """In a process of its own: CUPTI serves one profiler a process."""
    code = f"import pathlib, test_tracing as t; t.runs.tell(t.sparse_layer(), 'proton', pathlib.Path({str(tmp_path / 'b')!r}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), PYTHONPATH, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (tree,) = tmp_path.glob("b*")
    assert "step=gathered" in tree.read_text() and "scale=4" in tree.read_text()
