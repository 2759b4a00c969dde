"""HART's blocks as one function: RMSNorm, attention with rotated places, RMSNorm, SwiGLU; no AdaLN.

cos and sin of the places depend on the image alone; the public code makes them anew in every layer and at every scale. The stream
keeps the model's own precision (fp16), and a sum and the norm behind it are one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.path import append_qkv, gated_silu, residual_norm, scaled_rows
from sparvar_tune.adapters.hart import BLOCK, linears
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.fused.denoiser import put_on_denoiser
from sparvar_tune.fused.denoiser_network import network_builds
from sparvar_tune.fused.product import Product, multiplied, why_not_all_owned
from sparvar_tune.fused.stack import Pass
from sparvar_tune.fused.var import learned_factor
from sparvar_tune.generation.tokens import rows_at

NORMS = ("LlamaRMSNorm", "LlamaRMSNormFused")
ROTARY = ("rotary_emb", "context_rotary_emb")


class Block:
    """One block's products and constants."""

    def __init__(self, block: Any, dtype: torch.dtype, stream: torch.dtype) -> None:
        attention, ffn, norm = block.attn, block.ffn, block.ln_wo_grad
        bias = torch.cat((attention.q_bias, attention.zero_k_bias, attention.v_bias)).detach()
        self.qkv, self.proj = Product(attention.qkv_proj, dtype, bias), Product(attention.proj, dtype)
        self.gate, self.up = Product(ffn.gate_proj, dtype), Product(ffn.up_proj, dtype)
        self.down = Product(ffn.down_proj, dtype)
        self.cosine, self.q_scale = bool(attention.attn_l2_norm), learned_factor(attention)
        self.eps = norm.variance_epsilon
        # its fused norm casts its own weight to the stream's dtype before it uses it
        weight = norm.weight.detach()
        self.weight = weight.to(stream) if type(norm).__name__ == "LlamaRMSNormFused" else weight


class HartStack:
    """See the module docstring."""

    parameters: Sequence[str] = BLOCK.parameters
    stream: torch.dtype | None = None
    exact_gelu: ClassVar[bool] = False
    thins: tuple[str, ...] = ("prune_tokens",)
    linears = staticmethod(linears)

    def __init__(self, found: Parts) -> None:
        self.found = found
        self.blocks: list[Block] = []
        self.held = torch.float32
        self.places = self.rotation = torch.empty(0)

    def why_not(self) -> str | None:
        first = self.found.attentions[0]
        for i, block in enumerate(self.found.blocks):
            reason = _why_not_block(block) or _why_not_turned_alike(block.attn, first)
            if reason:
                return f"block {i}: {reason}"
        return None

    def why_not_image(self, given: Mapping[str, Any]) -> str | None:
        if given.get("attn_bias") is not None:
            return "the call brings an attention mask"
        if given.get("context_position_ids") is None:
            return "the call brings no places of the text (context_position_ids)"
        rounds = given.get("num_maskgit_iters", 1)
        return None if rounds == 1 else f"its last grid is drawn in {rounds} rounds (num_maskgit_iters), want 1"

    def schedule(self, given: Mapping[str, Any]) -> ScaleSchedule | str:
        assert self.found.schedule is not None
        return self.found.schedule

    def kind(self, given: Mapping[str, Any]) -> Hashable:
        return None

    def prepare(self, given: Mapping[str, Any], rows: int, dtype: torch.dtype, schedule: ScaleSchedule) -> None:
        x, places = given["x"], schedule.num_keys(len(schedule) - 1)
        self.held = x.dtype  # what the stream is kept in
        self.blocks = [Block(block, dtype, self.held) for block in self.found.blocks]
        self.places = _grid_places(schedule, x.device)
        self.rotation = torch.empty(rows, places, self.found.head_dim, 2, device=x.device)

    def builds(self, lengths: Sequence[int], by_parts: bool = False) -> Sequence[Any]:
        from sparvar_kernels.path.triton.append import TURNS, append_build
        from sparvar_kernels.path.triton.gated_silu import BLOCK, gated_silu_build
        from sparvar_kernels.path.triton.residual_norm import residual_norm_build

        block, found = self.blocks[0], self.found
        dtype, width, turn = block.qkv.dtype, block.weight.shape[0], TURNS["rotate_half"]
        cosine = {"normalise": block.cosine, "scaled": block.cosine}
        made: list[Any] = [append_build(dtype, found.head_dim, found.heads, n, turn=turn, **cosine) for n in lengths]
        norm, update = {"weight": block.weight.dtype}, {"update": dtype}
        made += [residual_norm_build(self.held, dtype, width, "rms", True, o) for o in (norm, update | norm)]
        # whether what a pass gates is a whole number of the kernel's blocks; a foreign module does not say
        weight = block.gate.weight
        evens = (True,) if weight is not None and weight.shape[0] % BLOCK == 0 else (True, False)
        made += [gated_silu_build(dtype, even) for even in evens]
        made.append(residual_norm_build(self.held, self.held, width, "none", True, update))
        return [*made, *network_builds(getattr(getattr(found.model, "diffloss", None), "net", None), dtype)]

    def multiply_once(self, rows: int, length: int) -> None:
        block = self.blocks[0]
        for product in (block.qkv, block.proj, block.gate, block.up, block.down):
            product.once(rows, length)

    def begin(self, given: Mapping[str, Any]) -> None:
        """The table of all places, by the model's own rotary modules and as they round it."""
        attention, text = self.found.attentions[0], given["context_position_ids"]
        like = text.new_empty(0, dtype=self.blocks[0].qkv.dtype)  # they take dtype and device from it
        grids = self.places + text[:, -1, None, None]
        at = 0
        for table in (attention.context_rotary_emb(like, text), attention.rotary_emb(like, grids)):
            for i, part in enumerate(table):
                self.rotation[:, at : at + part.shape[1], :, i].copy_(part)
            at += table[0].shape[1]

    def derive(self) -> None:
        """Nothing more: these blocks have no condition."""

    def run(self, x: Tensor, at: Pass) -> None:
        update: Tensor | None = None
        for i, block in enumerate(self.blocks):
            norm = {"weight": block.weight, "eps": block.eps, "out_dtype": block.qkv.dtype}
            if at.by_parts(i):
                residual_norm(x, update, norm="none", eps=0.0, out_dtype=x.dtype)
                self._add_parts(i, x, at, norm)
                update = None
                continue
            update = self._attend(i, residual_norm(x, update, norm="rms", **norm), at)
            update = _swiglu(block, residual_norm(x, update, norm="rms", **norm), at.scaled(i))
        residual_norm(x, update, norm="none", eps=0.0, out_dtype=x.dtype)

    def _add_parts(self, i: int, x: Tensor, at: Pass, norm: dict[str, Any]) -> None:
        at.add(i, "attention", x, lambda rows, places: self._attend(i, residual_norm(rows, norm="rms", **norm), at, places))
        at.add(i, "mlp", x, lambda rows, _: self._think(i, residual_norm(rows, norm="rms", **norm), at))

    def _think(self, i: int, y: Tensor, at: Pass) -> Tensor:
        return _swiglu(self.blocks[i], y, at.scaled(i))

    def _attend(self, i: int, y: Tensor, at: Pass, chosen: Tensor | None = None) -> Tensor:
        """Apart, so that what it needs on the way is given back when it is done."""
        block, (rows, length, _) = self.blocks[i], y.shape
        qkv = multiplied(block.qkv, y, at.scaled(i)).view(rows, length, 3, self.found.heads, self.found.head_dim)
        places = self.rotation[:rows, at.start : at.start + at.length]
        if chosen is not None:
            places = rows_at(places.flatten(2), chosen).unflatten(2, places.shape[2:])
        q = append_qkv(
            qkv, *at.cache(i), at.filled(i), q_scale=block.q_scale, normalise=block.cosine, rotation=places, pairs="rotate_half"
        )
        del qkv
        return multiplied(block.proj, at.attend(i, q), at.scaled(i))

    def around(self, drawing: Callable[[], bool], graphs: bool) -> Undos:
        """The denoiser that refines the last grid."""
        return put_on_denoiser(self.found.model, drawing, graphs)


