"""FLOPs and bytes of a step, from the arguments of its call: two products over the keys that are read, each operand moved once.

Each function takes a call's arguments and returns what computes the answer later: lists may lie on a GPU, and nobody shall wait
for it inside a traced run. Tensors are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import DTYPES, AttentionProblem
from sparvar_kernels.variants import NearFar, Pooled
from sparvar_kernels.variants.lists import KeyLists
from sparvar_kernels.variants.pooled.planner import num_keys
from sparvar_tune.tracing.ranges import Work

Later = Callable[[], Work]


def _known(flops: float, moved: float) -> Later:
    return lambda: Work(flops, moved)


def _attention(q: Tensor, heads: int, keys: int, read: int) -> Later:
    """Every query against `keys` keys, of which `read` rows of K and of V come from memory."""
    batch, _, queries, dim = q.shape
    return _known(4.0 * batch * heads * queries * keys * dim, 2.0 * batch * heads * (queries + read) * dim * q.element_size())


def dense_call(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Later:
    """Attention of every head: q [B, H, Nq, D], k and v [B, H, Nk, D]."""
    return _attention(q, q.shape[1], k.shape[2], k.shape[2])


def dense_heads(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, heads: Sequence[int], out: Tensor) -> Later:
    return _attention(q, len(heads), k.shape[2], k.shape[2])


def pooled_heads(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, heads: Sequence[int], variant: Pooled, out: Tensor
) -> Later:
    """Means are made of every key; the products are over the means."""
    return _attention(q, len(heads), num_keys(problem.schedule, problem.scale_index, variant), k.shape[2])


def near_far_heads(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, heads: Sequence[int], variant: NearFar, out: Tensor, *_: Any
) -> Later:
    """Means are made of every key; the products are over what each tile's list holds."""
    batch, many, queries, dim = q.shape[0], len(heads), q.shape[2], q.shape[-1]
    moved = 2.0 * batch * many * (queries + k.shape[2]) * dim * q.element_size()

    def later() -> Work:
        lists = variant.lists(problem.schedule, problem.scale_index, "cpu")
        return Work(4.0 * dim * batch * many * float((lists.lengths[0, 0] * lists.tiles.counts).sum()), moved)

    return later


def gathered_lists(
    q: Tensor, k: Tensor, v: Tensor, lists: KeyLists, heads: Sequence[int], out: Tensor, *_: Any
) -> Later:  # fmt: skip
    """Attention over lists; what several tiles of a head list is moved once."""
    batch, dim, size = q.shape[0], q.shape[-1], q.element_size()
    many, keys = len(heads), k.shape[2]

    def later() -> Work:
        tiles, counts = lists.tiles.counts.double().cpu(), lists.lengths.cpu()
        rows_b, rows_h, _, width = lists.keys.shape
        shared = batch / rows_b * many / rows_h  # heads and images that share a list
        pairs = float((counts * tiles).sum()) * shared
        valid = torch.arange(width) < counts.unsqueeze(-1)
        listed = lists.keys.cpu().long().masked_fill(~valid, keys).flatten(2)  # what only fills a list: one place behind all
        seen = torch.zeros(rows_b, rows_h, keys + 1, dtype=torch.bool).scatter_(2, listed, True)[..., :keys]
        return Work(4.0 * dim * pairs, 2.0 * size * dim * (float(tiles.sum()) * batch * many + float(seen.sum()) * shared))

    return later


def gathered_stage(gather: Any, *_: Any, **__: Any) -> Later:
    """One launch of a GPU's kernel over a stage's table and lists."""
    return lambda: stage_work(gather.stage, gather.problem)


def stage_work(stage: Any, problem: AttentionProblem) -> Work:
    """What the sparse heads of a stage must spend: two products over each list; q, out and every listed K and V row once."""
    from sparvar_kernels.backends.triton.table import Column

    row = problem.head_dim * torch.empty((), dtype=DTYPES[problem.dtype]).element_size()
    table = stage.table.cpu().long()
    count, rows = table[:, Column.COUNT], table[:, Column.END_ROW] - table[:, Column.FIRST_ROW]
    flops = 4.0 * problem.head_dim * float((rows * count).sum()) * problem.batch
    moved = 2.0 * float(rows.sum()) * problem.batch * row
    keys, known = stage.keys.cpu().long(), dict[tuple[tuple[int, int], ...], int]()
    for b in range(problem.batch):
        for head in table[:, Column.HEAD].unique().tolist():
            mine = table[table[:, Column.HEAD] == head]
            at = mine[:, Column.LIST_AT] + b * mine[:, Column.LIST_STEP]
            lists = tuple(sorted(set(zip(at.tolist(), mine[:, Column.COUNT].tolist(), strict=True))))
            if lists not in known:  # heads that share lists share the count
                known[lists] = len(torch.cat([keys[at : at + count] for at, count in lists]).unique())
            moved += 2.0 * known[lists] * row
    return Work(flops, moved)


def added_linear(stream: Tensor, x: Tensor, weight: Tensor) -> Later:
    """x [B, L, in] times weights [B, out, in], added to a stream [B, L, out] that is read and written."""
    moved = x.numel() * x.element_size() + weight.numel() * weight.element_size() + 2 * stream.numel() * stream.element_size()
    return _known(2.0 * stream.numel() * x.shape[-1], float(moved))


def linear(module: Any, x: Tensor) -> Later:
    """x [..., in] times a weight [out, in]."""
    rows, (outs, ins) = x.numel() // x.shape[-1], module.weight.shape
    return _known(2.0 * rows * ins * outs, float(rows * ins + ins * outs + rows * outs) * x.element_size())
