"""Python as it is while first images are drawn, and as it was before."""

from __future__ import annotations

import gc
import sys
import threading

import adapter_checks as checks
import block_lookalikes
import pytest
import torch
import var_hart_lookalikes
from boxed_checks import NAMES, Driven
from fused_checks import fold_all, on
from torch.utils._python_dispatch import TorchDispatchMode

from sparvar_tune.fused.first_image import TURN_S, beside, sample_once, undisturbed
from sparvar_tune.fused.product import Product
from sparvar_tune.fused.workspace import OnePass


@pytest.fixture(autouse=True)
def as_before():
    collects, turn_s = gc.isenabled(), sys.getswitchinterval()
    yield
    (gc.enable if collects else gc.disable)()
    sys.setswitchinterval(turn_s)


def seen():
    return gc.isenabled(), round(sys.getswitchinterval(), 5)


def test_the_last_that_ends_puts_back_what_there_was():
    sys.setswitchinterval(0.005)
    first, second = undisturbed(), undisturbed()  # of two threads: neither lies within the other
    first.__enter__()
    assert seen() == (False, TURN_S)
    second.__enter__()
    first.__exit__(None, None, None)
    assert seen() == (False, TURN_S)
    second.__exit__(None, None, None)
    assert seen() == (True, 0.005)


def test_what_somebody_else_chose_stays():
    gc.disable()
    sys.setswitchinterval(0.0001)
    with pytest.raises(KeyError), undisturbed():
        assert seen() == (False, 0.0001)
        raise KeyError
    assert seen() == (False, 0.0001)


class Launched(TorchDispatchMode):
    """What was launched: its names, and of products the shapes and dtypes."""

    def __init__(self):
        super().__init__()
        self.names, self.products = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "bmm"):
            self.products.add((name, *((tuple(t.shape), t.dtype) for t in args if t.ndim > 1)))
        return function(*args, **(kwargs or {}))


def sampled(logits, top_k, top_p):
    """As the models' own code samples (arXiv 1904.09751, section 3.1), written apart from what is tested."""
    kept = logits.where(logits >= logits.topk(top_k, sorted=False).values.amin(-1, True), -torch.inf)
    ordered, places = kept.sort(-1)
    tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    kept.masked_fill_(tail.scatter(-1, places, tail), -torch.inf)
    return torch.multinomial(kept.softmax(-1)[0], 1, replacement=True)


def test_what_sampling_launches_is_launched_and_no_random_number_is_taken():
    before, seen, wanted = torch.get_rng_state(), Launched(), Launched()
    with seen:
        sample_once(torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    with wanted:
        sampled(torch.zeros(1, 3, 8), 2, 0.9)
    kernels = {"topk", "amin", "sort", "_softmax", "scatter", "multinomial"}
    assert kernels <= wanted.names and kernels <= seen.names
    assert any(name.startswith("cumsum") for name in seen.names)


FAMILIES = {"infinity": block_lookalikes.Infinity, "folded": block_lookalikes.Infinity, "var": var_hart_lookalikes.Var,
            "hart": var_hart_lookalikes.Hart}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_of_a_pass_is_one_of_those_multiplied_once(family, dtype, monkeypatch):
    """And no other: what nobody needs would be loaded while the image waits."""
    if family == "folded":
        fold_all(monkeypatch)
    driven = FAMILIES[family](dtype)
    monkeypatch.setattr("sparvar_tune.fused.workspace.dense_attention", lambda q, k, v, problem: torch.zeros_like(q))
    monkeypatch.setattr("sparvar_tune.fused.infinity.text_attention", lambda q, *rest, out: out)  # no products of a block's
    with on(driven) as path:
        checks.draw(driven)
        work, stack = path.fused.work, path.fused.stack
        width = work.x.numel() // (work.rows * work.tail)
        for s in range(len(work.schedule)):
            x = torch.zeros(work.rows, work.schedule.num_queries(s), width, dtype=work.x.dtype)
            run, once = Launched(), Launched()
            with torch.no_grad(), run:
                stack.run(x, OnePass(work, work.schedule.starts[s], x))
            with torch.no_grad(), once:
                stack.multiply_once(work.rows, x.shape[1])
            assert run.products and once.products == run.products


@pytest.mark.parametrize("driven", NAMES, indirect=True)
def test_every_product_of_a_pass_of_the_models_in_the_box_is_one_of_them(driven, monkeypatch):
    monkeypatch.setattr("sparvar_tune.fused.workspace.dense_attention", lambda q, k, v, problem: torch.zeros_like(q))
    with driven.on() as path:
        driven.begin().run()
        work, stack = path.fused.work, path.fused.stack
        for s in range(len(work.schedule)):
            x, run, once = path.fused._stream(work.rows, work.schedule.num_queries(s)), Launched(), Launched()
            with torch.no_grad(), run:
                stack.run(x, OnePass(work, work.schedule.starts[s], x))
            with torch.no_grad(), once:
                stack.multiply_once(work.rows, x.shape[1])
            assert run.products and once.products == run.products


@pytest.fixture
def driven(request) -> Driven:
    return Driven(request.param)


def test_what_is_no_plain_linear_is_not_called():
    linear, calls = torch.nn.Linear(4, 4), []
    linear.register_forward_hook(lambda *given: calls.append(given))
    Product(linear, torch.float32).once(1, 2)
    assert calls == []


def test_what_is_done_beside_ends_and_what_it_raises_is_nobodys():
    done = []
    beside(lambda: done.append(torch.is_grad_enabled()), torch.device("cpu")).join()
    beside(lambda: done[5], torch.device("cpu")).join()
    assert done == [False]


def test_nothing_is_captured_while_libraries_load(monkeypatch):
    order, let = [], threading.Event()

    def captured(*_):
        order.append("captured")
        return "no GPU"

    monkeypatch.setattr("sparvar_tune.fused.workspace.captured", captured)
    driven = block_lookalikes.Infinity()
    with on(driven) as path:
        checks.draw(driven)
        work = path.fused.work
        work.begin(lambda: (let.wait(60), order.append("loaded")))
        threading.Timer(0.05, let.set).start()
        with pytest.warns(UserWarning, match="without graphs: no GPU"):
            assert work.capture(lambda: None, torch.device("cpu")) is None
    assert order == ["loaded", "captured"]
