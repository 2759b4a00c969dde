"""Attention by others, to be timed beside ours: dense and sparse, each where it is installed.

PyTorch brings FlashAttention-2, cuDNN, its memory-efficient attention and FlexAttention. FlashAttention-3 (package fa3-fwd)
and FlashInfer are taken where they can be imported; neither is needed for anything else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sparvar_kernels.backends.triton.work import Stage
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import Tile
from sparvar_kernels.variants import Csla
from sparvar_kernels.variants.csla.planner import csla_lists
from sparvar_tune.policy_search.menu import paper_windows

Way = Callable[[], object]
WORKSPACE_BYTES = 256 << 20  # FlashInfer's own, as its manual says


def dense_ways(problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Way]:
    """Dense attention by name. In fp32 only PyTorch's memory-efficient attention is left."""
    scale, aten = problem.softmax_scale, torch.ops.aten
    if problem.dtype == "fp32":
        efficient = aten._scaled_dot_product_efficient_attention
        return {"efficient": lambda: efficient(q, k, v, None, False, 0.0, False, scale=scale)}
    ways: dict[str, Way] = {
        "FA2": lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale),
        "cuDNN": lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, False, False, scale=scale),
    }
    if problem.dtype == "bf16" and importlib.util.find_spec("fa3_fwd_interface"):  # that build has no fp16
        from fa3_fwd_interface import flash_attn_func

        rows = [t.transpose(1, 2).contiguous() for t in (q, k, v)]  # the layout it likes; not counted
        ways["FA3"] = lambda: flash_attn_func(*rows, softmax_scale=scale)
    return ways


def flex128(problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor) -> Way:
    """The paper's CSLA: FlexAttention over the 128 x 128 blocks its rule touches, each attended whole."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    variant = Csla(paper_windows(problem.schedule), 5, Tile(0, 128), "block128")
    lists = csla_lists(problem.schedule, problem.scale_index, variant)
    touched = torch.zeros(lists.keys.shape[2], -(-problem.num_keys // 128), dtype=torch.bool)
    touched.scatter_(1, (lists.keys[0, 0] // 128).long(), True)
    counts = touched.sum(-1).int()
    order = torch.argsort(touched.int(), dim=-1, descending=True, stable=True).int()
    full = (counts[None, None].cuda(), order[None, None].contiguous().cuda())
    none = (torch.zeros_like(full[0]), torch.zeros_like(full[1]))
    lengths = (problem.num_queries, problem.num_keys)
    mask = BlockMask.from_kv_blocks(*none, *full, BLOCK_SIZE=(128, 128), seq_lengths=lengths)
    compiled = torch.compile(flex_attention, dynamic=False)  # its autotuning takes 20 s and picks by other inputs
    return lambda: compiled(q, k, v, block_mask=mask, scale=problem.softmax_scale)


def flashinfer_lists(stage: Stage, problem: AttentionProblem, q: Tensor, k: Tensor, v: Tensor, ours: Tensor) -> Way | None:
    """FlashInfer over the lists of `stage`, every key a page and every block of query rows a request; None without it.

    Its plan, and putting queries in the order of blocks, are not counted. Raises ValueError where it disagrees with `ours`.
    """
    if not importlib.util.find_spec("flashinfer"):
        return None
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    table, device = stage.table.cpu().long(), q.device
    rows, pages, ends_q, ends_k = [], [], [0], [0]
    keys = stage.keys.cpu().long()
    for b in range(problem.batch):
        for head, origin, width, first, end, at, step, count in table[:, :8].tolist():
            m = torch.arange(first, end)
            of_head = b * problem.heads + head
            rows.append(of_head * problem.num_queries + origin + m // width * problem.grid[1] + m % width)
            pages.append(of_head * problem.num_keys + keys[at + b * step : at + b * step + count])
            ends_q.append(ends_q[-1] + end - first)
            ends_k.append(ends_k[-1] + count)
    order, dim = torch.cat(rows).to(device), problem.head_dim
    queries = q.reshape(-1, 1, dim)[order].contiguous()
    cache = k.reshape(-1, 1, 1, dim), v.reshape(-1, 1, 1, dim)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD", backend="fa3"
    )
    wrapper.plan(
        torch.tensor(ends_q, dtype=torch.int32, device=device), torch.tensor(ends_k, dtype=torch.int32, device=device),
        torch.cat(pages).int().to(device), torch.ones(len(pages), dtype=torch.int32, device=device), 1, 1, dim, 1,
        causal=False, sm_scale=problem.softmax_scale, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    found = wrapper.run(queries, cache).reshape(-1, dim).float()
    want = ours.reshape(-1, dim)[order].float()
    error = float((found - want).norm() / want.norm())
    if not error < 0.02:
        raise ValueError(f"FlashInfer is {error:.2e} away from what it should compute")
    return lambda: wrapper.run(queries, cache)
