"""VAR's and HART's look-alikes with whole blocks: AdaLN or RMSNorm, rotated places, GELU or SwiGLU, in plain operations.

lookalikes.py has what attention adapters need; this adds what the fused path takes over, so that the model itself is the oracle.
"""

from __future__ import annotations

import lookalikes
import torch
import torch.nn.functional as F
from block_lookalikes import Mlp
from lookalikes import CONTEXT, DIM, HEADS, SIDES, WIDTH, HartLike, VarLike
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as slow_attn


class WholeVarBlock(nn.Module):
    def __init__(self, shared: bool = False, **options) -> None:
        super().__init__()
        self.attn, self.ffn, self.shared_aln = lookalikes.VarAttention(**options), Mlp(), shared
        self.ln_wo_grad = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, WIDTH) * 0.3)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, cond_BD, attn_bias):
        six = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, WIDTH)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        x = x + self.attn(self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1), attn_bias=attn_bias).mul_(gamma1)
        return x + self.ffn(self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)).mul(gamma2)


class WholeVar(VarLike):
    def __init__(self, layers: int = 3, shared: bool = False, **options) -> None:
        super().__init__(layers, **options)
        self.blocks = self.made = nn.ModuleList(WholeVarBlock(shared, **options) for _ in range(layers))
        self.start.data *= 0.3
        if shared:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH), nn.Unflatten(1, (1, 6, WIDTH)))


class LlamaRMSNormFused(nn.Module):
    """The name is what the path goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.use_quant = nn.Parameter(torch.rand(WIDTH) + 0.5), 1e-6, False

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class Rotary(nn.Module):
    """Places [B, L] on a line, or [B, L, 2] in a plane: then half of the channels turns by the row, half by the column."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, DIM, 2 * axes) / DIM), persistent=False)

    def forward(self, x, position_ids):
        places = position_ids.float().view(*position_ids.shape[:2], -1, 1)
        angles = torch.cat((places * self.inv_freq,) * 2, -1).flatten(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class WholeHartAttention(lookalikes.HartAttention):
    def __init__(self, cosine: bool = False, **options) -> None:
        super().__init__(**options)
        self.attn_l2_norm, self.scale = cosine, 1 if cosine else self.scale
        self.rotary_emb, self.context_rotary_emb = Rotary(2), Rotary(1)

    def turned(self, t: Tensor, si: int, text: Tensor, m_maskgit) -> Tensor:
        if si == 0:
            cos, sin = self.context_rotary_emb(t, text)
        else:
            side = SIDES[si]
            places = torch.tensor([[y / side * SIDES[-1], x / side * SIDES[-1]] for y in range(side) for x in range(side)])
            places = places.expand(len(text), -1, -1)
            if m_maskgit is not None:
                places = places[m_maskgit].view(len(text), -1, 2)
            cos, sin = self.rotary_emb(t, places + text[:, -1, None, None])
        a, b = t.chunk(2, -1)
        return t * cos.unsqueeze(2) + torch.cat((-b, a), -1) * sin.unsqueeze(2)

    def forward(self, x, attn_bias, si=-1, context_position_ids=None, context_mask=None, m_maskgit=None):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        q, k, v = F.linear(x, self.qkv_proj.weight, bias).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        if self.attn_l2_norm:
            q, k = (F.normalize(t, dim=-1) for t in (q, k))
            q = q * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp().transpose(1, 2)
        q, k = (self.turned(t, si, context_position_ids, m_maskgit) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.caching:
            self.cached_k = k if self.cached_k is None else torch.cat((self.cached_k, k), 2)
            self.cached_v = v if self.cached_v is None else torch.cat((self.cached_v, v), 2)
            k, v = self.cached_k, self.cached_v
        out = slow_attn(query=q, key=k, value=v, scale=self.scale, attn_mask=attn_bias, dropout_p=0.0)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(3 * WIDTH, WIDTH, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class WholeHartBlock(nn.Module):
    def __init__(self, cosine: bool = False, **options) -> None:
        super().__init__()
        self.attn, self.ffn, self.ln_wo_grad = WholeHartAttention(cosine, **options), SwiGlu(), LlamaRMSNormFused()
        self.disable_aln, self.shared_aln, self.cross_attn = True, False, None

    def forward(self, x, cond_BD, attn_bias, si=-1, context_position_ids=None, context_mask=None, m_maskgit=None):
        given = {"si": si, "context_position_ids": context_position_ids, "context_mask": context_mask, "m_maskgit": m_maskgit}
        x = x + self.attn(self.ln_wo_grad(x), attn_bias=attn_bias, **given)
        return x + self.ffn(self.ln_wo_grad(x))


class WholeHart(HartLike):
    """stream: dtype of what goes into the blocks."""

    def __init__(self, layers: int = 3, stream: torch.dtype = torch.float32, cosine: bool = False, **options) -> None:
        super().__init__(layers, **options)
        self.blocks = self.made = nn.ModuleList(WholeHartBlock(cosine, **options) for _ in range(layers))
        self.stream = stream

    def embed(self, following, at):
        return super().embed(following, at).to(self.stream)


class Var(lookalikes.Var):
    """See adapter_checks."""

    def __init__(self, dtype: str = "fp32", **options) -> None:
        torch.manual_seed(0)
        super(lookalikes.Var, self).__init__(WholeVar(**options), dtype)


class Hart(lookalikes.Hart):
    """See adapter_checks. Prompts are of unequal lengths, so rows turn by unequal places; in bf16 the stream is bf16, too."""

    def __init__(self, dtype: str = "fp32", **options) -> None:
        torch.manual_seed(0)
        stream = torch.bfloat16 if dtype == "bf16" else torch.float32
        super(lookalikes.Hart, self).__init__(WholeHart(stream=stream, **options), dtype)
        self.globals = globals()

    def sample(self, batch: int = 1, cfg: float = 1.5, rounds: int = 1):
        mask = torch.ones(batch, CONTEXT, dtype=torch.long)
        context = torch.randn(batch, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(3), device="cpu")
        context = context.to(mask.device, self.model.stream)
        for row in range(batch):
            mask[row, CONTEXT - 1 - row :] = 0
        with lookalikes.autocast(self.dtype):
            return self.model.autoregressive_infer_cfg(
                B=batch, label_B=context, g_seed=1, cfg=cfg, context_position_ids=mask.cumsum(1) - 1, context_mask=mask,
                num_maskgit_iters=rounds,
            )  # fmt: skip
