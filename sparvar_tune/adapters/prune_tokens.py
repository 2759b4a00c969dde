"""Blocks of a live model that work on chosen tokens; `generation/prune_tokens.py` says which and what becomes of the others.

A block's own modules are called, on fewer rows; only the sums around them are here, for Infinity's and HART's blocks. Their
attention keeps its own rotation: it finds the places of the chosen tokens where it looks for those of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.scale_count import IsOther, ScaleCount, never
from sparvar_tune.generation import PruneTokens
from sparvar_tune.generation.tokens import Work, pruned, rows_at


class PrunedBlock(Undos):
    """One block's forward. cached: part -> its output.

    given: the block's arguments by name, from a call. is_other: whether an image has another schedule than the parts'.
    """

    def __init__(
        self, found: Parts, step: PruneTokens, layer: int, given: Callable[..., dict[str, Any]],
        is_other: IsOther = never,
    ) -> None:  # fmt: skip
        super().__init__()
        assert found.schedule is not None, "the policy's"
        self.found, self.step, self.given, self.schedule = found, step, given, found.schedule
        self.block, self.attention = found.blocks[layer], found.attentions[layer]
        self.count = ScaleCount(found, self.attention, is_other)
        reason = self.why_not()
        if reason:
            raise ValueError(f"prune_tokens: block {layer} {reason}")
        self.cached: dict[str, Tensor] = {}

    def why_not(self) -> str | None:
        """Why such a block cannot be run part by part, in half a line, or None."""
        raise NotImplementedError

    def run(self, s: int, x: Tensor, **call: Any) -> Tensor:
        """The block at scale `s`, a part after the other; `call` has its other arguments."""
        raise NotImplementedError

    def put_on(self) -> PrunedBlock:
        self.add(replace_method(self.block, "forward", self.forward))
        return self

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.attention.caching:
            return inner(*args, **kwargs)
        call = self.given(*args, **kwargs)
        if self.attention.cached_k is None:
            self.cached.clear()
        s = self.count.next(lambda: call)
        if s is None or (s != self.step.cached_scale and self.step.at(s) is None):
            return inner(*args, **kwargs)
        if call["x"].shape[1] != self.schedule.num_queries(s):  # HART's last grid in rounds
            return inner(*args, **kwargs)
        return self.run(s, **call)

    def part(self, name: str, s: int, x: Tensor, work: Work) -> Tensor:
        """What a part adds to every token of x [B, N, C]."""
        return pruned(self.step, self.schedule.grids, s, x, work, self.cached, name)


class InfinityBlock(PrunedBlock):
    """Self-attention, attention to the text, MLP; the first and the last between AdaLN's shift and scale and its gate."""

    def why_not(self) -> str | None:
        names = ("fused_norm_func", "shared_aln", "norm_eps", "ca_norm", "ca_gamma", "ffn")
        missing = [name for name in names if getattr(self.block, name, None) is None]
        return f"has no {missing[0]}" if missing else None

    def run(
        self, s: int, x: Tensor, cond_BD: Tensor | None = None, ca_kv: Any = None, attn_bias_or_two_vector: Any = None,
        attn_fn: Any = None, scale_schedule: Any = None, rope2d_freqs_grid: Any = None, scale_ind: int = 0, **_call: Any,
    ) -> Tensor:  # fmt: skip
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

    def placed(self, tables: Any, scale_schedule: Any, s: int, places: Tensor) -> Any:
        """The RoPE tables [2, 1, B, 1, N, D / 2] in which the tokens of this scale are the chosen ones of every row."""
        if not tables:
            return tables
        name, start, count = str(tuple(scale_schedule)), self.schedule.starts[s], self.schedule.num_queries(s)
        table = tables[name].to(places.device)
        own = table[:, 0, 0, 0, start : start + count][:, places][:, None, :, None]  # [2, 1, B, 1, kept, D / 2]
        return {name: torch.cat((table[..., :start, :].expand(-1, -1, own.shape[2], -1, -1, -1), own), 4)}


class HartBlock(PrunedBlock):
    """Attention and MLP without AdaLN, as the released model has them. chosen: places of the rows that attention is called on."""

    chosen: Tensor | None = None

    def why_not(self) -> str | None:
        b = self.block
        if not b.disable_aln or getattr(b, "shared_aln", False) or getattr(b, "cross_attn", None) is not None:
            return "has AdaLN or cross-attention, want one without"
        return None if hasattr(self.attention, "rotary_emb") else "has no rotary_emb in its attention"

    def put_on(self) -> PrunedBlock:
        self.add(replace_method(self.attention.rotary_emb, "forward", self.rotate))
        return super().put_on()

    def rotate(self, inner: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model asks for the places [B, N, 2] of all tokens of the scale; those of the chosen ones are looked up."""
        return inner(x, position_ids if self.chosen is None else rows_at(position_ids, self.chosen), *args, **kwargs)

    def run(self, s: int, x: Tensor, cond_BD: Any = None, **call: Any) -> Tensor:
        b = self.block

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            self.chosen = places
            try:
                out: Tensor = self.attention(b.ln_wo_grad(rows), **call)
            finally:
                self.chosen = None
            return out

        x = x + self.part("attention", s, x, attend)
        return x + self.part("mlp", s, x, lambda rows, _: b.ffn(b.ln_wo_grad(rows)))


def prune_tokens(step: PruneTokens, block: Callable[[int], PrunedBlock]) -> Undos:
    """The step in all its layers; block(layer): the forward of one. Raises ValueError, and changes nothing, where it cannot."""
    undos = Undos()
    for made in [block(layer) for layer in range(step.first_layer, step.last_layer + 1)]:
        undos.add(made.put_on())
    return undos
