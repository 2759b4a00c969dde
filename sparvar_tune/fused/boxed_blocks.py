"""The blocks of the models in the box as one function: pocketvar's AdaLN and cosine attention, emojivar's affine norms and plain
attention; both with RoPE and the exact form of GELU.

Products are in the model's own dtype, the residual stream is fp32, and a sum and the norm behind it are one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparvar_kernels.path import append_qkv, residual_norm
from sparvar_tune.adapters.instance_forward import why_not_replace
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.bitwise.sampling import Generating
from sparvar_tune.fused.product import Product, exact_gelu_mlp, multiplied, why_not_owned
from sparvar_tune.fused.stack import Pass

EPS = 1e-5  # of F.layer_norm, which pocketvar calls
OWN = ("before_attention", "attention_part", "mlp_part", "after_attention")  # a model's methods whose work is done here


class Block:
    """One block's products and constants. norms: the affine part of each of the two, empty where AdaLN stands for it."""

    def __init__(self, model: Any, block: Any, dtype: torch.dtype) -> None:
        self.qkv, self.proj = Product(block.qkv, dtype), Product(block.proj, dtype)
        self.up, self.down = Product(block.fc1, dtype), Product(block.fc2, dtype)
        self.norms: list[dict[str, Any]] = [{"eps": EPS}, {"eps": EPS}]
        self.q_scale: Tensor | None = None
        if hasattr(block, "norm1"):
            self.norms = [
                {"weight": n.weight.detach(), "bias": n.bias.detach(), "eps": n.eps} for n in (block.norm1, block.norm2)
            ]
        if hasattr(block, "log_scale"):
            self.q_scale = model.head_scale(block).detach().float()


