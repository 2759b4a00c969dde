"""The command `check`: what is here, and every variant against the oracle on a small odd problem."""

from __future__ import annotations

from dataclasses import dataclass

from sparvar_kernels import AttentionProblem, Policy, ScaleSchedule, SparseAttention, Tile, oracle
from sparvar_kernels.variants import Cs4a, Csla, Dense, NearFar, Pooled, Reuse, Variant
from sparvar_tune.cli.console import say
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import print_answer
from sparvar_tune.cli.options import CheckOptions
from sparvar_tune.measure.fidelity import relative_l2
from sparvar_tune.profile.machine import choose_gpu, device_name, is_here, silicon, versions
from sparvar_tune.profile.schema import Silicon, Versions

MOST = 1e-4  # relative error of fp32 against fp64; an index that is off by one gives 1e-1


@dataclass(frozen=True)
class Checked:
    """One variant on this device in fp32; error: relative L2 against the fp64 oracle."""

    variant: str
    error: float
    good: bool


@dataclass(frozen=True)
class CheckAnswer:
    """What is here, and what agreed with the oracle. device: where it ran, "cpu" or "cuda"."""

    versions: Versions
    silicon: Silicon
    device: str
    variants: tuple[Checked, ...]


def run(options: CheckOptions) -> ExitCode:
    gpu, v = choose_gpu(options.gpu), versions()
    if not is_here(gpu):
        raise ValueError(f"check: {gpu.slug} is not in this machine; run it where it is, or leave out --gpu")
    device, here = "cpu" if gpu.slug == "cpu" else "cuda", silicon(gpu, True)
    if not options.json:
        say(f"sparvar-tune {v.sparvar_tune}, python {v.python}, torch {v.torch}, triton {v.triton or 'not installed'}")
        say(f"silicon: {gpu.slug} ({device_name(here)})")
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11)), prefix=3)
    tile = Tile(4, 3)
    variants: list[Variant] = [
        Dense(), Csla((-1, -1, 3, 3, 5), 2, tile), Csla((-1, -1, 3, 3, 5), 2, tile, decision_scale=3),
        Cs4a(3, 0.4, tile), Pooled(3, 2), NearFar(3, 0, tile), Reuse(3),
    ]  # fmt: skip
    found = []
    for variant in variants:
        error = _oracle_error(variant, schedule, device)
        name = "csla with residual" if isinstance(variant, Csla) and variant.decision_scale else variant.kind
        found.append(Checked(name, error, error < MOST))
        if not options.json:
            word = "ok  " if error < MOST else "FAIL"
            say(f"{word} {name:18} relative error {error:.1e} against the fp64 oracle ({device}, fp32)")
    code = ExitCode.DONE if all(one.good for one in found) else ExitCode.FAILED
    if options.json:
        print_answer("check", code, CheckAnswer(v, here, device, tuple(found)))
    return code


def _oracle_error(variant: Variant, schedule: ScaleSchedule, device: str) -> float:
    decision, last = (AttentionProblem(schedule, s, 1, 2, 32, logit_bound=8.0) for s in (3, 4))
    before, now = decision.make_inputs(0), last.make_inputs(1)
    attend = SparseAttention(
        Policy.uniform(1, 2, {} if variant.reads == "everything" else {4: variant}), schedule, logit_bound=8.0
    )
    for problem, inputs in ((decision, before), (last, now)):
        q, k, v = (t.to(device) for t in inputs)
        got = attend(q, k, v, 0, problem.scale_index).cpu()
    tile = getattr(variant.at_decision(schedule, 4), "tile", None)
    want = oracle.reference_attention(variant, *now, last, (decision, *before), tile)
    return relative_l2(got, want)
