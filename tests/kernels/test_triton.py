"""The Triton kernel: in the interpreter here, on the device with `-m gpu`, and compiled ahead of time for every target.

The interpreter is chosen by an environment variable read when a kernel is defined, so those checks run in a process of
their own and the other tests never see it.
"""

from __future__ import annotations

import pytest
import torch
from gathered_checks import LAST_CASES, ODD, TILE, VARIANTS, check, edges_layouts_and_bits, needs_triton
from interpreted import in_interpreter
from places import ROOT
from tolerances import TOLERANCES
from usage_target import plain, usage

from sparvar_kernels import (
    AttentionProblem,
    Cs4a,
    Csla,
    Dense,
    NearFar,
    Policy,
    Pooled,
    Reuse,
    Rule,
    ScaleSchedule,
    SparseAttention,
    Tile,
    oracle,
    why_not,
)
from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.configs import SHARED_LIMIT, TritonConfig
from sparvar_kernels.backends.triton.table import Column
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.launch_search.compiling import Binary, compile_all, compilers
from sparvar_tune.launch_search.layer_call import Bench
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile import store

CASES = [
    (name, dtype, dim)
    for name in VARIANTS
    for dtype, dim in (("fp32", 32), ("fp32", 80), ("fp16", 64), ("bf16", 64), ("fp32", 128))
]


def check_three_targets(device: str, heads: int = 3) -> float:
    """One ranking fills the lists of the decision scale and of two finer ones; the largest relative error of the latter."""
    schedule = ScaleSchedule(((1, 1), (3, 4), (6, 5), (7, 9), (11, 10)))
    variants = {3: Cs4a(2, 0.6, Tile(4, 3), window=1), 4: Cs4a(2, 0.6, Tile(6, 3), window=1)}
    there = {s: v.at_decision(schedule, s).tile for s, v in variants.items()}
    assert there[3] == there[4], "two rankings: not what is to be tested"
    problems = {s: AttentionProblem(schedule, s, 2, heads, 32, "fp32", 1.0, 12.0) for s in (2, 3, 4)}
    launches = {s: Launch("triton", TritonConfig(16, 32, 4, 1 if device == "cpu" else 2)) for s in range(len(schedule))}
    attend = SparseAttention(Policy.uniform(1, heads, variants), schedule, logit_bound=12.0, launches=launches)
    inputs = {s: p.make_inputs(s) for s, p in problems.items()}
    worst = 0.0
    for s, (q, k, v) in inputs.items():
        got = attend(q.to(device), k.to(device), v.to(device), 0, s)
        if s > 2:
            want = oracle.reference_attention(variants[s], q, k, v, problems[s], (problems[2], *inputs[2]), there[s])
            worst = max(worst, float((got.cpu().double() - want).norm() / want.norm()))
    return worst


