"""The fused paths of VAR, HART and the models in the box by Triton kernels, interpreted: right in the engine's buffers, and the
launches foreseen."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
from interpreted import in_interpreter

KERNELS = ("append", "gated_silu", "residual_norm")


def run(family: str) -> list:
    """[worst error of the logits against the untouched model, launches not foreseen, foreseen ones that did not come].

    How much a pass gates decides which of two kernels gates it, so both of these may be foreseen.
    """
    import adapter_checks as checks
    import var_hart_lookalikes
    from fused_checks import errors, on

    driven = getattr(var_hart_lookalikes, family)(layers=1)
    plain, launched = checks.draw(driven), watch_launches()
    with on(driven) as path:
        ours = checks.draw(driven)
        assert path.why_not_fused is None
        return [max(errors(ours, plain)), *not_foreseen(path, launched)]


def run_boxed(name: str) -> list:
    """The same of a model in the box."""
    from test_fused_boxed import Driven, error, logits_of

    driven = Driven(name)
    plain, launched = logits_of(driven.begin()), watch_launches()
    with driven.on() as path:
        ours = logits_of(driven.begin())
        assert path.why_not_fused is None
        return [error(ours, plain), *not_foreseen(path, launched)]


def watch_launches() -> list:
    launched: list = []
    for name in KERNELS:
        module = importlib.import_module(f"sparvar_kernels.path.triton.{name}")
        own = module.launcher
        getattr(module, f"{name}_launch").cache_clear()  # what another model launched is launched again
        module.launcher = lambda build, device, own=own: (launched.append(build), own(build, device))[1]
    return launched


def not_foreseen(path, launched: list) -> list:
    schedule = path.fused.work.schedule
    lengths = [*filter(None, [schedule.prefix]), *(schedule.num_queries(s) for s in range(len(schedule)))]
    foreseen = set(path.fused.stack.builds(lengths))
    idle = [str(b) for b in foreseen - set(launched) if "gated_silu" not in b.kernel]
    return [[str(b) for b in set(launched) - foreseen], idle]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_path_by_its_kernels():
    found = in_interpreter(
        "test_fused_interpreted",
        ("{name: t.run(name) for name in ('Hart', 'Var')} | {name: t.run_boxed(name) for name in ('pocketvar', 'emojivar')}"),
    )
    for family, (error, unforeseen, idle) in found.items():
        assert error < 1e-5 and not unforeseen and not idle, (family, error, unforeseen, idle)
