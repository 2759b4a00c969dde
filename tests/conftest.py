"""Shared by all tests: one thread a process, fixed seeds, NaN-poisoned outputs, and `gpu` tests that say why they are skipped."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from sparvar_kernels.backends import dense
from sparvar_kernels.backends.cpu import gathered as gathered_cpu
from sparvar_kernels.backends.cpu import layer as layer_cpu

# The same examples on every run and machine: a failure here is a failure there.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
# One thread, here and in the processes that tests start: two on a machine whose cores are taken wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)  # before the test modules: some make profiles of this machine when they are read


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Two processes get half of the list each, and take from one another's end: each begins with long ones, so both end together.
    slow, fast = ([item for item in items if ("slow" in item.keywords) == long] for long in (True, False))
    items[:] = slow[::2] + fast[: len(fast) // 2] + slow[1::2] + fast[len(fast) // 2 :]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the entry point and the kernels allocate starts as NaN, so a row that no kernel writes cannot pass."""
    if "benchmark" in request.fixturenames:
        return  # filling is not part of what is timed

    class Poisoned:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        @staticmethod
        def empty(*args: object, **kwargs: object) -> torch.Tensor:
            return torch.empty(*args, **kwargs).fill_(float("nan"))  # type: ignore[call-overload]

        @staticmethod
        def empty_like(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(t).fill_(float("nan"))

    for module in (layer_cpu, dense, gathered_cpu):
        monkeypatch.setattr(module, "torch", Poisoned())


@pytest.fixture
def home(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """An empty home for profiles and runs."""
    monkeypatch.setenv("SPARVAR_TUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
