"""Infinity's blocks as one function: AdaLN, cosine attention with RoPE, cross-attention to the text, MLP.

Against the public block it rounds less: the residual stream stays in fp32, a sum and the norm behind it are one pass, and in an
fp32 model the text is attended in fp32 (the public code casts to bf16 for flash-attn). A short text is folded into the products
around it (folded_text.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.path import append_qkv, residual_norm, text_attention
from sparvar_tune.adapters.infinity import BLOCK, linears
from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.adapters.live_attention import schedule_of
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.adapters.structure import is_plain
from sparvar_tune.fused.folded_text import FoldedText, Values, room_of
from sparvar_tune.fused.product import Product, gelu_mlp, gelu_up, multiplied, why_not_all_owned, why_not_owned
from sparvar_tune.fused.stack import Pass
from sparvar_tune.fused.stream import AddedStream, Adding, Stream
from sparvar_tune.fused.two_choices import two_choices

TEXT_ROOM = 64  # text rows are kept in multiples of this, so that prompts of like lengths share graphs


class Block:
    """One block's products and constants."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        sa, ca, ffn = block.sa, block.ca, block.ffn
        self.qkv = Product(sa.mat_qkv, dtype, torch.cat((sa.q_bias, sa.zero_k_bias, sa.v_bias)).detach())
        self.proj, self.to_query, self.from_text = Product(sa.proj, dtype), Product(ca.mat_q, dtype), Product(ca.proj, dtype)
        self.text_kv = Product(ca.mat_kv, dtype, torch.cat((ca.zero_k_bias, ca.v_bias)).detach())
        self.up, self.down = Product(ffn.fc1, dtype), Product(ffn.fc2, dtype)
        self.ca_norm = block.ca_norm
        self.ca_weight, self.ca_bias = block.ca_norm.weight.detach().float(), block.ca_norm.bias.detach().float()
        gamma = block.ca_gamma
        self.ca_gamma = gamma.detach().float() if isinstance(gamma, Tensor) else None  # else it is 1
        self.eps, self.ca_eps = block.norm_eps, block.ca_norm.eps
        self.q_scale: Tensor | None = None
        if sa.cos_attn:  # in the parameter's own dtype, as the public code: in bf16 the cap of 100 is 99
            self.q_scale = sa.scale_mul_1H11.detach().clamp_max(sa.max_scale_mul).exp().flatten().float()
        self.cosine, self.text_scale = bool(sa.cos_attn), float(ca.scale)

    def biases(self) -> Tensor:
        """[3, C] fp32: of its products whose outputs are added to the stream, in order."""
        products = self.proj, self.from_text, self.down
        return torch.stack([torch.zeros_like(self.ca_bias) if p.bias is None else p.bias.float() for p in products])


