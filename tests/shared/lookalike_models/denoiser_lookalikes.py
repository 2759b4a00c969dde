"""HART's denoiser as the public code has it: its diffusion step by step and row by row, and a network with its names."""

from __future__ import annotations

import enum
import math

import numpy as np
import torch
from torch import nn

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
