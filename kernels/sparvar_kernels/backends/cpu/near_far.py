"""Heads that read keys and means on a plain CPU.

All query tiles read the same means and the same small grids, so these are one product without a gather, in which each tile
hides the cells that it has near; the keys of those are gathered tile by tile. Both share one softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparvar_kernels.backends.configs import CpuConfig
from sparvar_kernels.backends.cpu.gathered import LOG2_E
from sparvar_kernels.backends.dense import SAFE_LOGIT, dense_heads
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants import NearFar
from sparvar_kernels.variants.near_far.planner import NearAndFar, cells_of, near_far_parts
from sparvar_kernels.variants.pooled.planner import grid_means


def near_far_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, heads: tuple[int, ...], variant: NearFar, out: Tensor,
    config: CpuConfig,
) -> None:  # fmt: skip
    """Writes out[:, heads] of out [B, H, Nq, D]; q [B, H, Nq, D], k, v [B, H, Nk, D]. Means are made in fp32."""
    parts = near_far_parts(problem.schedule, problem.scale_index, variant)
    if parts.near is None:
        dense_heads(q, k, v, problem, heads, out)
        return
    chosen, work = list(heads), torch.float64 if q.dtype == torch.float64 else torch.float32
    cells = cells_of(problem.schedule, problem.scale_index, variant)
    keys, values, biases = zip(*grid_means(q[:, chosen], k[:, chosen], v[:, chosen], problem, cells), strict=True)
    nothing = torch.zeros(len(parts.whole), dtype=work)
    for b in range(q.shape[0]):
        for i, h in enumerate(heads):
            common_k = torch.cat([k[b, h].index_select(0, parts.whole), *(t[b, i] for t in keys)]).to(work)
            common_v = torch.cat([v[b, h].index_select(0, parts.whole), *(t[b, i] for t in values)]).to(work)
            bias = torch.cat([nothing, *(t[b, i] for t in biases)])
            bounded = problem.logit_bound is not None and problem.logit_bound + float(bias.max()) <= SAFE_LOGIT
            added = torch.add(parts.hidden, bias * LOG2_E)
            queries = q[b, h].to(work) * (problem.softmax_scale * LOG2_E)
            out[b, h] = _head(queries, k[b, h], v[b, h], common_k, common_v, added, parts, bounded, config).to(out.dtype)


def _head(
    q: Tensor, k: Tensor, v: Tensor, common_k: Tensor, common_v: Tensor, added: Tensor, parts: NearAndFar, bounded: bool,
    config: CpuConfig,
) -> Tensor:  # fmt: skip
    """[Nq, D] of one head: q [Nq, D], which carries the softmax's factor, k and v [Nk, D], common [C, D], added [T, C]."""
    assert parts.near is not None
    lists, (common, dim) = parts.near, common_k.shape
    (many, each), width = lists.tiles.rows.shape, lists.keys.shape[-1]
    step = min(many, max(1, config.score_elements // (each * (width + common))))
    near_k, near_v = (torch.empty(step * width, dim, dtype=k.dtype) for _ in range(2))
    near_s, common_s = q.new_empty(step, each, width), q.new_empty(step * each, common)
    tiled = q.index_select(0, lists.tiles.rows.flatten())
    out = torch.empty_like(tiled)
    for t in range(0, many, step):
        n = min(step, many - t)
        listed, mine = lists.keys[0, 0, t : t + n].reshape(-1), slice(t * each, (t + n) * each)
        near, far = near_s[:n], common_s[: n * each]
        near_keys, near_values = (
            torch.index_select(x, 0, listed, out=buffer[: n * width]).view(n, width, dim).to(q.dtype)
            for x, buffer in ((k, near_k), (v, near_v))
        )
        torch.bmm(tiled[mine].view(n, each, dim), near_keys.transpose(1, 2), out=near)
        torch.mm(tiled[mine], common_k.t(), out=far)
        by_tile = far.view(n, each, common)
        by_tile.add_(added[t : t + n, None])
        if parts.unlisted is not None:
            near.add_(parts.unlisted[t : t + n, None])
        if not bounded:
            top = torch.maximum(near.amax(-1, keepdim=True), by_tile.amax(-1, keepdim=True))
            near.sub_(top)
            by_tile.sub_(top)
        total = near.exp2_().sum(-1, keepdim=True).add_(by_tile.exp2_().sum(-1, keepdim=True))
        part = out[mine]
        torch.bmm(near, near_values, out=part.view(n, each, dim))
        part.addmm_(far, common_v).div_(total.view(-1, 1))
    return out.index_select(0, lists.tiles.inverse)
