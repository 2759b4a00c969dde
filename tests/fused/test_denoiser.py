"""HART's denoiser on the fused path: a look-alike of its diffusion, step by step and row by row, is the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from denoiser_lookalikes import Denoiser, Diffusion, Embedding, Mean, Variance, sampled

from sparvar_tune.fused import denoiser
from sparvar_tune.fused.denoiser import put_on_denoiser
from sparvar_tune.fused.module_graph import ModuleGraph


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_steps_are_the_public_ones_bit_for_bit(dtype):
    """With the same random numbers, also in half precision; another loop than the known is the model's own."""
    diffusion, net, drawing = Diffusion(), Denoiser(), [True]
    model = SimpleNamespace(diffloss=SimpleNamespace(net=net, gen_diffusion=diffusion))
    given = [{}, {"temperature": 0.7}, {"clip_denoised": True}, {"denoised_fn": lambda x: x * 0.5}]
    before = dict(vars(diffusion))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        want = [sampled(diffusion, net, **options) for options in given]
        with put_on_denoiser(model, lambda: drawing[0], False):
            diffusion.calls = 0
            got = [sampled(diffusion, net, **options) for options in given]
            assert diffusion.calls == 1  # of them all but the one with a function of its own
            drawing[0] = False
            got.append(sampled(diffusion, net))
            assert diffusion.calls == 2
    for (a, state), (b, own) in zip(got, [*want, want[0]], strict=True):
        assert torch.equal(a, b) and torch.equal(state, own)
    assert dict(vars(diffusion)) == before | {"calls": 2}


def test_a_diffusion_of_another_kind_is_left_alone():
    for name, value in (("model_mean_type", Mean.START_X), ("model_var_type", Variance.LEARNED), ("betas", None)):
        diffusion = Diffusion()
        setattr(diffusion, name, value) if value is not None else delattr(diffusion, name)
        before = dict(vars(diffusion))
        with put_on_denoiser(SimpleNamespace(diffloss=SimpleNamespace(gen_diffusion=diffusion)), lambda: True, False):
            assert dict(vars(diffusion)) == before


def steps(net, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    for t in (900, 500, 7, 0):
        x, c = torch.randn(6, 4, generator=generator), torch.randn(6, 8, generator=generator)
        yield net.forward(x.to(device), torch.full((6,), t, device=device), c.to(device))


@torch.no_grad()
@pytest.mark.parametrize("longest", [10_000, 5_000])
def test_the_denoiser_keeps_its_frequencies_and_only_while_drawing(longest, monkeypatch):
    """Waves of another length than the known are the module's own."""
    net, drawing, calls = Denoiser(longest), [True], []
    want = list(steps(net))
    model = SimpleNamespace(diffloss=SimpleNamespace(net=net))
    own = Embedding.timestep_embedding
    monkeypatch.setattr(Embedding, "timestep_embedding", lambda *args: calls.append(1) or own(*args))
    before = [dict(vars(m)) for m in net.modules()]
    with put_on_denoiser(model, lambda: drawing[0], True):
        assert all(torch.equal(a, b) for a, b in zip(steps(net), want, strict=True))
        assert len(calls) == (1 if longest == 10_000 else 5)
        drawing[0], calls[:] = False, []
        assert all(torch.equal(a, b) for a, b in zip(steps(net), want, strict=True)) and len(calls) == 4
    assert [dict(vars(m)) for m in net.modules()] == before
    with put_on_denoiser(model, lambda: True, False):
        assert [dict(vars(m)) for m in net.modules()] == before


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_steps_of_the_denoiser_are_replayed_bit_for_bit(monkeypatch):
    net, made = Denoiser().cuda(), []
    with torch.autocast("cuda", torch.float16):
        want = list(steps(net, "cuda"))
        monkeypatch.setattr(denoiser, "ModuleGraph", lambda module: made.append(ModuleGraph(module)) or made[-1])
        with put_on_denoiser(SimpleNamespace(diffloss=SimpleNamespace(net=net)), lambda: True, True):
            got = [list(steps(net, "cuda")) for _ in range(2)]
    diffusion = Diffusion()
    model = SimpleNamespace(diffloss=SimpleNamespace(net=net, gen_diffusion=diffusion))
    loop = sampled(diffusion, net, "cuda")[0]
    with put_on_denoiser(model, lambda: True, True):
        assert all(torch.equal(sampled(diffusion, net, "cuda")[0], loop) for _ in range(2))
    assert diffusion.calls == 1
    assert all(torch.equal(a, b) for drawn in got for a, b in zip(drawn, want, strict=True))
    assert made[0].why_not is None
