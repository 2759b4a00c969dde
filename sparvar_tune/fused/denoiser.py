"""HART's denoiser of the last grid's residual tokens: its small MLP as one CUDA graph a step.

A step's 190 launches take the host twice as long as the GPU, and every step makes its embedding's frequencies on the host anew
and waits until the GPU has them. They are kept on the device here: the same numbers, looked at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.fused.module_graph import ModuleGraph
from sparvar_tune.fused.product import why_not_owned

PARTS = ("input_proj", "time_embed", "cond_embed", "res_blocks", "final_layer")
EMBEDDING = ("timestep_embedding", "frequency_embedding_size", "mlp")
LONGEST = 10_000  # the embedding's longest period


def put_on_denoiser(model: Any, drawing: Callable[[], bool], graphs: bool) -> Undos:
    """`model.diffloss.net` as a graph where there is one and it is known; `undo()` takes it out."""
    undos, net = Undos(), getattr(getattr(model, "diffloss", None), "net", None)
    if not graphs or not isinstance(net, nn.Module) or not all(hasattr(net, name) for name in PARTS) or why_not_owned(net):
        return undos
    embed: Any = net.time_embed
    if not all(hasattr(embed, name) for name in EMBEDDING) or why_not_owned(embed):
        return undos
    waves, graph = Waves(embed), ModuleGraph(net)

    def time_embed(inner: Any, t: Tensor) -> Tensor:
        found = waves(t) if drawing() else None
        return cast(Tensor, inner(t) if found is None else embed.mlp(found))

    def forward(inner: Any, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return graph(inner, x, t, c) if drawing() and x.is_cuda else cast(Tensor, inner(x, t, c))

    undos.add(replace_method(embed, "forward", time_embed))
    undos.add(replace_method(net, "forward", forward))
    return undos


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
