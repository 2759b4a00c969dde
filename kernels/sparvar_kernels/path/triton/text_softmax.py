"""Softmax over a row's text, many tokens and heads a program."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

LOG2E = math.log2(math.e)
EACH_PROGRAM = 4096  # numbers
WARPS = 4


@triton.jit
def text_softmax_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, bias_ptr, starts_ptr, out_ptr, many, scale_log2e,
    HEADS: tl.constexpr, ROOM: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens' heads, row): `many` = tokens * heads of a row, each with its own softmax."""
    row = tl.program_id(1).to(tl.int64)
    heads, places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_T)
    n = tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
    inside = (heads < many)[:, None] & (places < ROOM)[None, :]
    seen = (places < n)[None, :]  # not in the loads' masks: only the constant ROOM lets them be wide
    at = (row * many + heads)[:, None] * ROOM + places[None, :]
    logits = tl.load(scores_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    if BIAS:
        bias_at = (row * HEADS + heads % HEADS)[:, None] * ROOM + places[None, :]
        logits += tl.load(bias_ptr + bias_at, mask=inside, other=0.0, eviction_policy="evict_last")
    logits = tl.where(seen, logits * scale_log2e, float("-inf"))
    best = tl.max(logits, 1)
    weights = tl.exp2(logits - tl.where(best > float("-inf"), best, 0.0)[:, None])
    total = tl.sum(weights, 1)
    weights /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + at, weights.to(out_ptr.dtype.element_ty), mask=inside)


def text_softmax_build(out: torch.dtype, heads: int, room: int, bias: bool = True, aligned: bool = True) -> PathBuild:
    """What a call launches."""
    types = {"scores_ptr": "*fp32", "bias_ptr": "*fp32", "starts_ptr": "*i32", "out_ptr": f"*{TYPES[out]}"}
    types |= {"many": "i32", "scale_log2e": "fp32"}
    block_t = triton.next_power_of_2(room)
    constants = {"HEADS": heads, "ROOM": room, "BIAS": bias, "BLOCK": max(EACH_PROGRAM // block_t, 1), "BLOCK_T": block_t}
    return PathBuild.of(text_softmax_kernel, types, constants, {"num_warps": WARPS, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def text_softmax_launch(
    scores: Form, starts: Form, bias: Form, out: torch.dtype, device: torch.device
) -> tuple[Launcher, tuple[int, int, int], int]:
    """The binary for tensors of this form, how many programs it is, and the softmaxes of a row."""
    assert scores is not None and starts is not None
    batch, length, heads, room = scores[0]
    aligned = not any(t[3] for t in (scores, starts, bias) if t is not None)
    build = text_softmax_build(out, heads, room, bias is not None, aligned)
    many = length * heads
    return launcher(build, device), (-(-many // dict(build.constants)["BLOCK"]), batch, 1), many
