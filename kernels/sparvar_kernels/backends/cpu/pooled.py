"""Pooled heads on a plain CPU: dense attention over the means that the planner makes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.backends.dense import head_runs
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants import Pooled
from sparvar_kernels.variants.pooled.planner import pool_keys


def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, heads: tuple[int, ...], variant: Pooled, out: Tensor
) -> None:
    """Writes out[:, heads] of out [B, H, Nq, D]; q [B, H, Nq, D], k, v [B, H, Nk, D]. Pooling is done in fp32."""
    for begin, end in head_runs(heads):
        part = slice(begin, end)
        keys, values, bias = pool_keys(q[:, part], k[:, part], v[:, part], problem, variant)
        mask = bias.unsqueeze(2).expand(-1, -1, q.shape[2], -1)  # the same row for every query: no copy
        # in the bias' own precision: up to 66, half precision would keep a quarter of a unit of it
        own = q[:, part].to(bias.dtype), keys.to(bias.dtype), values.to(bias.dtype)
        out[:, part] = F.scaled_dot_product_attention(*own, attn_mask=mask, scale=problem.softmax_scale).to(out.dtype)
