"""Dense attention: the baseline every speed-up is quoted against, and the decision scale's pass with column mass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.problem import AttentionProblem
from sparvar_kernels.scales import Tile, partition

# Largest logit for which exp() without subtracting the maximum stays exact in fp32: sums over 2**17 keys of e**60
# stay below 3e38 and e**-60 relative to the largest term is far below fp32 resolution.
SAFE_LOGIT = 60.0
SCORE_ELEMENTS = 1 << 18  # scores held at once on a CPU: 1 MiB of fp32; best of 2**16..2**21 (27 ms against 31..121)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
    """PyTorch's scaled_dot_product_attention (its own choice of backend): [B, H, Nq, D]."""
    return F.scaled_dot_product_attention(q, k, v, scale=problem.softmax_scale)


def dense_heads(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, heads: Sequence[int], out: Tensor) -> None:
    """Dense attention of the named heads into out [B, H, Nq, D]; runs of neighbouring heads are views, not copies."""
    for begin, end in head_runs(heads):
        part = slice(begin, end)
        out[:, part] = dense_attention(q[:, part], k[:, part], v[:, part], problem)


def head_runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """[begin, end) of each run of neighbouring heads."""
    runs: list[tuple[int, int]] = []
    for h in heads:
        if runs and runs[-1][1] == h:
            runs[-1] = (runs[-1][0], h + 1)
        else:
            runs.append((h, h + 1))
    return runs


def column_mass(q: Tensor, k: Tensor, problem: AttentionProblem, heads: Sequence[int], tile: Tile, sample: int) -> Tensor:
    """[B, len(heads), T, Nk] fp32: softmax probability of each key summed over every `sample`-th query of each tile.

    CS4A's importance (paper section 3.2). Tiles are worked in groups small enough for the scores to stay in cache.
    """
    tiles = partition(problem.grid, tile, str(q.device))
    rows = tiles.rows[:, ::sample]  # [T, Q']; short tiles repeat their first query, which only re-weights within them
    num_tiles, each = rows.shape
    mass = torch.empty(q.shape[0], len(heads), num_tiles, k.shape[2], dtype=torch.float32, device=q.device)
    step = max(1, SCORE_ELEMENTS // (each * k.shape[2])) if q.device.type == "cpu" else num_tiles
    bounded = problem.logit_bound is not None and problem.logit_bound <= SAFE_LOGIT
    for b in range(q.shape[0]):
        for i, h in enumerate(heads):
            queries = q[b, h].float().index_select(0, rows.flatten()).mul_(problem.softmax_scale)
            keys = k[b, h].float().T
            for t in range(0, num_tiles, step):
                scores = queries[t * each : (t + step) * each] @ keys  # [C * Q', Nk]
                if not bounded:
                    scores -= scores.amax(-1, keepdim=True)
                scores.exp_()
                weight = scores.sum(-1).reciprocal_().view(-1, 1, each)
                torch.bmm(weight, scores.view(-1, each, scores.shape[-1]), out=mass[b, i, t : t + step].unsqueeze(1))
    return mass
