"""FlashAttention-3 as a dense pass: when it is taken, and that its output and log-sum-exp come back in our layout."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sparvar_kernels.backends import dense

INSTALLED = importlib.util.find_spec("fa3_fwd") is not None


def exact(q, k, v, scale):
    """Dense attention and log-sum-exp in fp64."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return torch.softmax(scores, -1) @ v.double(), torch.logsumexp(scores, -1)


def inputs(device="cpu", dim=64, layout="bhnd"):
    g = torch.Generator().manual_seed(3)
    made = []
    for n in (70, 130, 130):
        t = torch.randn(2, 3, n, dim, generator=g).to(device, torch.bfloat16)
        made.append(t.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bnhd" else t)
    return made


@pytest.mark.skipif(INSTALLED, reason="the operators are the package's own")
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_output_and_sums_come_back_as_queries_are_laid_out(layout):
    """A stand-in with the package's operator: rows before heads, output in what it is given, log-sum-exp [B, H, N]."""
    library = torch.library.Library("fa3_fwd", "DEF")
    try:
        library.define("fwd(Tensor q, Tensor k, Tensor v, *, Tensor(a!) out, float softmax_scale, int num_splits)"
                       " -> (Tensor(a!), Tensor, Tensor, Tensor)")  # fmt: skip

        def fwd(q, k, v, out, softmax_scale, num_splits):
            assert num_splits == 1
            got, lse = exact(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale)
            out.copy_(got.transpose(1, 2))
            return out, lse.float(), lse.new_empty(0), lse.new_empty(0)

        library.impl("fwd", fwd, "CPU")
        q, k, v = inputs(layout=layout)
        out, lse = dense._flash3(q, k, v, 0.3)
    finally:
        library._destroy()
    want, sums = exact(q, k, v, 0.3)
    assert out.stride() == q.stride() and out.dtype == q.dtype
    assert (out.double() - want).norm() < 0.004 * want.norm()
    assert torch.allclose(lse.double(), sums, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t, "want a Hopper GPU"),
        (lambda t: t.half(), "want torch.bfloat16"),
        (lambda t: t[..., :60], "head_dim 60"),
        (lambda t: torch.cat([t, t], -1)[..., ::2], "want 16-byte steps"),
        (lambda t: torch.cat([t, t[..., :1]], -1)[..., :64], "want 16-byte steps"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(change, reason):
    assert reason in (dense.why_not_flash3(*map(change, inputs())) or "")


@pytest.mark.parametrize(("capability", "package", "reason"), [((10, 0), True, "10.0"), ((9, 0), False, "not installed")])
def test_another_gpu_or_no_package_is_refused_with_a_reason(monkeypatch, capability, package, reason):
    dense._why_no_flash3.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if package else None)
    try:
        assert reason in (dense._why_no_flash3(0) or "")
    finally:
        dense._why_no_flash3.cache_clear()


def test_a_build_that_does_not_load_is_refused_with_a_reason(monkeypatch):
    dense._why_no_flash3.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    try:
        assert "does not load: undefined symbol" in (dense._why_no_flash3(0) or "")
    finally:
        dense._why_no_flash3.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_agrees_with_fp64(dim, layout):
    q, k, v = inputs("cuda", dim, layout)
    if reason := dense.why_not_flash3(q, k, v):
        pytest.skip(reason)
    out, lse = dense.dense_with_lse(q, k, v, dim**-0.5)
    want, sums = exact(q, k, v, dim**-0.5)
    assert (out.double() - want).norm() < 0.004 * want.norm()
    assert torch.allclose(lse.double(), sums, atol=1e-3)
