"""HART's denoiser on the fused path: a look-alike of its diffusion, step by step and row by row, is the oracle."""

from __future__ import annotations

import enum
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sparvar_tune.fused import denoiser
from sparvar_tune.fused.denoiser import put_on_denoiser
from sparvar_tune.fused.module_graph import ModuleGraph

Mean, Variance = enum.Enum("Mean", "EPSILON START_X"), enum.Enum("Variance", "LEARNED LEARNED_RANGE")


class Diffusion:
    """Improved DDPM on a cosine schedule, with what the public class is called by."""

    def __init__(self, steps=4):
        self.timestep_map = [i * (999 // (steps - 1)) for i in range(steps)]
        kept = np.cos((np.array(self.timestep_map) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        before = np.append(1.0, kept[:-1])
        self.betas = np.clip(1 - kept / before, 1e-5, 0.999)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / kept), np.sqrt(1 / kept - 1)
        variance = np.append(1e-6, (self.betas * (1 - before) / (1 - kept))[1:])
        self.posterior_log_variance_clipped = np.log(variance)
        self.posterior_mean_coef1 = self.betas * np.sqrt(before) / (1 - kept)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - self.betas) / (1 - kept)
        self.model_mean_type, self.model_var_type, self.calls = Mean.EPSILON, Variance.LEARNED_RANGE, 0

    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, temperature=1.0):
        self.calls += 1
        x = noise
        for i in reversed(range(len(self.timestep_map))):
            t = torch.tensor([i] * shape[0], device=x.device)

            def at(array, t=t, like=x):  # the same number in every place, as the public code has it
                return torch.from_numpy(array).to(t.device)[t].float()[:, None] + torch.zeros(shape, device=like.device)

            out = model(x, torch.tensor(self.timestep_map, device=x.device)[t], **(model_kwargs or {}))
            predicted, between = torch.split(out, shape[1], dim=1)
            share = (between + 1) / 2
            log_variance = share * at(np.log(self.betas)) + (1 - share) * at(self.posterior_log_variance_clipped)
            start = at(self.sqrt_recip_alphas_cumprod) * x - at(self.sqrt_recipm1_alphas_cumprod) * predicted
            start = (denoised_fn(start) if denoised_fn else start).clamp(-1, 1)
            mean = at(self.posterior_mean_coef1) * start + at(self.posterior_mean_coef2) * x
            drawn = torch.randn_like(x)
            x = mean + (t != 0).float()[:, None] * torch.exp(0.5 * log_variance) * drawn * temperature
        return x


class Embedding(nn.Module):
    """As the denoiser's: frequencies made on the host at each call."""

    frequency_embedding_size = 16

    def __init__(self, longest=10_000):
        super().__init__()
        self.longest, self.mlp = longest, nn.Linear(16, 16)

    def timestep_embedding(self, t, dim):
        half = dim // 2
        waves = torch.exp(-math.log(self.longest) * torch.arange(0, half, dtype=torch.float32, device="cpu") / half).to(t.device)
        angles = t[:, None].float() * waves[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def forward(self, t):
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size))


class Denoiser(nn.Module):
    def __init__(self, longest=10_000):
        super().__init__()
        self.input_proj, self.time_embed, self.cond_embed = nn.Linear(4, 16), Embedding(longest), nn.Linear(8, 16)
        self.res_blocks, self.final_layer = nn.ModuleList([nn.Linear(16, 16)]), nn.Linear(16, 8)

    def forward(self, x, t, c):
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = x + block(x * (1 + y))
        return self.final_layer(x)


def sampled(diffusion, net, device="cpu", **options):
    generator = torch.Generator().manual_seed(5)
    x, c = (torch.randn(6, n, generator=generator).to(device) for n in (4, 8))
    torch.manual_seed(1)
    out = diffusion.p_sample_loop(net.forward, x.shape, x, model_kwargs={"c": c}, **options)
    return out, torch.get_rng_state()


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
