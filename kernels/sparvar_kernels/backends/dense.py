"""Dense attention: the baseline every speed-up is quoted against, and the decision scale's pass with column mass."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import Tile, partition

# Largest logit for which exp() without subtracting the maximum stays exact in fp32: sums over 2**17 keys of e**60
# stay below 3e38 and e**-60 relative to the largest term is far below fp32 resolution.
SAFE_LOGIT = 60.0
# Up to so many scores FlashAttention-2 stands for cuDNN, which plans a new shape for 50 ms: on an H200 3 us slower for one query,
# as fast or faster from there on (from 2.4 million on 1.1 to 1.9 times slower).
FEW_SCORES = 1 << 20
SCORE_ELEMENTS = 1 << 18  # scores held at once on a CPU: 1 MiB of fp32; best of 2**16..2**21 (27 ms against 31..121)


def out_like(q: Tensor) -> Tensor:
    """An output [B, H, Nq, D], laid out as q is, unless q's head_dim has gaps."""
    return torch.empty_like(q) if q.stride(3) == 1 else torch.empty(q.shape, dtype=q.dtype, device=q.device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
    """The fastest dense attention there is here: FlashAttention-3 where it is installed and fits, cuDNN where it runs (for few
    scores FlashAttention-2), else PyTorch's own choice of backend. [B, H, Nq, D]."""
    if q.is_cuda and why_not_flash3(q, k, v) is None:
        return _flash3(q, k, v, problem.softmax_scale)[0]
    if q.is_cuda and _cudnn_runs(q):  # `plans_shapes` says which of the two
        attend = _flash2 if has_few_scores(q, k) else _cudnn
        return attend(q, k, v, problem.softmax_scale, False)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=problem.softmax_scale)


def why_not_flash3(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why FlashAttention-3 (package fa3-fwd, for Hopper, bf16 alone) does not take these tensors, or None.

    Its copies want addresses and strides that are multiples of 16 bytes.
    """
    if torch.compiler.is_compiling():  # addresses are not known yet
        return "got a call that is being compiled, want one that runs"
    if q.dtype != torch.bfloat16:
        return f"got {q.dtype}, want torch.bfloat16: fa3-fwd is built for no other"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"got head_dim {q.shape[-1]}, want a multiple of 8 up to 256"
    for t in (q, k, v):
        batch, head, row, last = t.stride()
        if last != 1 or (batch | head | row) % 8 or t.data_ptr() % 16:
            return f"got strides {t.stride()} at an address that is {t.data_ptr() % 16} mod 16, want 16-byte steps"
    return _why_no_flash3(q.device.index or 0) if q.is_cuda else f"got tensors on {q.device}, want a Hopper GPU"


@lru_cache(maxsize=16)
def _why_no_flash3(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"got a GPU of capability {major}.{minor}, want 9.0"
    if importlib.util.find_spec("fa3_fwd") is None:
        return "the package fa3-fwd is not installed"
    try:
        importlib.import_module("fa3_fwd._C")  # registers its operators
    except (ImportError, OSError) as error:  # a build for another PyTorch or CUDA
        return f"the package fa3-fwd does not load: {str(error).splitlines()[0][:120]}"
    return None


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output is laid out as q. One split of the keys: a sum in parts would need memory of its own."""
    out = out_like(q)
    rows = (t.transpose(1, 2) for t in (q, k, v))
    lse = torch.ops.fa3_fwd.fwd(*rows, out=out.transpose(1, 2), softmax_scale=scale, num_splits=1)[1]
    return out, lse


def _cudnn_runs(q: Tensor) -> bool:
    """cuDNN's attention: half precision, head_dim a multiple of 8 up to 128, 8.0 and newer."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and _cudnn_here(q.device.index or 0)


@lru_cache(maxsize=16)
def _cudnn_here(device: int) -> bool:
    usable = torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
    return usable and torch.cuda.get_device_capability(device) >= (8, 0)


def plans_shapes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether dense attention of these, with log-sum-exp or not, is cuDNN's, which plans a new shape for 50 to 200 ms."""
    return why_not_flash3(q, k, v) is not None and _cudnn_runs(q) and not has_few_scores(q, k)


def has_few_scores(q: Tensor, k: Tensor) -> bool:
    """Whether q [B, H, Nq, D] and k [B, H, Nk, D] make so few scores that no plan of cuDNN pays."""
    return q.shape[:3].numel() * k.shape[2] <= FEW_SCORES


def _flash2(q: Tensor, k: Tensor, v: Tensor, scale: float, lse: bool) -> tuple[Tensor, Tensor]:
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    return out, sums


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, lse: bool) -> tuple[Tensor, Tensor]:
    out, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, lse, 0.0, False, False, scale=scale)[:2]
    return out, sums


def dense_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention [B, H, Nq, D] and the natural log of each row's sum of exponentials [B, H, Nq] (fp32)."""
    if not q.is_cuda:  # Triton's interpreter
        scores = (q.float() @ k.float().transpose(-1, -2)) * scale
        lse = torch.logsumexp(scores, -1)
        return (torch.exp(scores - lse.unsqueeze(-1)) @ v.float()).to(q.dtype), lse
    if why_not_flash3(q, k, v) is None:
        return _flash3(q, k, v, scale)
    if _cudnn_runs(q) and not has_few_scores(q, k):
        out, lse = _cudnn(q, k, v, scale, True)
        return out, lse.reshape(q.shape[:3])
    if q.dtype == torch.float32:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)[:2]
    else:
        out, lse = _flash2(q, k, v, scale, True)
    return out, lse[..., : q.shape[2]]


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

    CS4A's importance (paper section 3.2): a tile that is short ranks by its own queries alone.
    Tiles are worked in groups small enough for the scores to stay in cache.
    """
    rows, own = partition(problem.grid, tile, str(q.device)).sampled(sample)
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
                weight = (own[t : t + step] / scores.sum(-1).view(-1, each)).unsqueeze(1)
                torch.bmm(weight, scores.view(-1, each, scores.shape[-1]), out=mass[b, i, t : t + step].unsqueeze(1))
    return mass
