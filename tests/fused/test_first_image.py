"""Python as it is while first images are drawn, and as it was before."""

from __future__ import annotations

import gc
import sys

import pytest

from sparvar_tune.fused.first_image import TURN_S, undisturbed


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
