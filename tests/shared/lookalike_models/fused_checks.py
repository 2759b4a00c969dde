"""The fused path put on a look-alike, and how far its logits may be from those of the untouched model."""

from __future__ import annotations

import threading
import warnings

import adapter_checks as checks
from torch import nn

from sparvar_tune import adapters, fused
from sparvar_tune.fused import folded_text

BOUND = {"fp32": 2e-5, "bf16": 0.03}


def errors(got: checks.Drawn, want: checks.Drawn) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(got.logits, want.logits, strict=True)]


def on(driven, attend=None, **options):
    family, parts = adapters.recognise(driven.model)
    return fused.put_on(family, parts, attend, "fused", **options)


def ours_and_own(driven, path) -> tuple[checks.Drawn, checks.Drawn]:
    """A picture on the path and one with the path off, whatever is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = checks.draw(driven)
        path.fused.enabled = False
        own = checks.draw(driven)
        path.fused.enabled = True
    return ours, own


def fold_all(monkeypatch) -> None:
    """Texts of the look-alikes' length are folded though their heads are small."""
    monkeypatch.setattr(folded_text, "ROOM", 4)
    monkeypatch.setattr(folded_text, "MOST_OF_HEAD", 100.0)


def compiled(monkeypatch) -> tuple[set, set]:
    """The binaries that are made in the background from now on, and those that are made when they are launched."""
    from sparvar_kernels.backends.triton import binary

    ahead, late, own = set(), set(), binary.compile_for
    drawing = threading.current_thread()

    def compile_for(build, capability):
        (late if threading.current_thread() is drawing else ahead).add(build)
        return own(build, capability)

    monkeypatch.setattr(binary, "compile_for", compile_for)
    binary.launcher.cache_clear()
    return ahead, late


def assert_called(driven, where: str, bound: float) -> None:
    """A module of block 1 that is no plain Linear is called: what it adds is in our logits."""
    plain = checks.draw(driven)
    owner, _, name = where.rpartition(".")
    parent = driven.blocks[1].get_submodule(owner)
    setattr(parent, name, Adds(getattr(parent, name)).requires_grad_(False))
    own = checks.draw(driven)
    with on(driven):
        ours = checks.draw(driven)
    assert max(errors(ours, own)) < bound < max(errors(own, plain))


class Adds(nn.Module):
    """As LoRA: a Linear and something more."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.more(x)
