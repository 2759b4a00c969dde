"""Small models with the interfaces of Infinity, HART and VAR: their attributes, signatures, layouts, caches and guidance, written
for these tests. What the public code does besides is left out; public_models/ runs the same checks on it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as slow_attn

HEADS, DIM, WIDTH, CODES = 2, 16, 32, 24
SIDES = (1, 2, 3, 4, 6, 8)
ASPECTS = {1.0: tuple((s, s) for s in SIDES), 1.5: ((1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (9, 6))}
CONTEXT = 5


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2).contiguous()


def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None
):
    """Row by row, in fp64."""
    out = torch.empty_like(q)
    ends = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    for a, b, c, d in zip(ends[0][:-1], ends[0][1:], ends[1][:-1], ends[1][1:], strict=True):
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q[a:b].double(), kv[c:d, 0].double()) * softmax_scale, -1)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, kv[c:d, 1].double()).to(q.dtype)
    return out


class Attention(nn.Module):
    """What the three have in common. `flat`: the name of the projection to q, k and v."""

    flat = "mat_qkv"

    def __init__(self, cosine: bool, flash: bool = False, xform: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM
        self.scale = 1 if cosine else 0.25 / math.sqrt(DIM)
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, HEADS, 1, 1), 4.0).log() + 0.3 * torch.randn(1, HEADS, 1, 1))
        self.max_scale_mul = math.log(100)
        self.cosine, self.using_flash, self.using_xform = cosine, flash, xform
        setattr(self, self.flat, nn.Linear(WIDTH, 3 * WIDTH, bias=False))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH) * 0.1), nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.caching, self.cached_k, self.cached_v = False, None, None

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def with_cache(self, x: Tensor, turn: float, bnhd: bool):
        """q of x, k and v of everything so far; `turn` stands for the place that RoPE would put in."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        q, k, v = F.linear(x, getattr(self, self.flat).weight, bias).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        if not bnhd:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        low = v.dtype
        if self.cosine:
            factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            q = F.normalize(q.float(), dim=-1) * (factor.transpose(1, 2) if bnhd else factor)
            k = F.normalize(k.float(), dim=-1)
        k = k * (1 - turn)
        if self.caching:
            axis = 1 if bnhd else 2
            self.cached_k = k if self.cached_k is None else torch.cat((self.cached_k, k), axis)
            self.cached_v = v if self.cached_v is None else torch.cat((self.cached_v, v), axis)
            k, v = self.cached_k, self.cached_v
        return q.to(low), k.to(low), v


class VarAttention(Attention):
    def __init__(self, **options) -> None:
        super().__init__(cosine=True, **options)
        self.attn_l2_norm = True

    def forward(self, x, attn_bias):
        bnhd = self.using_flash or self.using_xform
        q, k, v = self.with_cache(x, 0.0, bnhd)
        if self.using_flash:
            out = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=self.scale).view(x.shape)
        elif self.using_xform:
            out = memory_efficient_attention(q, k, v, attn_bias=attn_bias, p=0.0, scale=self.scale).view(x.shape)
        else:
            out = slow_attn(query=q, key=k, value=v, scale=self.scale, attn_mask=attn_bias, dropout_p=0.0)
            out = out.transpose(1, 2).reshape(x.shape)
        return self.proj(out)


