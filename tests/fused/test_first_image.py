"""Python as it is while first images are drawn, and as it was before."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparvar_tune.fused import first_image
from sparvar_tune.fused.first_image import TURN_S, load_sampling, undisturbed


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
    """The names of what was launched."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def sampled(logits, top_k, top_p):
    """As the models' own code samples (arXiv 1904.09751, section 3.1), written apart from what is tested."""
    kept = logits.where(logits >= logits.topk(top_k, sorted=False).values.amin(-1, True), -torch.inf)
    ordered, places = kept.sort(-1)
    tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    kept.masked_fill_(tail.scatter(-1, places, tail), -torch.inf)
    return torch.multinomial(kept.softmax(-1)[0], 1, replacement=True)


def test_what_sampling_launches_is_loaded_and_no_random_number_is_taken(monkeypatch):
    before, seen = torch.get_rng_state(), Launched()
    monkeypatch.setattr(first_image.torch, "inference_mode", lambda: seen)  # what the thread enters
    load_sampling(torch.device("cpu")).join()
    assert torch.equal(before, torch.get_rng_state())
    wanted = Launched()
    with wanted:
        sampled(torch.zeros(1, 3, 8), 2, 0.9)
    kernels = {"topk", "amin", "sort", "_softmax", "scatter", "multinomial"}
    assert kernels <= wanted.names and kernels <= seen.names
    assert any(name.startswith("cumsum") for name in seen.names)
