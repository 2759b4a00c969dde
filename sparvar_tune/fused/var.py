"""VAR's blocks as one function: AdaLN, cosine attention, MLP.

Its weights are fp32 and public code draws under autocast, which casts every weight again at every scale; here they are cast once.
AdaLN's products, the same at every scale, are done once an image and in fp32. The residual stream stays in fp32, and a sum and
the norm behind it are one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.path import append_qkv, residual_norm
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.var import BLOCK, linears
from sparvar_tune.fused.product import Product, gelu_mlp, multiplied, why_not_all_owned
from sparvar_tune.fused.stack import Pass


class Block:
    """One block's products and constants."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        attention, ffn = block.attn, block.ffn
        bias = torch.cat((attention.q_bias, attention.zero_k_bias, attention.v_bias)).detach()
        self.qkv, self.proj = Product(attention.mat_qkv, dtype, bias), Product(attention.proj, dtype)
        self.up, self.down = Product(ffn.fc1, dtype), Product(ffn.fc2, dtype)
        self.eps, self.cosine, self.q_scale = block.ln_wo_grad.eps, bool(attention.attn_l2_norm), learned_factor(attention)


class VarStack:
    """See the module docstring."""

    parameters: Sequence[str] = BLOCK.parameters
    stream: torch.dtype | None = torch.float32
    exact_gelu: ClassVar[bool] = False
    thins: tuple[str, ...] = ()
    linears = staticmethod(linears)

    def __init__(self, found: Parts) -> None:
        self.found = found
        self.blocks: list[Block] = []
        self.modulation = torch.empty(0)

    def why_not(self) -> str | None:
        for i, block in enumerate(self.found.blocks):
            reason = _why_not_block(block)
            if reason:
                return f"block {i}: {reason}"
        return None

    def why_not_image(self, given: Mapping[str, Any]) -> str | None:
        return None if given.get("attn_bias") is None else "the call brings an attention mask"

    def schedule(self, given: Mapping[str, Any]) -> ScaleSchedule | str:
        assert self.found.schedule is not None
        return self.found.schedule

    def kind(self, given: Mapping[str, Any]) -> Hashable:
        return None

    def prepare(self, given: Mapping[str, Any], rows: int, dtype: torch.dtype, schedule: ScaleSchedule) -> None:
        x = given["x"]
        self.blocks = [Block(block, dtype) for block in self.found.blocks]
        self.modulation = torch.empty(self.found.layers, 6, rows, x.shape[2], device=x.device)
        self.condition = torch.empty_like(given["cond_BD"], memory_format=torch.contiguous_format)

    def builds(self, lengths: Sequence[int], by_parts: bool = False) -> Sequence[Any]:
        from sparvar_kernels.path.triton.append import NO_TURN, append_build
        from sparvar_kernels.path.triton.residual_norm import residual_norm_build

        block, found, width = self.blocks[0], self.found, self.modulation.shape[3]
        dtype, fp32, cosine = block.qkv.dtype, torch.float32, {"normalise": block.cosine, "scaled": block.cosine}
        made: list[Any] = [append_build(dtype, found.head_dim, found.heads, n, turn=NO_TURN, **cosine) for n in lengths]
        modulated, gated = dict.fromkeys(("scale", "shift"), fp32), {"update": dtype, "gate": fp32}
        made += [residual_norm_build(fp32, dtype, width, "layer", True, o) for o in (modulated, gated | modulated)]
        return [*made, residual_norm_build(fp32, fp32, width, "none", True, gated)]

    def multiply_once(self, rows: int, length: int) -> None:
        block = self.blocks[0]
        for product in (block.qkv, block.proj, block.down):
            product.once(rows, length)
        block.up.once(rows, length, gelu=True)

    def begin(self, given: Mapping[str, Any]) -> None:
        self.condition.copy_(given["cond_BD"])

    def derive(self) -> None:
        for i, block in enumerate(self.found.blocks):
            if block.shared_aln:
                six = block.ada_gss.float() + self.condition.float()
            else:
                six = block.ada_lin(self.condition.to(next(block.ada_lin.parameters()).dtype)).view(
                    -1, 1, 6, self.modulation.shape[-1]
                )
            self.modulation[i].copy_(six[:, 0].transpose(0, 1))

    def run(self, x: Tensor, at: Pass) -> None:
        update: Tensor | None = None
        gate: Tensor | None = None
        for i, block in enumerate(self.blocks):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation[i, :, : x.shape[0]].unbind(0)
            dtype = block.qkv.dtype
            y = residual_norm(x, update, gate, norm="layer", scale=scale1, shift=shift1, eps=block.eps, out_dtype=dtype)
            update = self._attend(i, y, at)
            y = residual_norm(x, update, gamma1, norm="layer", scale=scale2, shift=shift2, eps=block.eps, out_dtype=dtype)
            update, gate = gelu_mlp(block.up, block.down, y, at.scaled(i)), gamma2
        residual_norm(x, update, gate, norm="none", eps=0.0, out_dtype=x.dtype)

    def _attend(self, i: int, y: Tensor, at: Pass) -> Tensor:
        """Apart, so that what it needs on the way is given back when it is done."""
        block, (rows, length, _) = self.blocks[i], y.shape
        qkv = multiplied(block.qkv, y, at.scaled(i)).view(rows, length, 3, self.found.heads, self.found.head_dim)
        q = append_qkv(qkv, *at.cache(i), at.filled(i), q_scale=block.q_scale, normalise=block.cosine)
        del qkv
        return multiplied(block.proj, at.attend(i, q), at.scaled(i))

    def around(self, drawing: Callable[[], bool], graphs: bool) -> Undos:
        """Nothing of it waits for the device."""
        return Undos()


def stack(found: Parts) -> VarStack:
    return VarStack(found)


def learned_factor(attention: Any) -> Tensor | None:
    """[H] fp32 that multiplies q in cosine attention, computed in the parameter's own dtype as the public code does."""
    if not attention.attn_l2_norm:
        return None
    factor: Tensor = attention.scale_mul_1H11.detach().clamp_max(attention.max_scale_mul).exp().flatten().float()
    return factor


def _why_not_block(block: Any) -> str | None:
    norm, ffn = block.ln_wo_grad, block.ffn
    if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
        return f"its norm is {type(norm).__name__}, want LayerNorm without weights of its own"
    if not all(hasattr(ffn, n) for n in ("fc1", "act", "fc2")) or getattr(ffn.act, "approximate", None) != "tanh":
        return f"its ffn is {type(ffn).__name__}, want fc1, GELU (tanh), fc2"
    name = "ada_gss" if block.shared_aln else "ada_lin"
    if not hasattr(block, name):
        return f"it has no {name}"
    return why_not_all_owned(block.attn, ffn, ffn.act, norm)