class HartAttention(Attention):
    flat = "qkv_proj"

    def __init__(self, **options) -> None:
        super().__init__(cosine=False, **options)
        self.attn_l2_norm, self.patch_nums, self.context_token = False, SIDES, CONTEXT

    def forward(self, x, attn_bias, si=-1, context_position_ids=None, context_mask=None, m_maskgit=None):
        q, k, v = self.with_cache(x, 0.01 * si, self.using_flash)
        if self.using_flash:
            return self.proj(flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=self.scale).view(x.shape))
        out = slow_attn(query=q, key=k, value=v, scale=self.scale, attn_mask=attn_bias, dropout_p=0.0)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class InfinityAttention(Attention):
    def __init__(self, **options) -> None:
        super().__init__(cosine=True, **options)
        self.cos_attn, self.use_flex_attn = True, False

    def forward(self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0):
        q, k, v = self.with_cache(x, 0.01 * scale_ind, self.using_flash)
        if self.using_flash:
            return self.proj(flash_attn_func(q, k, v, dropout_p=0, softmax_scale=self.scale).view(x.shape))
        if self.use_flex_attn and attn_fn is not None:
            out = attn_fn(q, k, v, scale=self.scale)
        else:
            out = slow_attn(query=q, key=k, value=v, scale=self.scale, attn_mask=attn_bias_or_two_vector, dropout_p=0)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.pool = HEADS, DIM, 1 / math.sqrt(DIM), pool
        self.mat_q, self.mat_kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, q, ca_kv):
        compact, ends, longest = ca_kv
        kv = self.mat_kv(compact).unflatten(-1, (2, HEADS, DIM))
        rows = len(ends) - 1
        q = torch.ones(rows, 1, WIDTH) if self.pool else q
        queries = self.mat_q(q).reshape(-1, HEADS, DIM)
        starts = torch.arange(0, (rows + 1) * q.shape[1], q.shape[1], dtype=torch.int32)
        out = flash_attn_varlen_kvpacked_func(
            q=queries.to(kv.dtype), kv=kv, cu_seqlens_q=starts, cu_seqlens_k=ends, max_seqlen_q=q.shape[1], max_seqlen_k=longest,
            dropout_p=0, softmax_scale=self.scale,
        )  # fmt: skip
        return self.proj(out.reshape(rows, q.shape[1], WIDTH))


class Block(nn.Module):
    def __init__(self, attention: Attention, name: str) -> None:
        super().__init__()
        setattr(self, name, attention)
        self.ffn, self.ln_wo_grad = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.shared_aln, self.disable_aln = False, True

    def rest(self, x, cond_BD):
        return x + torch.tanh(self.ffn(self.ln_wo_grad(x) + cond_BD[:, None]))


class VarBlock(Block):
    def __init__(self, **options) -> None:
        super().__init__(VarAttention(**options), "attn")

    def forward(self, x, cond_BD, attn_bias):
        return self.rest(x + self.attn(self.ln_wo_grad(x), attn_bias=attn_bias), cond_BD)


class HartBlock(Block):
    def __init__(self, **options) -> None:
        super().__init__(HartAttention(**options), "attn")

    def forward(self, x, cond_BD, attn_bias, si=-1, context_position_ids=None, context_mask=None, m_maskgit=None):
        given = {"si": si, "context_position_ids": context_position_ids, "context_mask": context_mask, "m_maskgit": m_maskgit}
        return self.rest(x + self.attn(self.ln_wo_grad(x), attn_bias=attn_bias, **given), cond_BD.mean(1))


class InfinityBlock(Block):
    def __init__(self, **options) -> None:
        super().__init__(InfinityAttention(**options), "sa")
        self.ca, self.ca_norm, self.fused_norm_func = CrossAttention(), nn.LayerNorm(WIDTH), None

    def forward(
        self, x, cond_BD, ca_kv, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0
    ):
        given = (attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid)
        x = x + self.sa(self.ln_wo_grad(x), *given, scale_ind=scale_ind).mul_(0.5)
        return self.rest(x + self.ca(self.ca_norm(x), ca_kv), cond_BD)