def stack(found: Parts) -> HartStack:
    return HartStack(found)


def _swiglu(block: Block, y: Tensor, fmt: str | None) -> Tensor:
    if fmt is not None:
        rows = scaled_rows(y, fmt=fmt)
        return block.down.scaled(scaled_rows(block.gate.scaled(rows, fmt), "silu", block.up.scaled(rows, fmt), fmt), fmt)
    return block.down(gated_silu(block.gate(y), block.up(y)))


def _grid_places(schedule: ScaleSchedule, device: torch.device) -> Tensor:
    """[tokens, 2] (row, column) of every grid's corners, in units of the last grid."""
    side = schedule.grids[-1][0]
    found = []
    for height, width in schedule.grids:
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        corners = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        found.append((corners / height * side).flatten(0, 1))
    return torch.cat(found)


def _why_not_block(block: Any) -> str | None:
    norm, ffn = block.ln_wo_grad, block.ffn
    if not block.disable_aln or block.shared_aln:
        return "it has AdaLN (disable_aln, shared_aln); the released model has none"
    if getattr(block, "cross_attn", None) is not None:
        return "it has cross-attention"
    if type(norm).__name__ not in NORMS or not hasattr(norm, "variance_epsilon") or getattr(norm, "use_quant", False):
        return f"its norm is {type(norm).__name__}, want {' or '.join(NORMS)} that does not quantise"
    if not all(hasattr(ffn, n) for n in ("gate_proj", "up_proj", "down_proj")) or type(ffn.act_fn) is not nn.SiLU:
        return f"its ffn is {type(ffn).__name__}, want gate_proj, up_proj, SiLU, down_proj"
    return why_not_all_owned(block.attn, ffn, ffn.act_fn, norm)


def _why_not_turned_alike(attention: Any, first: Any) -> str | None:
    """All layers share one table."""
    for name in ROTARY:
        if not hasattr(getattr(attention, name, None), "inv_freq"):
            return f"its attention has no {name}"
        ours, theirs = (getattr(a, name) for a in (attention, first))
        if type(ours) is not type(theirs) or not torch.equal(ours.inv_freq, theirs.inv_freq):
            return f"its {name} is not that of block 0"
    return None