class InfinityStack:
    """See the module docstring."""

    parameters: Sequence[str] = BLOCK.parameters
    stream: torch.dtype | None = torch.float32
    exact_gelu: ClassVar[bool] = False
    thins: tuple[str, ...] = ("prune_tokens", "cache_budget")
    linears = staticmethod(linears)

    def __init__(self, found: Parts) -> None:
        self.found = found
        self.blocks: list[Block] = []
        self.modulation = self.text = self.starts = self.rotation = self.given_text = self.condition = torch.empty(0)
        self.folded: FoldedText | None = None  # else `text` is attended to
        self.adding: Adding | None = None  # where all products behind which a norm comes can add themselves to the stream
        self.text_gates = torch.empty(0)  # [layers, 1, C]

    def why_not(self) -> str | None:
        for i, block in enumerate(self.found.blocks):
            reason = _why_not_block(block)
            if reason:
                return f"block {i}: {reason}"
        if not getattr(self.found.model, "add_lvl_embeding_only_first_block", 1):
            return "it adds level embeddings between its blocks (add_lvl_embeding_only_first_block is 0)"
        return None

    def why_not_image(self, given: Mapping[str, Any]) -> str | None:
        if given.get("attn_bias_or_two_vector") is not None:
            return "the call brings an attention mask"
        if given.get("rope2d_freqs_grid") is None:
            return "the call brings no RoPE table"
        if not any(layer != 0 for layer in given.get("cfg_insertion_layer", ())):
            return None
        return f"guidance is mixed inside the blocks (cfg_insertion_layer={list(given['cfg_insertion_layer'])})"

    def schedule(self, given: Mapping[str, Any]) -> ScaleSchedule | str:
        return schedule_of(given.get("scale_schedule"))

    def kind(self, given: Mapping[str, Any]) -> tuple[bool, int]:
        """Whether the text is folded into products, and the room for it: a row's, or all rows'."""
        modules = (module for block in self.found.blocks for module in (block.ca.mat_q, block.ca.proj))
        room = room_of(given, self.found.blocks[0].ca.head_dim) if all(map(is_plain, modules)) else None
        return (True, room) if room else (False, -(-given["ca_kv"][0].shape[0] // TEXT_ROOM) * TEXT_ROOM)

    def prepare(self, given: Mapping[str, Any], rows: int, dtype: torch.dtype, schedule: ScaleSchedule) -> None:
        x, first = given["x"], self.found
        width, device = x.shape[2], x.device
        self.blocks = [Block(block, dtype) for block in first.blocks]
        self.modulation = torch.empty(first.layers, 6, rows, width, device=device)
        folds, room = self.kind(given)
        form = first.blocks[0].ca.num_heads, first.blocks[0].ca.head_dim
        self.folded = FoldedText(first.layers, rows, room, *form, width, dtype, device) if folds else None
        self.text = torch.zeros(first.layers, 0 if folds else room, 2, *form, dtype=dtype, device=device)
        texts, condition = given["ca_kv"][0], given["cond_BD"]
        self.given_text = torch.zeros(rows * room if folds else room, texts.shape[1], dtype=dtype, device=device)
        self.condition = torch.empty(condition.shape, device=device)
        self.starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.adding, block = None, self.blocks[0]
        if self.folded is not None and all(p.plain for block in self.blocks for p in (block.proj, block.down)):
            biases = torch.cat([block.biases() for block in self.blocks])
            self.adding = Adding(biases, rows, (block.proj, self.folded.of(0, None), block.down))
            gates = [block.ca_gamma for block in self.blocks]
            self.text_gates = torch.stack([biases.new_ones(width) if g is None else g for g in gates])[:, None]
        table = given["rope2d_freqs_grid"][str(tuple(tuple(t) for t in given["scale_schedule"]))]
        table = table.detach().flatten(1, 3) if table.ndim == 6 else table.detach()
        self.rotation = table.reshape(2, -1, first.head_dim // 2).permute(1, 2, 0).float().contiguous().to(device)
        if self.rotation.shape[0] < schedule.num_keys(len(schedule) - 1):
            raise ValueError(
                f"the RoPE table has {self.rotation.shape[0]} places for {schedule.num_keys(len(schedule) - 1)} tokens"
            )

    def builds(self, lengths: Sequence[int], by_parts: bool = False) -> Sequence[Any]:
        from sparvar_kernels.path.triton.append import TURNS, append_build
        from sparvar_kernels.path.triton.gated_weight import gated_weight_build
        from sparvar_kernels.path.triton.residual_norm import residual_norm_build
        from sparvar_kernels.path.triton.text_attention import text_attention_build
        from sparvar_kernels.path.triton.text_softmax import text_softmax_build

        block, found, width = self.blocks[0], self.found, self.modulation.shape[3]
        dtype, fp32, text = block.qkv.dtype, torch.float32, self.text.shape[4]
        cosine, turn = {"normalise": block.cosine, "scaled": block.cosine}, TURNS["interleaved"]
        made: list[Any] = [append_build(dtype, found.head_dim, found.heads, n, turn=turn, **cosine) for n in lengths]
        if self.folded is None:
            made += [text_attention_build(dtype, text, n) for n in lengths]
        else:
            made.append(text_softmax_build(dtype, self.folded.heads, self.folded.room))
        modulated, affine = dict.fromkeys(("scale", "shift"), fp32), dict.fromkeys(("weight", "bias"), fp32)
        if by_parts:
            made.append(residual_norm_build(fp32, dtype, width, "layer", True, affine))
        added, gated = {"update": dtype}, {"update": dtype, "gate": fp32}
        text_update = added if block.ca_gamma is None else gated
        for norm, operands in (
            ("layer", modulated), ("layer", gated | affine), ("layer", text_update | modulated), ("layer", gated | modulated),
            ("none", gated),
        ):  # fmt: skip
            made.append(residual_norm_build(fp32, dtype if norm == "layer" else fp32, width, norm, True, operands))
        if any(self._adds(self.modulation.shape[2], n) for n in lengths):
            made.append(gated_weight_build(dtype))
            for operands in (modulated, affine):
                made.append(residual_norm_build(fp32, dtype, width, "layer", True, operands | {"offset": fp32}))
        return [*made, residual_norm_build(fp32, fp32, width, "layer", True, modulated)]  # before the head

    def multiply_once(self, rows: int, length: int) -> None:
        block = self.blocks[0]
        text = () if self.folded else (block.to_query, block.from_text)
        adds = self._adds(rows, length)
        for product in (block.qkv, *text, *(() if adds else (block.proj, block.down))):
            product.once(rows, length)
        block.up.once(rows, length, gelu=True)
        if self.adding is not None and adds:
            self.adding.look_for(rows, length)
        if self.folded is not None:
            self.folded.multiply_once(rows, length, block.from_text.bias, adds)

    def begin(self, given: Mapping[str, Any]) -> None:
        compact, ends, _ = given["ca_kv"]
        self.condition.copy_(given["cond_BD"])
        self.starts.copy_(ends)
        text = compact if self.folded is None else self.folded.padded(compact, self.starts)
        self.given_text[: text.shape[0]].copy_(text)

    def derive(self) -> None:
        for i, (block, own) in enumerate(zip(self.found.blocks, self.blocks, strict=True)):
            if block.shared_aln:
                six = block.ada_gss + self.condition
            else:
                six = block.ada_lin(self.condition).view(-1, 1, 6, self.condition.shape[-1])
            self.modulation[i].copy_(six[:, 0].transpose(0, 1))
            kv = own.text_kv(self.given_text)
            if self.folded is None:
                self.text[i].copy_(kv.view(self.text.shape[1:]))
            else:
                self.folded.fold(i, kv, own.to_query, own.from_text)
        if self.adding is not None:
            gamma1, gamma2 = self.modulation[:, 0], self.modulation[:, 1]
            self.adding.derive(torch.stack((gamma1, self.text_gates.expand_as(gamma1), gamma2), 1).flatten(0, 1))

    def run(self, x: Tensor, at: Pass) -> None:
        stream = self._stream(x, at)
        for i, block in enumerate(self.blocks):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation[i, :, : x.shape[0]].unbind(0)
            if at.by_parts(i):
                stream.end()
                self._add_parts(i, x, at)
                continue
            norm: dict[str, Any] = {"norm": "layer", "out_dtype": block.qkv.dtype}
            y = stream.norm(scale=scale1, shift=shift1, eps=block.eps, **norm)
            stream.add(block.proj, self._attend(i, y, at), gamma1, at.scaled(i))
            y = stream.norm(weight=block.ca_weight, bias=block.ca_bias, eps=block.ca_eps, **norm)
            stream.add(*self._attend_text(i, y), block.ca_gamma)
            y = stream.norm(scale=scale2, shift=shift2, eps=block.eps, **norm)
            stream.add(block.down, gelu_up(block.up, y, at.scaled(i)), gamma2, at.scaled(i))
        stream.end()

    def _adds(self, rows: int, length: int) -> bool:
        return self.adding is not None and self.adding.is_worth_it(rows, length)

    def _stream(self, x: Tensor, at: Pass) -> Stream | AddedStream:
        if self.adding is None or any(at.by_parts(i) or at.scaled(i) for i in range(len(self.blocks))):
            return Stream(x)
        return self.adding.stream(x)

    def _add_parts(self, i: int, x: Tensor, at: Pass) -> None:
        block = self.blocks[i]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation[i, :, : x.shape[0]].unbind(0)

        def norm(rows: Tensor, **operands: Any) -> Tensor:
            return residual_norm(rows, norm="layer", out_dtype=block.qkv.dtype, **operands)

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            y = norm(rows, scale=scale1, shift=shift1, eps=block.eps)
            return multiplied(block.proj, self._attend(i, y, at, places), at.scaled(i)) * gamma1[:, None]

        def read(rows: Tensor, _: Tensor | None) -> Tensor:
            product, seen = self._attend_text(i, norm(rows, weight=block.ca_weight, bias=block.ca_bias, eps=block.ca_eps))
            update = product(seen).float()
            return update if block.ca_gamma is None else update * block.ca_gamma

        def think(rows: Tensor, _: Tensor | None) -> Tensor:
            y = norm(rows, scale=scale2, shift=shift2, eps=block.eps)
            return gelu_mlp(block.up, block.down, y, at.scaled(i)) * gamma2[:, None]

        for part, work in (("attention", attend), ("text", read), ("mlp", think)):
            at.add(i, part, x, work)

    # Apart, so that what they need on the way is given back when they are done

    def _attend(self, i: int, y: Tensor, at: Pass, chosen: Tensor | None = None) -> Tensor:
        block, (rows, length, _) = self.blocks[i], y.shape
        qkv = multiplied(block.qkv, y, at.scaled(i)).view(rows, length, 3, self.found.heads, self.found.head_dim)
        places = self.rotation[at.start : at.start + at.length]
        if chosen is not None:
            places = places[chosen]  # each row its own
        q = append_qkv(qkv, *at.cache(i), at.filled(i), q_scale=block.q_scale, normalise=block.cosine, rotation=places)
        del qkv
        out = at.attend(i, q)
        at.cut(i, lambda window: block.qkv.raw_queries(y.index_select(1, window), self.found.heads, self.found.head_dim))
        return out

    def _attend_text(self, i: int, y: Tensor) -> tuple[Product | Values, Tensor]:
        """What the text's part multiplies last, and of what."""
        block, (rows, length, width) = self.blocks[i], y.shape
        if self.folded is not None:
            weights = self.folded.weights(i, y, self.starts[: rows + 1], block.text_scale)
            return self.folded.of(i, block.from_text.bias), weights
        query = block.to_query(y).view(rows, length, *self.text.shape[3:])
        seen = text_attention(query, self.text[i], self.starts[: rows + 1], block.text_scale, out=query)
        return block.from_text, seen.view(rows, length, width)

    def around(self, drawing: Callable[[], bool], graphs: bool) -> Undos:
        """The level embedding makes an index on the host, copies it to the device and looks it up; here a row is added, the same
        sums. The head's AdaLN goes through torch.compile, which takes seconds at the first picture. Bits are drawn by functions
        for vocabularies, two of them slow (two_choices.py)."""
        undos, model = Undos(), self.found.model
        levels: Any = getattr(model, "lvl_embed", None)
        head: Any = getattr(model, "head_nm", None)

        def add_level(inner: Any, feature: Tensor, scale_ind: int, scale_schedule: Any, need_to_pad: int = 0) -> Tensor:
            if not drawing() or need_to_pad or why_not_owned(levels):
                return cast(Tensor, inner(feature, scale_ind, scale_schedule, need_to_pad))
            feature += levels.weight[scale_ind]
            return feature

        def norm_head(inner: Any, x: Tensor, cond: Tensor) -> Tensor:
            if not drawing() or x.dtype != torch.float32 or why_not_owned(head.ln_wo_grad):
                return cast(Tensor, inner(x, cond))
            scale, shift = head.ada_lin(cond).view(-1, 2, x.shape[2]).unbind(1)
            return residual_norm(x, norm="layer", scale=scale, shift=shift, eps=head.norm_eps, out_dtype=x.dtype)

        def logits(inner: Any, *args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = inner(*args, **kwargs)
            return two_choices(found) if drawing() else found

        if getattr(model, "use_bit_label", False) and hasattr(model, "get_logits"):
            undos.add(replace_method(model, "get_logits", logits))
        if type(levels) is nn.Embedding and hasattr(model, "add_lvl_embeding") and levels.max_norm is None:
            undos.add(replace_method(model, "add_lvl_embeding", add_level))
        if all(hasattr(head, n) for n in ("ada_lin", "norm_eps", "ln_wo_grad")) and isinstance(head.ln_wo_grad, nn.LayerNorm):
            undos.add(replace_method(head, "forward", norm_head))
        return undos


def stack(found: Parts) -> InfinityStack:
    return InfinityStack(found)


def _why_not_block(block: Any) -> str | None:
    missing = [n for n in ("ln_wo_grad", "ca_gamma", "norm_eps", "shared_aln", "drop_path") if not hasattr(block, n)]
    if missing:
        return f"it has no {missing[0]}"
    if block.fused_norm_func is None:
        return "its fused_norm_func is None; that code rotates every scale by the first one's places"
    if not isinstance(block.ln_wo_grad, nn.LayerNorm) or not isinstance(block.ca_norm, nn.LayerNorm):
        return f"its norms are {type(block.ln_wo_grad).__name__} and {type(block.ca_norm).__name__}, want LayerNorm"
    ffn = block.ffn
    if not all(hasattr(ffn, n) for n in ("fc1", "act", "fc2")) or getattr(ffn.act, "approximate", None) != "tanh":
        return f"its ffn is {type(ffn).__name__}, want fc1, GELU (tanh), fc2"
    if getattr(block.ca, "cos_attn", False):
        return "its cross-attention is a cosine one"
    return why_not_all_owned(block.sa, block.ca, block.ffn, ffn.act, block.ca_norm, block.ln_wo_grad)
