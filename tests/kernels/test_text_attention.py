"""Attention to the text against an fp64 oracle that takes a token, a head and its row's text at a time."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from interpreted import in_interpreter
from torch import Tensor

from sparvar_kernels.path import text_attention

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
JOBS = (
    {}, {"length": 1}, {"length": 150, "dim": 128, "heads": 1}, {"dim": 96, "heads": 2}, {"dim": 20}, {"lengths": (0, 3, 70)},
    {"lengths": (130,)}, {"lengths": (1, 1, 1, 64), "heads": 1}, {"gap": 3}, {"in_place": True, "length": 40},
    {"dtype": "bfloat16", "dim": 128}, {"dtype": "float16", "length": 33, "in_place": True}, {"dtype": "bfloat16", "gap": 5},
)  # fmt: skip


def wanted(q: Tensor, kv: Tensor, ends: list[int], scale: float) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        keys, values = kv[ends[b] : ends[b + 1], 0].double(), kv[ends[b] : ends[b + 1], 1].double()
        for head in range(q.shape[2]):
            if len(keys):
                weights = torch.softmax(q[b, :, head].double() @ keys[:, head].T * scale, -1)
                out[b, :, head] = weights @ values[:, head]
    return out


def check(dtype="float32", length=9, heads=3, dim=64, lengths=(5, 67), gap=0, in_place=False, device="cpu") -> float:
    """gap: rows of kv behind the last text and numbers between tokens of q; returns the largest error over its bound."""
    kind, g = getattr(torch, dtype), torch.Generator().manual_seed(length + dim)
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    wide = torch.randn(len(lengths), length, heads * dim + gap, generator=g).to(kind).to(device)
    q = wide[..., : heads * dim].unflatten(-1, (heads, dim))
    kv = torch.randn(ends[-1] + gap, 2, heads, dim, generator=g).to(kind).to(device)
    kv[ends[-1] :] = 1e4  # what no row may see
    want = wanted(q.cpu(), kv.cpu(), ends, 0.3)
    memory = q if in_place else torch.full((len(lengths), length, heads, dim), math.nan, dtype=kind, device=device)
    got = text_attention(q, kv, torch.tensor(ends, dtype=torch.int32, device=device), 0.3, out=memory)
    assert got.data_ptr() == memory.data_ptr() and got.dtype == kind and bool(got.isfinite().all())
    error = (got.cpu().double() - want).abs().max() / max(float(want.abs().max()), 1e-9)
    return float(error) / BOUND[kind]


def worst(bf16: bool = True) -> float:
    return max(check(**job) for job in JOBS if bf16 or job.get("dtype") != "bfloat16")


def test_on_a_cpu():
    assert worst() < 1


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter():
    """But for bf16: its products are not what a GPU's are."""
    assert in_interpreter("test_text_attention", "t.worst(False)") < 1


@pytest.mark.gpu
def test_on_a_gpu_and_in_a_graph():
    """Full size too; a replay serves a prompt of another length."""
    assert max(check(**job, device="cuda") for job in JOBS) < 1
    assert check("bfloat16", 301, 4, 128, (64, 3, 200), device="cuda") < 1
    q = torch.randn(2, 70, 4, 64, device="cuda").bfloat16()
    kv = torch.randn(300, 2, 4, 64, device="cuda").bfloat16()
    starts = torch.tensor([0, 30, 60], dtype=torch.int32, device="cuda")
    text_attention(q, kv, starts, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = text_attention(q, kv, starts, 0.125)
    starts.copy_(torch.tensor([0, 5, 260]))
    graph.replay()
    assert torch.equal(out, text_attention(q, kv, starts, 0.125))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"q": torch.zeros(2, 3, 16)}, r"want \[B, L, H, D\]"), ({"q": torch.zeros(2, 3, 2, 256)}, "D of 1..128"),
    ({"kv": torch.zeros(9, 2, 3, 16)}, "kv: got"), ({"kv": torch.zeros(9, 2, 2, 16).half()}, "kv: got torch.float16"),
    ({"starts": torch.zeros(3, dtype=torch.long)}, "starts: got torch.int64"),
    ({"starts": torch.zeros(2, dtype=torch.int32)}, "starts"),
    ({"out": torch.zeros(2, 3, 2, 8)}, "out"), ({"out": torch.zeros(1, 1, 1, 16).expand(2, 3, 2, 16)}, "memory of its own"),
    ({"kv": torch.zeros(9, 2, 2, 16, device="meta")}, "kv"), ({"q": torch.zeros(2, 3, 2, 16, requires_grad=True)}, "no backward"),
])  # fmt: skip
def test_refuses_in_one_line(changes, reason):
    made = {"q": torch.zeros(2, 3, 2, 16), "kv": torch.zeros(9, 2, 2, 16), "starts": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=reason) as caught:
        text_attention(**{**made, **changes}, softmax_scale=1.0)
    assert "\n" not in str(caught.value)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_real_size_compiles_without_a_spill(capability):
    from sparvar_kernels.backends.triton.binary import compile_for, resources
    from sparvar_kernels.path.triton.text_attention import text_attention_build

    assert resources(compile_for(text_attention_build(torch.bfloat16, 128, 4096), capability)).spill_bytes == 0
