"""Infinity's look-alike with whole blocks (AdaLN, rotated cosine attention, text, MLP), in plain operations.

lookalikes.py has what attention adapters need; this adds what the fused path takes over, so that the model itself is the oracle.
"""

from __future__ import annotations

import lookalikes
import torch
import torch.nn.functional as F
from lookalikes import DIM, HEADS, WIDTH, InfinityLike
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as slow_attn


def turn(t: Tensor, table: Tensor) -> Tensor:
    """t [B, H, L, D] turned by (cos, sin) [2, 1 or B, 1, L, D / 2], as complex numbers."""
    whole = torch.view_as_complex(t.double().unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*table.double())
    return torch.view_as_real(whole).flatten(-2).to(t.dtype)


class WholeAttention(lookalikes.InfinityAttention):
    def forward(self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q.float(), dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        start = sum(t * h * w for t, h, w in scale_schedule[:scale_ind])
        table = rope2d_freqs_grid[str(tuple(scale_schedule))][:, 0, :, :, start : start + x.shape[1]]
        q, k = turn(q, table), turn(F.normalize(k.float(), dim=-1), table)
        if self.caching:
            self.cached_k = k if self.cached_k is None else torch.cat((self.cached_k, k), 2)
            self.cached_v = v if self.cached_v is None else torch.cat((self.cached_v, v), 2)
            k, v = self.cached_k, self.cached_v
        out = slow_attn(query=q.to(v.dtype), key=k.to(v.dtype), value=v, scale=self.scale, attn_mask=None, dropout_p=0)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class WholeCross(lookalikes.CrossAttention):
    """Of its parent, with the bias of values apart, as the public code has it; in fp32 it does not cast to bf16."""

    cos_attn = False

    def __init__(self, pool: bool = False) -> None:
        super().__init__(pool)
        self.mat_kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.v_bias = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))

    def forward(self, q, ca_kv):
        compact, ends, _ = ca_kv
        kv = F.linear(compact, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias))).unflatten(-1, (2, HEADS, DIM))
        rows = []
        for b, (begin, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
            query = self.mat_q(torch.ones(1, WIDTH) if self.pool else q[b]).unflatten(-1, (HEADS, DIM))
            weights = torch.softmax(torch.einsum("qhd,khd->hqk", query, kv[begin:end, 0]) * self.scale, -1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, kv[begin:end, 1]).flatten(1))
        return self.proj(torch.stack(rows))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def ada_norm(C, eps, x, scale, shift):
    return F.layer_norm(x.float(), (C,), eps=eps) * (1 + scale) + shift


class WholeBlock(nn.Module):
    def __init__(self, **_options) -> None:
        super().__init__()
        self.sa, self.ca, self.ffn = WholeAttention(), WholeCross(), Mlp()
        self.ln_wo_grad, self.ca_norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False), nn.LayerNorm(WIDTH, eps=1e-6)
        nn.init.normal_(self.ca_norm.weight, 1, 0.2)
        nn.init.normal_(self.ca_norm.bias, 0, 0.2)
        self.ada_gss, self.ca_gamma = nn.Parameter(torch.randn(1, 1, 6, WIDTH) * 0.3), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.fused_norm_func, self.norm_eps, self.shared_aln, self.drop_path = ada_norm, 1e-6, True, nn.Identity()

    def forward(
        self, x, cond_BD, ca_kv, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0
    ):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada_gss + cond_BD).unbind(2)
        given = (attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid)
        x = x + self.sa(ada_norm(WIDTH, 1e-6, x, scale1, shift1), *given, scale_ind=scale_ind).mul_(gamma1)
        x = x + self.ca(self.ca_norm(x), ca_kv) * self.ca_gamma
        return x + self.ffn(ada_norm(WIDTH, 1e-6, x, scale2, shift2)) * gamma2


class HeadNorm(nn.Module):
    """AdaLN before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.ada_lin, self.norm_eps = nn.Linear(WIDTH, 2 * WIDTH), 1e-6
        self.ln_wo_grad = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)

    def forward(self, x_BLC, cond_BD):
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, WIDTH).unbind(2)
        return ada_norm(WIDTH, 1e-6, x_BLC, scale, shift)


class WholeInfinity(InfinityLike):
    """An InfinityLike of whole blocks."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__(layers)
        self.made = nn.ModuleList(WholeBlock() for _ in range(layers))
        self.unregistered_blocks, self.text_proj_for_sos = list(self.made), lookalikes.TextPool()
        self.text_proj_for_sos.ca = WholeCross(pool=True)
        for grids in lookalikes.ASPECTS.values():
            angles = torch.rand(sum(h * w for h, w in grids), DIM // 2) * 6
            table = torch.stack((angles.cos(), angles.sin()))[:, None, None, None]
            self.rope2d_freqs_grid[str(tuple((1, h, w) for h, w in grids))] = table
        self.start.data *= 0.3
        self.shared_ada_lin = nn.Sequential(nn.Linear(WIDTH, 6 * WIDTH), nn.Unflatten(1, (1, 6, WIDTH)))
        self.lvl_embed, self.head_nm = nn.Embedding(8, WIDTH), HeadNorm()

    def add_lvl_embeding(self, feature, scale_ind, scale_schedule, need_to_pad=0):
        _, height, width = scale_schedule[scale_ind]
        places = scale_ind * torch.ones((feature.shape[0], height * width), dtype=torch.int)
        feature[:, : height * width] += self.lvl_embed(places.to(feature.device))
        return feature

    def get_logits(self, x, cond_BD):
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.head_nm(x.float(), cond_BD.float())).float()


class Infinity(lookalikes.Infinity):
    """See adapter_checks."""

    def __init__(self, dtype: str = "fp32", **options) -> None:
        torch.manual_seed(0)
        super(lookalikes.Infinity, self).__init__(WholeInfinity(**options), dtype)
        self.globals = globals()
