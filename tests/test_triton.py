"""The Triton kernel: in the interpreter here, on the device with `-m gpu`, and compiled ahead of time for every target.

The interpreter is chosen by an environment variable read when a kernel is defined, so those checks run in a process of
their own and the other tests never see it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import TOLERANCES

from sparvar_kernels import AttentionProblem, Cs4a, Csla, Policy, Reuse, Rule, ScaleSchedule, SparseAttention, Tile, why_not
from sparvar_kernels import reference as oracle
from sparvar_kernels.attention import Launch
from sparvar_kernels.configs import TritonConfig
from sparvar_kernels.variants import at_decision
from sparvar_tune.gpus import GPUS

ODD = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11)))
TILE = Tile(4, 3)
VARIANTS = {
    "csla": Csla((-1, -1, 3, 3, 5), 2, TILE),  # lists of different lengths
    "csla residual": Csla((-1, -1, 3, 3, 5), 2, Tile(9, 11), decision_scale=3),  # one tile of 99 rows: several programs
    "cs4a": Cs4a(3, 0.5, TILE),  # lists of one length, one per head
    "cs4a raster": Cs4a(3, 0.9, Tile(0, 20), residual=False),
}
CASES = [
    (name, dtype, dim)
    for name in VARIANTS
    for dtype, dim in (("fp32", 32), ("fp32", 80), ("fp16", 64), ("bf16", 64), ("fp32", 128))
]


def check(name: str, dtype: str, dim: int, device: str, batch: int = 2, heads: int = 3, schedule: ScaleSchedule = ODD) -> float:
    """Relative error of one case, with only some heads sparse and k, v cut out of a larger cache."""
    variant = VARIANTS[name]
    last = len(schedule) - 1
    pair = [AttentionProblem(schedule, s, batch, heads, dim, dtype, 1.0, 12.0) for s in (3, last)]
    inputs = [p.make_inputs(i) for i, p in enumerate(pair)]
    policy = Policy(("ABA",), (Rule(last, "A", variant), Rule(last, "B", Reuse(3))))
    config = TritonConfig(block_m=32 if dim > 64 else 16, block_n=32, num_warps=4, num_stages=1 if device == "cpu" else 2)
    launches = {s: Launch("triton", config) for s in range(len(schedule))}
    attend = SparseAttention(policy, schedule, logit_bound=12.0, launches=launches)
    for p, (q, k, v) in zip(pair, inputs, strict=True):
        cache = torch.full((2, batch, heads, k.shape[2] + 9, dim), float("nan"), dtype=k.dtype, device=device)
        cache[0, :, :, : k.shape[2]], cache[1, :, :, : k.shape[2]] = k.to(device), v.to(device)
        got = attend(q.to(device), *(c[:, :, : k.shape[2]] for c in cache), layer=0, scale_index=p.scale_index)
    tile = getattr(at_decision(variant, schedule, last), "tile", None)
    want = oracle.reference_attention(variant, *inputs[1], pair[1], (pair[0], *inputs[0]), tile)[:, ::2]
    return float((got.cpu().double()[:, ::2] - want).norm() / want.norm())


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_interpreter_agrees_with_oracle():
    """All cases in one process started with TRITON_INTERPRET=1; prints one JSON object of errors."""
    code = (
        "import json, test_triton as t\n"
        "cases = [c for c in t.CASES if c[1] != 'bf16']\n"
        "print(json.dumps({' '.join(map(str, c)): t.check(*c, 'cpu') for c in cases}))"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent / "kernels")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == sum(dtype != "bf16" for _, dtype, _ in CASES)  # the interpreter's dot takes bf16 for integers
    for case, error in errors.items():
        dtype = case.split()[-2]
        assert error < 2 * TOLERANCES[dtype], f"{case}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(map(str, c)))
def test_gpu_agrees_with_oracle(case):
    assert check(*case, "cuda") < 2 * TOLERANCES[case[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_last_scale_of_infinity(dtype, dim):
    """4096 x 10521, batch 2, against masked fp32 attention on the GPU."""
    from sparvar_kernels.csla import csla_lists, tile_mask
    from sparvar_kernels.gathered_triton import gathered_attention

    schedule = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    variant = Csla((-1,) * 8 + (1, 1, 3, 5, 7), 5, Tile(8, 16))
    problem = AttentionProblem(schedule, 12, 2, 4, dim, dtype, 1.0, 20.0)
    q, k, v = problem.make_inputs(0, "cuda")
    out = torch.full_like(q, float("nan"))
    gathered_attention(q, k, v, csla_lists(schedule, 12, variant, "cuda"), range(4), out, problem, TritonConfig())
    from sparvar_kernels.scales import partition

    mask = tile_mask(schedule, 12, variant)[partition((64, 64), variant.tile).tile_of].cuda()
    scores = (q.float() @ k.float().transpose(-1, -2)).masked_fill_(~mask, float("-inf"))
    want = torch.softmax(scores, -1) @ v.float()
    assert float((out.float() - want).norm() / want.norm()) < TOLERANCES[dtype]


AOT = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparvar_kernels.gathered_triton import _gathered_kernel as kernel
found = {}
for dim in (64, 128):
    values = {"HAS_COUNTS": True, "IEEE": False, "HEAD_DIM": dim, "BLOCK_D": dim, "BLOCK_M": 64, "BLOCK_N": 64}
    signature = {}
    for name in kernel.arg_names:
        if name in values: signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"): signature[name] = "*bf16"
        elif name in ("rows_ptr", "row_counts_ptr"): signature[name] = "*i64"
        elif name.endswith("_ptr"): signature[name] = "*i32"
        elif name == "scale_log2e": signature[name] = "fp32"
        else: signature[name] = "i32"
    for cc in (80, 89, 90, 100, 120):
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": 4, "num_stages": 3})
        found[f"{cc} {dim}"] = [made.metadata.shared, len(made.asm.get("cubin", b""))]
print(json.dumps(found))
"""


@needs_triton
def test_default_configuration_fits_every_gpu_of_the_table():
    """Compiled for each capability without a GPU: shared memory within the table's limit."""
    here = Path(__file__).parent.parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here / "kernels")])
    done = subprocess.run([sys.executable, "-c", AOT], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for gpu in GPUS.values():
        if gpu.capability is None:
            continue
        for dim in (64, 128):
            shared, size = found[f"{gpu.capability[0]}{gpu.capability[1]} {dim}"]
            assert size > 0 and 0 < shared <= gpu.smem_per_block_bytes, (gpu.slug, dim, shared)


def test_why_not_names_what_is_wrong():
    problem = AttentionProblem(ODD, 4, 1, 1, 64, "bf16")
    assert why_not(problem, "triton", TritonConfig(), (9, 0)) is None
    for config, capability, reason in (
        (TritonConfig(block_m=48), (9, 0), "block_m=48"), (TritonConfig(num_warps=3), (9, 0), "num_warps=3"),
        (TritonConfig(), (7, 5), "capability 7.5"), (TritonConfig(num_stages=0), None, "num_stages=0"),
    ):  # fmt: skip
        assert reason in (why_not(problem, "triton", config, capability) or "")
    assert "fp64" in (why_not(AttentionProblem(ODD, 4, 1, 1, 64, "fp64"), "triton", TritonConfig(), None) or "")
    assert "head_dim=8" in (why_not(AttentionProblem(ODD, 4, 1, 1, 8), "triton", TritonConfig(), None) or "")
    assert "want one of" in (why_not(problem, "cuda", TritonConfig(), None) or "")
    assert "want CpuConfig" in (why_not(problem, "cpu", TritonConfig(), None) or "")
