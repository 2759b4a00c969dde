"""The softmax over a row's text against an fp64 oracle that takes one row, token and head at a time."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec

import pytest
import torch
from interpreted import in_interpreter
from torch import Tensor

from sparvar_kernels.path import text_softmax

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
JOBS = (
    {}, {"length": 1, "heads": 1}, {"room": 32, "lengths": (32, 1), "heads": 5}, {"room": 96, "lengths": (70, 96, 33)},
    {"room": 7, "lengths": (0, 7)}, {"biased": False}, {"dtype": "bfloat16", "room": 64, "length": 70}, {"dtype": "float16"},
    {"large": 300.0},
)  # fmt: skip


def wanted(scores: Tensor, lengths: tuple[int, ...], scale: float, bias: Tensor) -> Tensor:
    out = torch.zeros(scores.shape, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for token in range(scores.shape[1]):
            for head in range(scores.shape[2]):
                logits = [math.fsum((float(scores[b, token, head, t]), float(bias[b, head, t]))) * scale for t in range(n)]
                total = math.fsum(math.exp(x - max(logits)) for x in logits)
                out[b, token, head, :n] = torch.tensor([math.exp(x - max(logits)) / total for x in logits], dtype=torch.float64)
    return out


def check(dtype="float32", length=9, heads=3, room=16, lengths=(5, 16), biased=True, large=1.0, device="cpu") -> float:
    """large: factor on the scores. Returns the largest error over its bound."""
    g = torch.Generator().manual_seed(length + room)
    scores = torch.randn(len(lengths), length, heads, room, generator=g) * large
    bias = torch.randn(len(lengths), heads, room, generator=g) * biased
    want = wanted(scores, lengths, 0.7, bias)
    for b, n in enumerate(lengths):
        scores[b, :, :, n:] = math.nan  # what no row may see
        bias[b, :, n:] = math.nan
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    given = bias.to(device) if biased else None
    got = text_softmax(scores.to(device), starts, 0.7, given, getattr(torch, dtype))
    assert got.dtype == getattr(torch, dtype) and bool(got.isfinite().all())
    assert all(bool((got[b, :, :, n:] == 0).all()) for b, n in enumerate(lengths))
    return float((got.cpu().double() - want).abs().max()) / BOUND[got.dtype] / max(large, 1.0)


def worst() -> float:
    return max(check(**job) for job in JOBS)


def test_on_a_cpu():
    assert worst() < 1


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter():
    assert in_interpreter("test_text_softmax", "t.worst()") < 1


@pytest.mark.gpu
def test_on_a_gpu_and_in_a_graph():
    """A replay serves a prompt of another length."""
    assert max(check(**job, device="cuda") for job in JOBS) < 1
    scores, starts = torch.randn(2, 70, 4, 64, device="cuda"), torch.tensor([0, 30, 60], dtype=torch.int32, device="cuda")
    text_softmax(scores, starts, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = text_softmax(scores, starts, 0.125)
    starts.copy_(torch.tensor([0, 5, 69]))
    graph.replay()
    assert torch.equal(out, text_softmax(scores, starts, 0.125))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"scores": torch.zeros(2, 3, 16)}, r"want \[B, L, H, T\]"), ({"scores": torch.zeros(2, 3, 2, 2000)}, "up to 1024"),
    ({"scores": torch.zeros(2, 3, 2, 16).half()}, "scores: got torch.float16"),
    ({"scores": torch.zeros(2, 2, 3, 16).transpose(1, 2)}, "want it contiguous"),
    ({"starts": torch.zeros(3, dtype=torch.long)}, "starts: got torch.int64"),
    ({"starts": torch.zeros(2, dtype=torch.int32)}, "starts"), ({"bias": torch.zeros(2, 16)}, "bias: got"),
    ({"bias": torch.zeros(2, 1, 16).expand(2, 2, 16)}, "bias: got strides"),
    ({"out_dtype": torch.int32}, "out_dtype: got torch.int32"), ({"starts": torch.zeros(3, device="meta")}, "starts"),
    ({"scores": torch.zeros(2, 3, 2, 16, requires_grad=True)}, "no backward"),
])  # fmt: skip
def test_refuses_in_one_line(changes, reason):
    made = {"scores": torch.zeros(2, 3, 2, 16), "starts": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=reason) as caught:
        text_softmax(**{**made, **changes}, softmax_scale=1.0)
    assert "\n" not in str(caught.value)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_real_size_compiles_without_a_spill_and_reads_wide(capability):
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code, resources
    from sparvar_kernels.path.triton.text_softmax import text_softmax_build

    made = compile_for(text_softmax_build(torch.bfloat16, 28, 64), capability)
    assert resources(made).spill_bytes == 0 and re.search(r"LDG\.E\.\S*128", machine_code(made))
