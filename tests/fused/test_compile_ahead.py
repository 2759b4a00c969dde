"""Compiling in children for a GPU that is not here: they fill Triton's cache, and what they do not make this process makes."""

from __future__ import annotations

import importlib._bootstrap
import os
import signal
import sys
import tempfile
import threading
import time
import types
from importlib.util import find_spec

import pytest
import torch

from sparvar_tune.fused import compile_ahead as ahead

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone"),
]
HOPPER = (9, 0)
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def binary(monkeypatch, tmp_path):
    """A cache and a folder for temporary files of their own, and launchers that are binaries, as there is no GPU."""
    from sparvar_kernels.backends.triton import binary

    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(binary, "Launcher", lambda build, device: binary.compile_for(build, HOPPER))
    monkeypatch.setattr(binary, "load_driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    binary.launcher.cache_clear()
    yield binary
    binary.launcher.cache_clear()
    assert not list((tmp_path / "temporary").iterdir()), "files were left behind"


@pytest.fixture
def forked(monkeypatch):
    """Who was forked here; nobody of them is left when the test ends."""
    children, own = [], os.fork

    def fork():
        child = own()
        if child:
            children.append(child)
        return child

    monkeypatch.setattr(os, "fork", fork)
    yield children
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


@pytest.fixture
def compiled(binary, monkeypatch):
    """What this process compiled, not its children."""
    import triton

    here, own, process = [], triton.compile, os.getpid()

    def compile_(source, **options):
        make = source.make_ir
        if os.getpid() == process and make is not binary._make_nothing:
            source.make_ir = lambda *a: here.append(source) or make(*a)
        return own(source, **options)

    monkeypatch.setattr(triton, "compile", compile_)
    return here


def builds(many: int) -> list:
    from sparvar_kernels.path.triton.residual_norm import residual_norm_build

    return [residual_norm_build(torch.float32, torch.float32, 16 * (i + 1), "none", True, {}) for i in range(many)]


def is_made(binary, build) -> bool:
    try:
        with binary.only_made():
            binary.compile_for(build, HOPPER)
    except binary.NotMade:
        return False
    return True


def test_children_compile_and_this_process_does_not(binary, forked, compiled, capfd):
    wanted = builds(4)
    assert not any(is_made(binary, b) for b in wanted)
    ahead.compile_ahead([*wanted, wanted[0]], DEVICE)
    assert len(forked) == 1 and not compiled and all(is_made(binary, b) for b in wanted)
    assert [binary.launcher(b, DEVICE) for b in wanted] and not compiled
    assert capfd.readouterr() == ("", "")


def test_nobody_is_forked_for_what_is_there(binary, forked, compiled):
    wanted = builds(2)
    for build in wanted:
        binary.compile_for(build, HOPPER)
    del compiled[:]
    ahead.compile_ahead(wanted, DEVICE)
    assert not forked and not compiled


@pytest.mark.parametrize("ends", ["raises", "crashes", "hangs"])
def test_what_a_child_does_not_make_is_made_here(ends, binary, forked, compiled, monkeypatch):
    wanted, own, process = builds(3), binary.compile_for, os.getpid()
    monkeypatch.setattr(ahead, "LIMIT_S", 1)
    monkeypatch.setattr(ahead, "_side_by_side", lambda jobs: 1)

    def compile_for(build, capability):
        if os.getpid() != process and build == wanted[1]:
            if ends == "crashes":
                os.kill(os.getpid(), signal.SIGKILL)
            while ends == "hangs":
                time.sleep(60)
            raise RuntimeError("as the compiler may")
        return own(build, capability)

    monkeypatch.setattr(binary, "compile_for", compile_for)
    ahead.compile_ahead(wanted, DEVICE)
    assert len(forked) == 1 and all(is_made(binary, b) for b in wanted)
    assert len(compiled) == (1 if ends == "raises" else 2), "the one child took the largest first, and none after this one"


@pytest.mark.parametrize("ends", [True, False])
def test_children_do_not_find_modules_half_imported(binary, forked, compiled, monkeypatch, ends):
    """The fork waits for an import in another thread, so long as it ends; a child would wait for it for ever."""
    monkeypatch.setattr(ahead, "LIMIT_S", 1)
    monkeypatch.setattr(ahead, "IMPORT_S", 60 if ends else 0)
    wanted, inside, leave, order = builds(1), threading.Event(), threading.Event(), []
    module = sys.modules["sparvar_kernels.path.triton.residual_norm"]
    fork = os.fork

    def import_slowly():
        with importlib._bootstrap._ModuleLockManager(module.__name__):
            module.__spec__._initializing = True
            inside.set()
            leave.wait(60)
            module.__spec__._initializing = False
            order.append("imported")

    def forks():
        order.append("forked")
        return fork()

    monkeypatch.setattr(os, "fork", forks)
    holder = threading.Thread(target=import_slowly)
    holder.start()
    assert inside.wait(60)
    if ends:
        threading.Timer(0.05, leave.set).start()
    wait = ahead.in_children(wanted, HOPPER)
    leave.set()
    holder.join()
    wait()
    assert order == (["imported", "forked"] if ends else ["forked", "imported"])
    assert is_made(binary, wanted[0]) == ends and not compiled


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_children_compile_than_asked_for(binary, forked, monkeypatch, tmp_path, most):
    """Each leaves a file of its own; where there are to be two, the first keeps its binary until the other took one."""
    wanted, mine = builds(3), os.getpid()
    names = {build: str(i) for i, build in enumerate(wanted)}

    def compile_for(build, capability):
        if os.getpid() == mine:
            raise binary.NotMade
        (tmp_path / f"{names[build]} {os.getpid()}").touch()
        while most > 1 and len(list(tmp_path.glob("? *"))) < 2:
            time.sleep(0.01)

    monkeypatch.setattr(binary, "compile_for", compile_for)
    monkeypatch.setattr(binary, "link", lambda made: None)
    monkeypatch.setattr(ahead, "_side_by_side", lambda jobs: min(jobs, 3))
    ahead.in_children(wanted, HOPPER, most)()
    left = [path.name.split(" ") for path in tmp_path.glob("? *")]
    assert sorted(name for name, _ in left) == ["0", "1", "2"] and len({pid for _, pid in left}) == most


def test_what_cannot_be_compiled_is_said_once_by_who_waits(binary, forked, monkeypatch):
    def compile_for(build, capability):
        if binary._ONLY_MADE.get():
            raise binary.NotMade
        raise RuntimeError("out of registers")

    monkeypatch.setattr(binary, "compile_for", compile_for)
    first = ahead.Ahead(builds(1), DEVICE)
    with pytest.raises(RuntimeError, match="out of registers"):
        first.wait()
    first.wait()


@pytest.mark.parametrize("lacks", ["fork", "memory"])
def test_where_nobody_can_be_forked_threads_compile(lacks, binary, compiled, monkeypatch):
    def fork():
        raise OSError("no memory")

    if lacks == "fork":
        monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "fork", fork)
    wanted = builds(2)
    ahead.compile_ahead(wanted, DEVICE)
    assert len(compiled) == 2 and all(is_made(binary, b) for b in wanted)