class Quantiser(nn.Module):
    """Tokens to a picture in latent space, coarse to fine; also the whole of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(CODES, 4)

    def get_next_autoregressive_input(self, si, scales, f_hat, h_BChw, patch_nums=SIDES):
        f_hat.add_(F.interpolate(h_BChw, size=f_hat.shape[-2:], mode="bicubic"))
        if si == scales - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=(patch_nums[si + 1],) * 2, mode="area")

    def fhat_to_img(self, f_hat):
        return f_hat[:, :3].tanh()


class Model(nn.Module):
    def __init__(self, block: type[Block], layers: int, **options) -> None:
        super().__init__()
        self.made = nn.ModuleList(block(**options) for _ in range(layers))
        self.word_embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, CODES)
        self.start, self.quantiser, self.rng = nn.Parameter(torch.randn(1, 1, WIDTH)), Quantiser(), torch.Generator()
        self.vae_proxy = self.vae_quant_proxy = (self.quantiser,)
        self.register_buffer("places", torch.randn(1, sum(s * s for s in SIDES) * 4, WIDTH) * 0.3)

    def get_logits(self, x, cond_BD):
        return self.head(x + (cond_BD if cond_BD.ndim == 3 else cond_BD[:, None]).mean(1, keepdim=True)).float()

    def tokens(self, logits, rng):
        choice = torch.multinomial(logits.mul_(3).softmax(-1).flatten(0, 1), 1, generator=rng).view(logits.shape[:2])
        return self.quantiser.codes(choice).transpose(1, 2)  # [B, 4, N]

    def embed(self, following, at):
        x = self.word_embed(following.flatten(2).transpose(1, 2))
        return x + self.places[:, at : at + x.shape[1]]


class VarLike(Model):
    def __init__(self, layers: int = 4, **options) -> None:
        super().__init__(VarBlock, layers, **options)
        self.blocks, self.patch_nums, self.class_emb = self.made, SIDES, nn.Embedding(11, WIDTH)
        self.shared_ada_lin = nn.Identity()

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        rng = self.rng.manual_seed(g_seed)
        cond_BD = self.class_emb(torch.cat((label_B, torch.full_like(label_B, 10))))
        f_hat, x, at = torch.zeros(B, 4, SIDES[-1], SIDES[-1]), cond_BD[:, None] + self.start, 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for si, side in enumerate(self.patch_nums):
            of_blocks = self.shared_ada_lin(cond_BD)
            for block in self.blocks:
                x = block(x=x, cond_BD=of_blocks, attn_bias=None)
            logits, t = self.get_logits(x, cond_BD), cfg * si / (len(SIDES) - 1)
            h = self.tokens((1 + t) * logits[:B] - t * logits[B:], rng).reshape(B, 4, side, side)
            f_hat, following = self.quantiser.get_next_autoregressive_input(si, len(SIDES), f_hat, h)
            at += side * side
            x = self.embed(following, at).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)


class HartLike(Model):
    def __init__(self, layers: int = 4, **options) -> None:
        super().__init__(HartBlock, layers, **options)
        self.blocks, self.patch_nums, self.context_token, self.diffloss = self.made, SIDES, CONTEXT, None

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False, context_position_ids=None,
        context_mask=None, final_stage=0, num_maskgit_iters=1,
    ):  # fmt: skip
        rng = self.rng.manual_seed(g_seed)
        x = cond_BD = torch.cat((label_B, torch.zeros_like(label_B)))
        given = {"context_position_ids": context_position_ids.repeat(2, 1), "context_mask": context_mask.repeat(2, 1)}
        f_hat, at = torch.zeros(B, 4, SIDES[-1], SIDES[-1]), CONTEXT
        for block in self.blocks:
            block.attn.kv_caching(True)
        for si, side in enumerate(self.patch_nums):
            rounds = num_maskgit_iters if si == len(SIDES) - 1 else 1
            found = []
            for places in torch.arange(x.shape[1]).chunk(rounds):  # the last grid may come in several rounds
                row, place = torch.meshgrid(torch.arange(2 * B), places, indexing="ij")
                last = {"m_maskgit": (row.flatten(), place.flatten())} if si == len(SIDES) - 1 else {}
                part = x[:, places]
                for block in self.blocks:
                    part = block(x=part, cond_BD=cond_BD, attn_bias=None, si=si, **given, **last)
                logits, t = self.get_logits(part, cond_BD), cfg * si / (len(SIDES) - 1)
                found.append(self.tokens((1 + t) * logits[:B] - t * logits[B:], rng))
            h = torch.cat(found, -1)[..., -side * side :].reshape(B, 4, side, side)
            f_hat, following = self.quantiser.get_next_autoregressive_input(si, len(SIDES), f_hat, h, patch_nums=SIDES)
            at += side * side
            x = self.embed(following, at).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)


class TextPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ca = CrossAttention(pool=True)

    def forward(self, ca_kv):
        return self.ca(None, ca_kv).squeeze(1)


class InfinityLike(Model):
    def __init__(self, layers: int = 4, **options) -> None:
        super().__init__(InfinityBlock, layers, **options)
        self.unregistered_blocks, self.rope2d_freqs_grid = list(self.made), {}
        self.text_proj_for_sos, self.cfg_uncond = TextPool(), nn.Parameter(torch.randn(32, WIDTH))
        self.shared_ada_lin = nn.Identity()

    def add_lvl_embeding(self, feature, scale_ind, scale_schedule, need_to_pad=0):
        return feature

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, vae=None, scale_schedule=None, label_B_or_BLT=None, B=1, g_seed=None, cfg_list=(), trunk_scale=1000, attn_fn=None
    ):
        rng = self.rng.manual_seed(g_seed)
        text, lens, ends, longest = label_B_or_BLT
        guided = any(c != 1 for c in cfg_list)
        if guided:
            text = torch.cat((text, *(self.cfg_uncond[:n] for n in lens)))
            ends = torch.cat((ends, ends[1:] + ends[-1]))
        ca_kv = text, ends, longest
        cond_BD = self.text_proj_for_sos(ca_kv)
        of_blocks = self.shared_ada_lin(cond_BD)
        _, height, width = scale_schedule[-1]
        x, f_hat, at = cond_BD[:, None] + self.start, torch.zeros(B, 4, height, width), 0
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        for si, (_, h, w) in enumerate(scale_schedule):
            if si >= trunk_scale:
                break
            x = self.add_lvl_embeding(x, si, scale_schedule)
            for block in self.unregistered_blocks:
                x = block(
                    x=x, cond_BD=of_blocks, ca_kv=ca_kv, attn_bias_or_two_vector=None, attn_fn=attn_fn,
                    scale_schedule=scale_schedule, rope2d_freqs_grid=self.rope2d_freqs_grid, scale_ind=si,
                )  # fmt: skip
            if cfg_list[si] != 1:
                logits = self.get_logits(x, cond_BD)
                logits = cfg_list[si] * logits[:B] + (1 - cfg_list[si]) * logits[B:]
            else:
                logits = self.get_logits(x[:B], cond_BD[:B])
            f_hat = f_hat + F.interpolate(self.tokens(logits, rng).reshape(B, 4, h, w), size=(height, width), mode="bicubic")
            at += h * w
            if si + 1 < len(scale_schedule):
                x = self.embed(F.interpolate(f_hat, size=scale_schedule[si + 1][1:], mode="area"), at).repeat(1 + guided, 1, 1)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)
        return self.quantiser.fhat_to_img(f_hat)


def autocast(dtype: str):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")


class Driven:
    """See adapter_checks."""

    def __init__(self, model: Model, dtype: str = "fp32") -> None:
        self.model, self.dtype, self.globals = model.requires_grad_(False).eval(), dtype, globals()
        self.blocks = model.made

    def grids(self):
        return [(s, s) for s in SIDES[isinstance(self.model, HartLike) :]]


class Var(Driven):
    name = "var"

    def __init__(self, dtype: str = "fp32", **options) -> None:
        torch.manual_seed(0)
        super().__init__(VarLike(**options), dtype)

    def sample(self, batch: int = 1, cfg: float = 1.5):
        with autocast(self.dtype):
            return self.model.autoregressive_infer_cfg(batch, torch.arange(batch), g_seed=1, cfg=cfg)


class Hart(Driven):
    name = "hart"

    def __init__(self, dtype: str = "fp32", **options) -> None:
        torch.manual_seed(0)
        super().__init__(HartLike(**options), dtype)

    def sample(self, batch: int = 1, cfg: float = 1.5, rounds: int = 1):
        context = torch.randn(batch, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(3))
        mask = torch.ones(batch, CONTEXT, dtype=torch.long)
        with autocast(self.dtype):
            return self.model.autoregressive_infer_cfg(
                B=batch, label_B=context, g_seed=1, cfg=cfg, context_position_ids=mask.cumsum(1) - 1, context_mask=mask,
                num_maskgit_iters=rounds,
            )  # fmt: skip


class Infinity(Driven):
    name = "infinity"

    def __init__(self, dtype: str = "fp32", **options) -> None:
        torch.manual_seed(0)
        super().__init__(InfinityLike(**options), dtype)

    def grids(self, aspect: float = 1.0):
        return list(ASPECTS[aspect])

    def sample(self, batch: int = 1, aspect: float = 1.0, cfg=3.0, **more):
        schedule = [(1, h, w) for h, w in ASPECTS[aspect]]
        lens = [4 + 3 * row for row in range(batch)]
        made = torch.randn(sum(lens), WIDTH, generator=torch.Generator().manual_seed(3), device="cpu")
        text = made.to(torch.get_default_device())
        ends = torch.tensor([sum(lens[:row]) for row in range(batch + 1)], dtype=torch.int32)
        cfgs = cfg if isinstance(cfg, list) else [cfg] * len(schedule)
        with autocast(self.dtype):
            return self.model.autoregressive_infer_cfg(
                scale_schedule=schedule, label_B_or_BLT=(text, lens, ends, max(lens)), B=batch, g_seed=1, cfg_list=cfgs, **more
            )