class BoxedBlocks:
    """See the module docstring. `prepare` comes once per kind of picture, `begin` once a picture, `run` once a scale.

    thins: kinds of steps that leave out tokens which `run` can do.
    """

    exact_gelu: ClassVar[bool] = True
    thins: tuple[str, ...] = ("prune_tokens", "cache_budget")

    def __init__(self, found: Parts) -> None:
        self.found, self.model = found, found.model
        self.blocks: list[Block] = []
        self.modulated = hasattr(found.blocks[0], "modulation")
        self.modulation = self.own_modulation = self.rotation = torch.empty(0)

    def why_not(self) -> str | None:
        """Why this model's blocks cannot run as one, or None."""
        for name in OWN:
            if reason := why_not_replace(self.model, name):
                return reason
            if not _is_shipped(type(self.model), name):
                return f"{type(self.model).__name__} has a {name} of its own"
        for i, block in enumerate(self.found.blocks):
            norms = [getattr(block, name) for name in ("norm1", "norm2") if hasattr(block, name)]
            for module in (block, *norms):
                if reason := why_not_owned(module):
                    return f"block {i}: {reason}"
        return None

    def prepare(self, rows: int, dtype: torch.dtype) -> None:
        """Weights in `dtype`, and buffers at addresses that stay."""
        self.blocks = [Block(self.model, block, dtype) for block in self.found.blocks]
        angles = self.model.rotations.float()
        self.rotation = torch.stack((angles.cos(), angles.sin()), -1)
        if self.modulated:
            self.own_modulation = torch.stack([block.modulation.detach().float() for block in self.found.blocks])[:, None]
            self.modulation = self.own_modulation.repeat(1, rows, 1, 1)

    def builds(self, lengths: Sequence[int], by_parts: bool = False) -> Sequence[Any]:
        """Every binary (`backends.triton.binary.Build`) that `run` launches for passes of these lengths, but for attention's."""
        from sparvar_kernels.path.triton.append import TURNS, append_build
        from sparvar_kernels.path.triton.residual_norm import residual_norm_build

        block, found, width, fp32 = self.blocks[0], self.found, self.model.config.width, torch.float32
        dtype, cosine = block.qkv.dtype, block.q_scale is not None
        made: list[Any] = [
            append_build(dtype, found.head_dim, found.heads, n, normalise=cosine, scaled=cosine, turn=TURNS["interleaved"])
            for n in lengths
        ]
        added: dict[str, torch.dtype] = {"update": dtype}
        if self.modulated:
            added["gate"] = fp32
            normed = dict.fromkeys(("scale", "shift"), fp32)
        else:
            normed = {name: block.norms[0][name].dtype for name in ("weight", "bias")}
        made += [residual_norm_build(fp32, dtype, width, "layer", True, operands) for operands in (normed, added | normed)]
        return [*made, residual_norm_build(fp32, fp32, width, "none", True, added)]

    def multiply_once(self, rows: int, length: int) -> None:
        """See `stack.Stack`."""
        block = self.blocks[0]
        for product in (block.qkv, block.proj, block.up, block.down):
            product.once(rows, length)

    def begin(self, state: Generating) -> None:
        """What a picture holds constant."""
        if self.modulated:
            torch.add(self.own_modulation, state.told[0].float(), out=self.modulation)

    def run(self, x: Tensor, at: Pass) -> None:
        """All blocks over x [rows, L, C] fp32, in place. Nothing in it waits for the device or looks at values."""
        update: Tensor | None = None
        gate: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if at.by_parts(i):
                residual_norm(x, update, gate, norm="none", eps=0.0, out_dtype=x.dtype)
                self._add_parts(i, x, at)
                update = gate = None
                continue
            dtype, gates = block.qkv.dtype, self._gates(i, x.shape[0])
            first, second = self._norms(i, x.shape[0])
            y = residual_norm(x, update, gate, norm="layer", out_dtype=dtype, **first)
            update = self._attend(i, y, at)
            y = residual_norm(x, update, gates[0], norm="layer", out_dtype=dtype, **second)
            update, gate = self._think(i, y, at), gates[1]
        residual_norm(x, update, gate, norm="none", eps=0.0, out_dtype=x.dtype)

    def _add_parts(self, i: int, x: Tensor, at: Pass) -> None:
        def gated(update: Tensor, gate: Tensor | None) -> Tensor:
            return update.float() if gate is None else update * gate[:, None]

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            y = residual_norm(rows, norm="layer", out_dtype=self.blocks[i].qkv.dtype, **first)
            return gated(self._attend(i, y, at, places), gates[0])

        def think(rows: Tensor, _: Tensor | None) -> Tensor:
            y = residual_norm(rows, norm="layer", out_dtype=self.blocks[i].qkv.dtype, **second)
            return gated(self._think(i, y, at), gates[1])

        (first, second), gates = self._norms(i, x.shape[0]), self._gates(i, x.shape[0])
        at.add(i, "attention", x, attend)
        at.add(i, "mlp", x, think)

    def _gates(self, i: int, rows: int) -> Sequence[Tensor | None]:
        """The factors [rows, C] of both parts of a block; None is 1."""
        return self.modulation[i, :rows, 2::3].unbind(1) if self.modulated else (None, None)

    def _norms(self, i: int, rows: int) -> list[dict[str, Any]]:
        """The operands of both norms of a block."""
        if not self.modulated:
            return self.blocks[i].norms
        shift1, scale1, _, shift2, scale2, _ = self.modulation[i, :rows].unbind(1)
        pairs = ((shift1, scale1), (shift2, scale2))
        return [{"shift": shift, "scale": scale, "eps": EPS} for shift, scale in pairs]

    # Apart, so that what they need on the way is given back when they are done

    def _attend(self, i: int, y: Tensor, at: Pass, chosen: Tensor | None = None) -> Tensor:
        block, (rows, length, _) = self.blocks[i], y.shape
        qkv = multiplied(block.qkv, y, at.scaled(i)).view(rows, length, 3, self.found.heads, self.found.head_dim)
        places, cosine = self.rotation[at.start : at.start + at.length], block.q_scale is not None
        if chosen is not None:
            places = places[chosen]  # each row its own
        q = append_qkv(qkv, *at.cache(i), at.filled(i), q_scale=block.q_scale, normalise=cosine, rotation=places)
        del qkv
        out = at.attend(i, q)
        at.cut(i, lambda window: block.qkv.raw_queries(y.index_select(1, window), self.found.heads, self.found.head_dim))
        return multiplied(block.proj, out, at.scaled(i))

    def _think(self, i: int, y: Tensor, at: Pass) -> Tensor:
        return exact_gelu_mlp(self.blocks[i].up, self.blocks[i].down, y, at.scaled(i))


def _is_shipped(kind: type[Any], name: str) -> bool:
    """Whether a class's method is one of this package's."""
    return getattr(kind, name).__module__.startswith(__name__.split(".")[0] + ".")
