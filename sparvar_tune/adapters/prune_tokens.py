"""Blocks of a live Infinity that work on chosen tokens; `generation/prune_tokens.py` says which and what becomes of the others.

A block's own modules are called, on fewer rows; only the sums around them are here. Its attention finds the places of the chosen
tokens in a RoPE table that holds them in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.generation import PruneTokens

NEEDED = ("fused_norm_func", "shared_aln", "norm_eps", "ca_norm", "ca_gamma", "ffn")
Work = Callable[[Tensor, Tensor | None], Tensor]  # (rows, their places; None: all of them) -> what the part gives, gated


def prune_tokens(
    found: Parts, step: PruneTokens, given: Callable[..., dict[str, Any]], is_other: Callable[[Parts, dict[str, Any]], bool]
) -> Undos:
    """given: a block's arguments by name. is_other: whether an image has another schedule than the parts'; it is left alone.

    Raises ValueError for blocks that are not put together as they have to be.
    """
    layers = range(step.first_layer, step.last_layer + 1)
    for i in layers:
        block = found.blocks[i]
        missing = [name for name in NEEDED if not hasattr(block, name)]
        if missing or block.fused_norm_func is None:
            raise ValueError(f"prune_tokens: block {i} has no {missing[0] if missing else 'fused_norm_func'}")
    undos = Undos()
    for i in layers:
        undos.add(replace_method(found.blocks[i], "forward", _Pruned(found, step, i, given, is_other)))
    return undos


class _Pruned:
    """One block's forward. scale: of the last call, None where the image has another schedule; cached: part -> its output."""

    def __init__(self, found: Parts, step: PruneTokens, layer: int, given: Any, is_other: Any) -> None:
        self.found, self.step, self.given, self.is_other = found, step, given, is_other
        self.block, self.attention = found.blocks[layer], found.attentions[layer]
        self.scale: int | None = None
        self.cached: dict[str, Tensor] = {}

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.attention.caching:
            return inner(*args, **kwargs)
        call = self.given(*args, **kwargs)
        if self.attention.cached_k is None:
            self.cached.clear()
            self.scale = None if self.is_other(self.found, call) else 0
        elif self.scale is not None:
            self.scale += 1
        if self.scale is None or (self.scale != self.step.cached_scale and self.step.at(self.scale) is None):
            return inner(*args, **kwargs)
        return self.run(self.scale, **call)

    def run(
        self, s: int, x: Tensor, cond_BD: Tensor, ca_kv: Any, attn_bias_or_two_vector: Any = None, attn_fn: Any = None,
        scale_schedule: Any = None, rope2d_freqs_grid: Any = None, scale_ind: int = 0,
    ) -> Tensor:  # fmt: skip
        """The block at scale `s`, a part after the other."""
        b = self.block
        with torch.autocast(x.device.type, enabled=False):
            six = b.ada_gss + cond_BD if b.shared_aln else b.ada_lin(cond_BD).view(-1, 1, 6, x.shape[-1])
        gate, gate_mlp, scale, scale_mlp, shift, shift_mlp = six.unbind(2)

        def norm(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            out: Tensor = b.fused_norm_func(C=x.shape[-1], eps=b.norm_eps, x=rows, scale=scale, shift=shift)
            return out

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            table = rope2d_freqs_grid if places is None else self.placed(rope2d_freqs_grid, scale_schedule, s, places)
            given = (attn_bias_or_two_vector, attn_fn, scale_schedule, table)
            out: Tensor = self.attention(norm(rows, scale, shift), *given, scale_ind=scale_ind).mul_(gate)
            return out

        x = x + self.part("attention", s, x, attend)
        x = x + self.part("text", s, x, lambda rows, _: b.ca(b.ca_norm(rows), ca_kv).float().mul_(b.ca_gamma))
        return x + self.part("mlp", s, x, lambda rows, _: b.ffn(norm(rows, scale_mlp, shift_mlp)).mul(gate_mlp))

    def part(self, name: str, s: int, x: Tensor, work: Work) -> Tensor:
        """What a part adds to every token of x [B, N, C]."""
        keep, schedule = self.step.at(s), self.found.schedule
        assert schedule is not None, "the policy's"
        if keep is None:
            out = work(x, None)
        else:
            places = farthest(x, keep)
            out = work(rows_at(x, places), places)
            before = self.cached[name][: x.shape[0]]  # the conditional rows come first, where the others are dropped since
            if s == self.step.last_scale:
                del self.cached[name]  # with 2B at 1024x1024 it is 28 MB a layer
            whole = enlarge(before, schedule.grids[self.step.cached_scale], schedule.grids[s])
            out = whole.scatter(1, places[..., None].expand(-1, -1, x.shape[-1]), out.to(whole.dtype))
        if s == self.step.cached_scale:
            self.cached[name] = out
        return out

    def placed(self, tables: Any, scale_schedule: Any, s: int, places: Tensor) -> Any:
        """The RoPE tables [2, 1, B, 1, N, D / 2] in which the tokens of this scale are the chosen ones of every row."""
        if not tables:
            return tables
        schedule, name = self.found.schedule, str(tuple(scale_schedule))
        assert schedule is not None, "the policy's"
        start, count = schedule.starts[s] - schedule.prefix, schedule.num_queries(s)
        table = tables[name].to(places.device)
        own = table[:, 0, 0, 0, start : start + count][:, places][:, None, :, None]  # [2, 1, B, 1, kept, D / 2]
        return {name: torch.cat((table[..., :start, :].expand(-1, -1, own.shape[2], -1, -1, -1), own), 4)}


def farthest(x: Tensor, keep: int) -> Tensor:
    """[B, keep] places in x [B, N, C] of the rows farthest from the mean row, farthest first."""
    return (x - x.mean(1, keepdim=True)).square().sum(-1).argsort(1, descending=True)[:, :keep]


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def enlarge(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """x [B, tokens of grid, C] on the grid `to`, each cell the mean of the cells it covers."""
    wide = F.interpolate(x.unflatten(1, grid).permute(0, 3, 1, 2), size=to, mode="area")
    return wide.permute(0, 2, 3, 1).flatten(1, 2)
