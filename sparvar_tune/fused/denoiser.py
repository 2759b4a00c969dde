"""HART's denoiser of the last grid's residual tokens, without waiting for the host.

Its steps are an improved DDPM (Nichol & Dhariwal, arXiv 2102.09672, equations 13 to 15). The public code makes every step its
timesteps and coefficients of NumPy arrays on the host and waits until the GPU has them, ten times a step. Here they are on the
device, and the network's launches are one CUDA graph. Operations around the network, their order and the random numbers are the
same; the network itself is `DenoiserNetwork` where it is known whole, else the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparvar_tune.adapters.instance_forward import Undos, replace_method, why_not_replace
from sparvar_tune.fused.denoiser_network import DenoiserNetwork
from sparvar_tune.fused.module_graph import ModuleGraph
from sparvar_tune.fused.product import why_not_owned

NETWORK = ("input_proj", "time_embed", "cond_embed", "res_blocks", "final_layer")
EMBEDDING = ("timestep_embedding", "frequency_embedding_size", "mlp")
ARRAYS = (
    "betas", "posterior_log_variance_clipped", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1",
    "posterior_mean_coef2",
)  # fmt: skip
LONGEST = 10_000  # the embedding's longest period


def put_on_denoiser(model: Any, drawing: Callable[[], bool], graphs: bool) -> Undos:
    """Puts both into `model.diffloss` where it has one that is known; `undo()` takes them out.

    drawing(): whether the image being drawn is on this path; where not, the model's own code runs.
    """
    undos, loss = Undos(), getattr(model, "diffloss", None)
    network: DenoiserNetwork | None = None
    steps: Steps | None = None
    diffusion, net = getattr(loss, "gen_diffusion", None), getattr(loss, "net", None)
    if diffusion is not None and _why_not_diffusion(diffusion) is None:
        steps = known = Steps(diffusion)

        def loop(inner: Any, *args: Any, **kwargs: Any) -> Tensor:
            given = dict(zip(("model", "shape", "noise"), args, strict=False)) | kwargs
            if not drawing() or known.why_not(given):
                return cast(Tensor, inner(*args, **kwargs))
            try:
                return known(given)
            finally:
                known.t = None
                if network is not None:
                    network.forget()

        undos.add(replace_method(diffusion, "p_sample_loop", loop))
    if not graphs or not isinstance(net, nn.Module) or _why_not_network(net):
        return undos
    embed: Any = net.time_embed
    waves, graph, own_graph = Waves(embed), ModuleGraph(net), ModuleGraph(net)
    network = own = DenoiserNetwork(net)

    def time_embed(inner: Any, t: Tensor) -> Tensor:
        found = waves(t) if drawing() else None
        return cast(Tensor, inner(t) if found is None else embed.mlp(found))

    def forward(inner: Any, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        if not drawing():
            return cast(Tensor, inner(x, t, c))
        if steps is not None and t is steps.t and own.why_not(inner, x, t, c) is None:  # of all rows one time
            given = x, t[:1], own.condition(c)
            return own_graph(own, *given) if x.is_cuda else own(*given)
        return graph(inner, x, t, c) if x.is_cuda else cast(Tensor, inner(x, t, c))

    undos.add(replace_method(embed, "forward", time_embed))
    undos.add(replace_method(net, "forward", forward))
    return undos


class Steps:
    """All steps of a diffusion that predicts noise and a learned range of variances, from noise [N, C] to a sample [N, C].

    t: the times [N] that the network is given, one and the same in all places; None between pictures.
    """

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion
        self.t: Tensor | None = None
        self._tables: dict[torch.device, Tensor] = {}

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        """Why the loop with these arguments is another one than ours, or None."""
        known = {"model", "shape", "noise", "clip_denoised", "model_kwargs", "progress", "temperature"}
        other = [name for name, value in given.items() if name not in known and value is not None]
        if other or given.get("progress") or not given.get("clip_denoised", True):
            return f"it is asked for {', '.join(other) or 'progress or values that are not clipped'}"
        noise = given.get("noise")
        return None if isinstance(noise, Tensor) and noise.ndim == 2 else "no noise [N, C] is given"

    @torch.no_grad()
    def __call__(self, given: Mapping[str, Any]) -> Tensor:
        x, model, options = given["noise"], given["model"], given.get("model_kwargs") or {}
        rows = self._table(x.device).unbind(0)
        for i in range(len(rows) - 1, -1, -1):
            most, least, of_x, of_noise, of_start, of_last = rows[i].unbind(0)
            t = self.t = torch.full((x.shape[0],), self.diffusion.timestep_map[i], dtype=torch.int64, device=x.device)
            predicted, between = torch.split(model(x, t, **options), x.shape[1], dim=1)
            share = (between + 1) / 2
            log_variance = share * most + (1 - share) * least
            start = (of_x * x - of_noise * predicted).clamp(-1, 1)
            noise = torch.randn_like(x)
            x = of_start * start + of_last * x
            if i:  # the last step adds none
                x = x + torch.exp(0.5 * log_variance) * noise * given.get("temperature", 1.0)
        return cast(Tensor, x)

    def _table(self, device: torch.device) -> Tensor:
        """[steps, 6, 1, 1] fp32: per step the logarithm of beta, then the other arrays."""
        if device not in self._tables:
            found = [np.asarray(getattr(self.diffusion, name), dtype=np.float64) for name in ARRAYS]
            with torch.inference_mode(False):
                table = torch.from_numpy(np.stack([np.log(found[0]), *found[1:]], 1)).float()
                self._tables[device] = table[..., None, None].to(device)
        return self._tables[device]


class Waves:
    """The embedding of timesteps [B] by waves of falling frequency [B, size], fp32; None where the module's own are others."""

    def __init__(self, embed: Any) -> None:
        self.embed, self.size = embed, int(embed.frequency_embedding_size)
        self._known: dict[torch.device, Tensor | None] = {}

    def __call__(self, t: Tensor) -> Tensor | None:
        if t.device not in self._known:
            self._known[t.device] = self._looked_at(t)
        frequencies = self._known[t.device]
        return None if frequencies is None else _waves(t, frequencies)

    def _looked_at(self, t: Tensor) -> Tensor | None:
        half = self.size // 2
        frequencies = torch.exp(-math.log(LONGEST) * torch.arange(half, dtype=torch.float32, device="cpu") / half)
        with torch.inference_mode(False):
            frequencies = frequencies.to(t.device)
        own = self.embed.timestep_embedding(t, self.size)
        return frequencies if torch.equal(own, _waves(t, frequencies)) else None


def _waves(t: Tensor, frequencies: Tensor) -> Tensor:
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


def _why_not_diffusion(diffusion: Any) -> str | None:
    missing = [name for name in (*ARRAYS, "timestep_map", "p_sample_loop") if not hasattr(diffusion, name)]
    if missing:
        return f"it has no {missing[0]}"
    kinds = [getattr(getattr(diffusion, name, None), "name", None) for name in ("model_mean_type", "model_var_type")]
    if kinds != ["EPSILON", "LEARNED_RANGE"]:
        return f"it predicts {kinds}, want noise and a learned range of variances"
    return why_not_replace(diffusion, "p_sample_loop")


def _why_not_network(net: Any) -> str | None:
    missing = [name for name in NETWORK if not hasattr(net, name)]
    missing += [] if missing else [name for name in EMBEDDING if not hasattr(net.time_embed, name)]
    return f"it has no {missing[0]}" if missing else why_not_owned(net) or why_not_owned(net.time_embed)
