"""Leaving work out of a live model's image: its unconditional half from some scale on, or its last scales.

Dropped rows: the blocks run the conditional rows alone, from the first block of scale `from_scale` on. The guidance of those
scales is then 1: for Infinity exactly, bit for bit, what the untouched model draws with 1 there in its `cfg_list`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.live_attention import DROPPED, close_caches
from sparvar_tune.adapters.protocol import Parts

GENERATE = "autoregressive_infer_cfg"


def check_from(found: Parts, from_scale: int, first: int) -> None:
    last = None if found.schedule is None else len(found.schedule) - 1
    if from_scale < first or (last is not None and from_scale > last):
        raise ValueError(f"from_scale={from_scale}: want {first}{' or more' if last is None else f'..{last}'}")


class Drop(Undos):
    """The unconditional half is dropped from `from_scale` on. `half`: rows of the image being drawn, 0 without guidance."""

    def __init__(self, found: Parts, from_scale: int) -> None:
        super().__init__()
        check_from(found, from_scale, 0)
        if found.model in DROPPED:
            raise ValueError("the unconditional half is dropped already; undo that first")
        self.parts, self.from_scale, self.half = found, from_scale, 0
        DROPPED[found.model] = from_scale

    def undo(self) -> None:
        if self.changes:
            DROPPED.pop(self.parts.model, None)
        super().undo()

    def cut_caches(self, attention: Any) -> None:
        """Once a layer: later scales find the rows cut."""
        if attention.cached_k is not None and attention.cached_k.shape[0] == 2 * self.half:
            attention.cached_k, attention.cached_v = attention.cached_k[: self.half], attention.cached_v[: self.half]


def bound(found: Parts, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of the generating method by name."""
    return inspect.signature(getattr(type(found.model), GENERATE)).bind(found.model, *args, **kwargs).arguments


class Enough(Exception):
    """The scales that are wanted are drawn: how a loop is left that has no other end."""


def stop_before(found: Parts, from_scale: int, passes: int) -> Undos:
    """Scales from `from_scale` on left out, for a model whose method has no keyword for it.

    The loop is left when the quantiser has summed up the scales before; the picture is decoded from that. passes: how many
    times it sums before that one; what runs the blocks, and how, is of no matter.
    """
    check_from(found, from_scale, 1)
    undos = Undos()
    summed: list[Tensor] = []

    def next_input(inner: Any, *args: Any, **kwargs: Any) -> Any:
        f_hat, following = inner(*args, **kwargs)
        summed[:] = [f_hat]
        if int(kwargs["si"] if "si" in kwargs else args[0]) >= passes:
            raise Enough
        return f_hat, following

    def generate(inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return inner(*args, **kwargs)
        except Enough:
            close_caches(found)
            with torch.no_grad():
                return found.model.vae_proxy[0].fhat_to_img(summed.pop()).add_(1).mul_(0.5)
        finally:
            summed.clear()

    undos.add(replace_method(found.model.vae_quant_proxy[0], "get_next_autoregressive_input", next_input))
    undos.add(replace_method(found.model, GENERATE, generate))
    return undos


def run_half(found: Parts, from_scale: int, scale_of: Any, cut: Any) -> Drop:
    """The unconditional half dropped, for a model that always mixes the halves of its logits (HART, VAR).

    The rows are doubled again after the last block and the head sees the conditional rows only, so that both halves of the
    logits are equal and their mixture is the conditional one, but for the rounding of (1 + t) l - t l.
    cut(given, half): a block's keywords with the conditional rows alone.
    """
    drop, halved = Drop(found, from_scale), False  # halved: the rows that logits are asked for are one half, twice

    def generate(inner: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal halved
        drop.half, halved = int(bound(found, args, kwargs)["B"]), False
        try:
            return inner(*args, **kwargs)
        finally:
            drop.half, halved = 0, False

    def block(i: int) -> Any:
        def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal halved
            attention = found.attentions[i]
            halved = bool(drop.half) and attention.caching and scale_of(attention, kwargs) >= from_scale
            if not halved:
                return inner(*args, **kwargs)
            drop.cut_caches(attention)
            x = inner(*args, **cut(kwargs, drop.half))
            return torch.cat((x, x)) if i == found.layers - 1 else x

        return forward

    def get_logits(inner: Any, x: Any, cond_BD: Tensor) -> Tensor:
        if not halved:
            return inner(x, cond_BD)
        logits = inner(x[: drop.half], cond_BD[: drop.half])
        return torch.cat((logits, logits))

    for i, module in enumerate(found.blocks):
        drop.add(replace_method(module, "forward", block(i)))
    drop.add(replace_method(found.model, "get_logits", get_logits))
    drop.add(replace_method(found.model, GENERATE, generate))
    return drop
