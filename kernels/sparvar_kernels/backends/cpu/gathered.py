"""Gathered attention on a plain CPU: each query tile against its own list of keys.

For a few tiles at a time the listed keys and values are copied side by side (`index_select` into buffers that are used
again) and two batched matrix products with a softmax between them run while everything is still in cache. When the
problem bounds its logits the running maximum, and with it a pass over the scores, is left out. PyTorch raises 2 to the scores
in half the time that it takes for e, so the queries carry log2(e).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparvar_kernels.backends.configs import CpuConfig
from sparvar_kernels.backends.dense import SAFE_LOGIT
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.lists import KeyLists

LOG2_E = math.log2(math.e)


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: KeyLists, heads: Sequence[int], out: Tensor,
    problem: AttentionProblem, config: CpuConfig,
) -> None:  # fmt: skip
    """Writes out[:, heads] of out [B, H, Nq, D]; q [B, H, Nq, D], k, v [B, H, Nk, D]; lists' head axis follows `heads`."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, inverse = lists.tiles.rows, lists.tiles.inverse
    num_tiles, each = rows.shape
    width, dim = lists.keys.shape[-1], q.shape[-1]
    step = min(num_tiles, max(1, config.score_elements // (each * width)))
    gathered_k, gathered_v = (torch.empty(step * width, dim, dtype=k.dtype, device=k.device) for _ in range(2))
    scores = torch.empty(step, each, width, dtype=work, device=k.device)
    tiled = torch.empty(num_tiles, each, dim, dtype=work, device=k.device)
    bounded = problem.logit_bound is not None and problem.logit_bound <= SAFE_LOGIT
    flat_rows = rows.flatten()
    for b in range(q.shape[0]):
        for i, h in enumerate(heads):
            at = (min(b, lists.keys.shape[0] - 1), min(i, lists.keys.shape[1] - 1))
            keys = lists.keys[at]
            counts = None if lists.counts is None else lists.counts[at].tolist()
            queries = q[b, h].to(work).index_select(0, flat_rows).view(num_tiles, each, dim)
            queries = queries.mul_(problem.softmax_scale * LOG2_E)
            for t in range(0, num_tiles, step):
                n = min(step, num_tiles - t)
                listed = keys[t : t + n].reshape(-1)
                near_k, near_v, s = gathered_k[: n * width], gathered_v[: n * width], scores[:n]
                torch.index_select(k[b, h], 0, listed, out=near_k)
                torch.index_select(v[b, h], 0, listed, out=near_v)
                torch.bmm(queries[t : t + n], near_k.view(n, width, dim).to(work).transpose(1, 2), out=s)
                if counts is not None:  # keys that only fill a list must have no influence, on the maximum either
                    for j, count in enumerate(counts[t : t + n]):
                        s[j, :, count:] = -math.inf
                        near_v[j * width + count : (j + 1) * width] = 0  # 0 times what may be NaN
                if not bounded:
                    s.sub_(s.amax(-1, keepdim=True))
                s.exp2_()
                total = s.sum(-1, keepdim=True)
                torch.bmm(s, near_v.view(n, width, dim).to(work), out=tiled[t : t + n])
                tiled[t : t + n].div_(total)
            out[b, h] = tiled.view(-1, dim).index_select(0, inverse).to(out.dtype)