def test_source_is_read_by_one_thread_at_a_time(binary, compiled, monkeypatch):
    """CPython 3.11 raises SystemError where two threads make a syntax tree at once."""
    from triton.runtime import jit

    inside, two_inside, parse = [], threading.Event(), jit.JITFunction.parse

    def parse_slowly(self):
        inside.append(self)
        if len(inside) == 2:
            two_inside.set()
        two_inside.wait(0.05)  # for the other thread
        inside.remove(self)
        return parse(self)

    monkeypatch.setattr(jit.JITFunction, "parse", parse_slowly)
    monkeypatch.setattr(sys, "platform", "darwin")
    ahead.compile_ahead(builds(2), DEVICE)
    assert len(compiled) == 2 and not two_inside.is_set()


def test_what_is_being_made_is_not_made_twice(binary, monkeypatch):
    made, begun = [], ahead.threading.Event()

    def make_ready(given, device, children, most):
        begun.wait()
        made.extend(given)

    monkeypatch.setattr(ahead, "_make_ready", make_ready)
    wanted = builds(3)
    first, second = ahead.Ahead(wanted[:2], DEVICE), ahead.Ahead(wanted, DEVICE)
    begun.set()
    second.wait()
    assert sorted(made, key=str) == sorted(wanted, key=str) and not ahead.Ahead._begun
    first.wait()