def check_predicted_builds(device: str) -> tuple[int, int]:
    """(binaries launched, of which nobody foresaw): what `compiling.binaries` plans on a CPU against what calls launch.

    On a CPU the kernels themselves are left out: what is launched never depends on what they computed.
    """
    from sparvar_kernels.backends.triton import choosing, selecting
    from sparvar_kernels.backends.triton import layer as layer_triton
    from sparvar_tune.launch_search.compiling import binaries

    schedule = ScaleSchedule(((1, 1), (2, 2), (4, 4), (6, 6), (8, 8)))
    windows = (-1, -1, 3, 3, 5)
    policies = [
        Policy(("ABCD",), (Rule(4, "A", Csla(windows, 2, Tile(4, 4))), Rule(4, "B", Cs4a(3, 0.3, Tile(4, 8))),
                           Rule(4, "C", Pooled(3, 2)), Rule(3, "C", NearFar(3, 0, Tile(4, 4))),
                           Rule(3, "D", Csla(windows, 2, Tile(4, 4))),
                           Rule(4, "D", Csla(windows, 2, Tile(8, 8), decision_scale=2)))),
        Policy(("ABAB",), (Rule(4, "A", Reuse(3)), Rule(4, "B", Csla(windows, 2, Tile(0, 128), "block128")))),
        Policy(("ABAB",), (Rule(4, "A", Cs4a(3, 0.21, Tile(0, 24), residual=False)), Rule(4, "B", Cs4a(2, 0.4, Tile(4, 4))))),
        Policy(("AAAA",), (Rule(3, "A", Cs4a(2, 0.3, Tile(0, 12), keys="index", bands=(3, 3))),
                           Rule(4, "A", Cs4a(2, 0.2, Tile(0, 12), keys="index", bands=(3, 3))))),
    ]  # fmt: skip
    config, launched, original = TritonConfig(16, 32, 4, 1 if device == "cpu" else 2), set(), selecting.launcher
    launch = original if device == "cuda" else lambda build, device: lambda grid, *rest: None
    problems = {s: AttentionProblem(schedule, s, 2, 4, 32, "fp32", 1.0, 12.0) for s in range(5)}
    planned = set()
    for module in (layer_triton, selecting, choosing):
        module.launcher = lambda build, device: (launched.add(build), launch(build, device))[1]
    try:
        for policy in policies:
            for s in sorted({r.scale_index for r in policy.rules}):
                planned |= {b.build for b in binaries(policy, problems, 0, s, config, (9, 0))}
                bench = Bench(policy, problems, 0, s, tuple(t.to(device) for t in problems[s].make_inputs(1)))
                bench.call(bench.attention(config))
    finally:
        layer_triton.launcher = selecting.launcher = choosing.launcher = original
    return len(launched), len(launched - planned)


@pytest.mark.slow
@needs_triton
def test_interpreter_agrees_with_oracle():
    errors = in_interpreter(
        "test_triton",
        "{' '.join(map(str, c)): t.check(*c, 'cpu') for c in t.CASES if c[1] != 'bf16'}"
        " | {'three targets fp32 32': t.check_three_targets('cpu')}",
    )
    assert len(errors) == sum(dtype != "bf16" for _, dtype, _ in CASES) + 1  # the interpreter's dot takes bf16 for integers
    for case, error in errors.items():
        dtype = case.split()[-2]
        assert error < 2 * TOLERANCES[dtype], f"{case}: {error}"


@pytest.mark.slow
@needs_triton
def test_every_binary_a_call_launches_is_foreseen():
    """So that compiling happens in processes that may be killed, all at once, and never while a GPU is timed."""
    launched, unforeseen = in_interpreter("test_triton", "t.check_predicted_builds('cpu')")
    assert launched >= 12 and unforeseen == 0


@needs_triton
@pytest.mark.parametrize("name", ["hart", "infinity-8b", "var-d16", "var-d36"])
def test_the_papers_policy_can_be_planned_on_every_model(name):
    """Key buffers of every sparse scale, built without a GPU; small schedules have lists of odd lengths."""
    from sparvar_kernels.backends.triton.work import build_stage

    model = MODELS[name]
    schedule = model.schedule()
    policy = paper_policy(schedule, model.layers, model.heads)
    for layer in (0, model.layers - 1):
        for s in range(len(schedule) - 3, len(schedule)):
            problem = AttentionProblem(schedule, s, 1, model.heads, model.head_dim, model.dtype)
            variant = policy.variant(layer, 0, s)
            if isinstance(variant, Dense):
                continue
            stage = build_stage([(variant, (0, 1))], problem, TritonConfig(), "cpu", [None], [None])
            used = stage.table[:, Column.LIST_AT] + stage.table[:, Column.COUNT]
            assert int(used.max()) <= len(stage.keys) and int(stage.keys.max()) < problem.num_keys


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(map(str, c)))
def test_gpu_agrees_with_oracle(case):
    assert check(*case, "cuda") < 2 * TOLERANCES[case[1]]


@pytest.mark.gpu
def test_gpu_selection_of_three_targets():
    assert check_three_targets("cuda") < 2 * TOLERANCES["fp32"]


