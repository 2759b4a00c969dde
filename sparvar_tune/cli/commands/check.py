"""The command `check`: what is here, and every variant against the oracle on a small odd problem."""

from __future__ import annotations

from sparvar_kernels import AttentionProblem, Policy, ScaleSchedule, SparseAttention, Tile, oracle
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant
from sparvar_tune.cli.console import say
from sparvar_tune.cli.options import CheckOptions
from sparvar_tune.measure.fidelity import relative_l2
from sparvar_tune.profile.machine import choose_gpu, is_here, silicon, versions


def run(options: CheckOptions) -> int:
    gpu, v, ok = choose_gpu(options.gpu), versions(), True
    if not is_here(gpu):
        raise ValueError(f"check: {gpu.slug} is not in this machine; run it where it is, or leave out --gpu")
    say(f"sparvar-tune {v.sparvar_tune}, python {v.python}, torch {v.torch}, triton {v.triton or 'not installed'}")
    here = silicon(gpu, True)
    say(f"silicon: {gpu.slug} ({here.name}{f', {here.threads} threads' if here.threads else ''})")
    device = "cpu" if gpu.slug == "cpu" else "cuda"
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11)), prefix=3)
    tile = Tile(4, 3)
    variants: list[Variant] = [
        Dense(), Csla((-1, -1, 3, 3, 5), 2, tile), Csla((-1, -1, 3, 3, 5), 2, tile, decision_scale=3),
        Cs4a(3, 0.4, tile), Pooled(3, 2), Reuse(3),
    ]  # fmt: skip
    for variant in variants:
        error = _oracle_error(variant, schedule, device)
        good = error < 1e-4
        ok &= good
        say(f"{'ok  ' if good else 'FAIL'} {variant.kind:7} relative error {error:.1e} against the fp64 oracle ({device}, fp32)")
    return 0 if ok else 1


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