def test_others_begin_to_compile_after_what_goes_first(binary, forked, monkeypatch):
    """Children of the second are started when those of the first are at work, and not when they are done."""
    order, own = [], ahead.in_children

    def in_children(given, capability, most):
        order.append(len(given))
        wait = own(given, capability, most)

        def done():
            if len(order) == 1:
                assert seen.wait(60), "the second waits for the end of the first"
            wait()

        return done

    seen, wanted = threading.Event(), builds(3)
    monkeypatch.setattr(ahead, "in_children", in_children)
    let = threading.Event()
    first = ahead.Ahead(wanted[:1], DEVICE, after=lambda: let.wait(60))
    second = ahead.Ahead(wanted[1:], DEVICE, after=first.begun.wait)
    assert order == [] and not second.begun.is_set()
    let.set()
    second.begun.wait(60)
    seen.set()
    first.wait()
    second.wait()
    assert order == [1, 2] and all(is_made(binary, b) for b in wanted)


@pytest.mark.parametrize("ends", ["made", "raises", "nothing"])
def test_nobody_waits_for_what_begins_to_compile_no_more(binary, compiled, monkeypatch, ends):
    wanted = builds(1)
    if ends == "made":
        ahead.compile_ahead(wanted, DEVICE)
    if ends == "raises":
        monkeypatch.setattr(ahead, "_make_ready", lambda *_: 1 / 0)
    first = ahead.Ahead([] if ends == "nothing" else wanted, DEVICE)
    assert first.begun.wait(60)
    if ends == "raises":
        with pytest.raises(ZeroDivisionError):
            first.wait()


def test_the_decoder_lets_attention_go_first():
    """Also where the attention cannot be made ready: nothing then goes before it."""
    from sparvar_tune.fused import workspace

    for fails in (False, True):
        foreseen = object.__new__(workspace.Foreseen)
        foreseen._binaries = {} if fails else {s: types.SimpleNamespace(begun=threading.Event()) for s in (4, 2)}
        foreseen._thread, done = threading.Thread(target=lambda: None), []
        foreseen._thread.start()
        waiting = threading.Thread(target=lambda: done.append(foreseen.let_go_first()))  # noqa: B023
        waiting.start()
        if not fails:
            foreseen._binaries[4].begun.set()
            assert not done
            foreseen._binaries[2].begun.set()
        waiting.join(60)
        assert done == [None]


def test_an_image_waits_for_attention_where_it_is_first_sparse(monkeypatch):
    """For the blocks' own binaries before the first pass, for attention's before the first call of a scale that is not dense."""
    import adapter_checks as checks
    import block_lookalikes
    from fused_checks import on

    from sparvar_tune.fused import workspace

    class Told:
        def __init__(self, builds, device):
            self.what = next((build for build in builds if isinstance(build, str)), "blocks")
            order.append(f"begins {self.what}")

        def wait(self):
            order.append(f"waits for {self.what}")

    driven, order = block_lookalikes.Infinity(), []
    scales, own = len(driven.grids()), workspace.dense_attention
    attend, _ = checks.attention_of(driven, checks.policies(len(driven.blocks), scales)["windows"])
    monkeypatch.setattr(workspace, "Ahead", Told)
    monkeypatch.setattr(workspace, "attention_builds", lambda *_: {scales - 2: ["before"], scales - 1: ["last"]})
    monkeypatch.setattr(workspace, "plans_shapes", lambda *_: True)  # as cuDNN does
    monkeypatch.setattr(workspace, "dense_attention", lambda *given: order.append("dense") or own(*given))
    with on(driven, attend) as path:
        checks.draw(driven)
        order.clear()
        path.fused.work.compile(path.fused.stack, torch.device("cpu"))  # as a GPU's first image does
        checks.draw(driven)
    planned, dense = ["dense"] * (scales - 2), ["dense"] * (scales - 2) * len(driven.blocks)
    begun = ["begins blocks", "begins last", "begins before"]
    assert order == [*begun, *planned, "waits for blocks", *dense, "waits for before", "waits for last"]