@pytest.mark.gpu
def test_gpu_launches_only_what_is_foreseen():
    launched, unforeseen = check_predicted_builds("cuda")
    assert launched >= 12 and unforeseen == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_last_scale_of_infinity(dtype, dim):
    """4096 x 10521, batch 2, against masked fp32 attention on the GPU."""
    from sparvar_kernels.variants.csla.planner import tile_mask

    schedule = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    variant = Csla((-1,) * 8 + (1, 1, 3, 5, 7), 5, Tile(8, 16))
    problem = AttentionProblem(schedule, 12, 2, 4, dim, dtype, 1.0, 20.0)
    q, k, v = problem.make_inputs(0, "cuda")
    out = SparseAttention(Policy.uniform(1, 4, {12: variant}), schedule, logit_bound=20.0)(q, k, v, 0, 12)
    from sparvar_kernels.geometry.scales import partition

    mask = tile_mask(schedule, 12, variant)[partition((64, 64), variant.tile).tile_of].cuda()
    scores = (q.float() @ k.float().transpose(-1, -2)).masked_fill_(~mask, float("-inf"))
    want = torch.softmax(scores, -1) @ v.float()
    assert float((out.float() - want).norm() / want.norm()) < TOLERANCES[dtype]


TARGETS = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))


def aot_jobs() -> dict[Binary, int]:
    """Every configuration a shipped profile names and the default ones, on every target, where it adds a residual.

    Without one it is the same loop with less behind it: it took no more shared memory in any of 82 pairs, and at most 64 bytes
    of spills more, of the 1024 allowed here. So only the default ones are compiled without one too.

    Value: the shared memory it should take.
    """
    problems = {
        AttentionProblem(ODD, 4, 2, 2, dim, dtype, 1.0, bound): {TritonConfig()}
        for dim, dtype, bound in ((128, "bf16", 20.0), (64, "fp16", None))
    }
    for path in sorted((ROOT / "profiles").glob("*/*.json")):
        shipped = store.load(path)
        w = shipped.workload
        for row in shipped.rows:
            if row.kernel == "triton":
                problem = AttentionProblem(ODD, 4, 2, 2, w.head_dim, w.dtype, 1.0, w.logit_bound)
                problems.setdefault(problem, set()).add(TritonConfig(**dict(row.config)))
    from sparvar_kernels.backends.triton.layer import gathered_build

    found = {}
    for problem, configs in problems.items():
        for config in sorted(configs, key=str):
            for epilogue in (0, 1) if config == TritonConfig() else (1,):
                build = gathered_build(problem, config, epilogue=epilogue, masked=True)
                for capability in TARGETS:
                    if why_not(problem, "triton", config, capability) is None:
                        found[Binary(build, capability)] = config.shared_bytes(problem)
    return found


def ranking_builds() -> list[Binary]:
    """The mass and selection kernels of a full-size decision scale, on every target."""
    from sparvar_kernels.backends.triton.selecting import mass_build, sampled_rows, select_build

    schedule = MODELS["infinity-8b"].schedule()
    here, later = (AttentionProblem(schedule, s, 2, 28, 128, "bf16", 1.0, 20.0) for s in (10, 12))
    variant = Cs4a(10, 0.1, Tile(8, 16), sample=4, window=3)
    tile = variant.at_decision(schedule, 12).tile
    builds = (mass_build(here, sampled_rows(here, tile, 4), True), select_build(variant, later, torch.bfloat16))
    return [Binary(build, capability) for build in builds for capability in TARGETS]


@pytest.mark.slow
@needs_triton
def test_shipped_configurations_fit_every_target():
    """Compiled without a GPU: shared memory as `shared_bytes` says and within the GPU table, registers, hardly a spill."""
    jobs = aot_jobs()
    assert {job.capability for job in jobs} == set(TARGETS)
    found = usage([*jobs, *ranking_builds()])
    whole = list({job.capability: job for job in jobs}.values())  # one a target by the tuner's way: it reads the same
    with compilers(2) as pool:
        assert {job: plain(made) for job, made in compile_all(whole, pool, lambda text: None).items()} == {
            job: plain(found[job]) for job in whole
        }
    for job, result in found.items():
        assert result.failure is None, (job, result)
        assert result.registers <= 255 and result.spill_bytes <= 1024, (job, result)
        assert result.shared_bytes <= SHARED_LIMIT[job.capability], (job, result)
        if job in jobs:
            assert result.shared_bytes <= jobs[job] + 512, (job, result)  # sm_100 takes 32 to 288 bytes more
    for gpu in GPUS.values():
        if gpu.capability is not None:
            assert SHARED_LIMIT[gpu.capability] == gpu.smem_per_block_bytes, gpu.slug


def test_what_does_not_fit_is_illegal():
    big = AttentionProblem(ODD, 4, 1, 1, 256, "bf16")
    assert why_not(big, "triton", TritonConfig(128, 64, 8, 7), (9, 0)) is not None
    assert "shared memory" in (why_not(big, "triton", TritonConfig(128, 64, 8, 7), (9, 0)) or "")
    assert why_not(AttentionProblem(ODD, 4, 1, 1, 128, "bf16"), "triton", TritonConfig(128, 64, 8, 5), (9, 0)) is None
    assert "shared memory" in (
        why_not(AttentionProblem(ODD, 4, 1, 1, 128, "bf16"), "triton", TritonConfig(128, 64, 8, 5), (8, 9)) or ""
    )


def test_why_not_names_what_is_wrong():
    problem = AttentionProblem(ODD, 4, 1, 1, 64, "bf16")
    assert why_not(problem, "triton", TritonConfig(), (9, 0)) is None
    for config, capability, reason in (
        (TritonConfig(block_m=48), (9, 0), "block_m=48"), (TritonConfig(num_warps=3), (9, 0), "num_warps=3"),
        (TritonConfig(), (7, 5), "capability 7.5"), (TritonConfig(num_stages=0), None, "num_stages=0"),
        (TritonConfig(maxnreg=30), None, "maxnreg=30"),
    ):  # fmt: skip
        assert reason in (why_not(problem, "triton", config, capability) or "")
    assert "fp64" in (why_not(AttentionProblem(ODD, 4, 1, 1, 64, "fp64"), "triton", TritonConfig(), None) or "")
    assert "head_dim=8" in (why_not(AttentionProblem(ODD, 4, 1, 1, 8), "triton", TritonConfig(), None) or "")
    assert "want one of" in (why_not(problem, "cuda", TritonConfig(), None) or "")
    assert "want CpuConfig" in (why_not(problem, "cpu", TritonConfig(), None) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAST_CASES)
@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 64), ("bf16", 96), ("fp16", 96), ("fp16", 128)])
def test_gpu_edges_layouts_and_bits(name, dtype, dim):
    edges_layouts_and_bits(name, dtype, dim)


@pytest.mark.gpu
def test_gpu_image_never_waits_and_can_be_captured():
    """A decision scale and what follows: no host synchronisation once prepared, and a CUDA graph replays new inputs."""
    policy = Policy(
        ("AABC",), (Rule(4, "A", Cs4a(3, 0.5, TILE)), Rule(4, "B", Csla((-1, -1, 3, 3, 5), 2, TILE, decision_scale=3)))
    )
    attend = SparseAttention(policy, ODD, logit_bound=12.0)
    problems = [AttentionProblem(ODD, s, 2, 4, 64, "bf16", 1.0, 12.0) for s in (3, 4)]
    first, second = ([p.make_inputs(seed + i, "cuda") for i, p in enumerate(problems)] for seed in (0, 10))
    static = [[t.clone() for t in inputs] for inputs in first]

    def image(inputs):
        attend.reset()  # an image begins; here its first scales are left out
        return [attend(*tensors, 0, s) for tensors, s in zip(inputs, (3, 4), strict=True)]

    image(static)
    want = [t.clone() for t in image(second)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        image(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = image(static)
    for inputs, new in zip(static, second, strict=True):
        for t, n in zip(inputs, new, strict=True):
            t.copy_(n)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
