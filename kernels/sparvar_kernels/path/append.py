"""What is done to q, k and v between the product that makes them and the attention that reads them."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_like

Pairs = Literal["interleaved", "halves", "rotate_half"]
PAIRS = ("interleaved", "halves", "rotate_half")
MOST_HEAD_DIM = 256


def append_qkv(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, start: int, *, query: Tensor | None = None, q_scale: Tensor | None = None,
    normalise: bool = False, rotation: Tensor | None = None, pairs: Pairs = "interleaved", eps: float = 1e-12,
) -> Tensor:  # fmt: skip
    """Normalises, scales and rotates q and k, writes k and v into the cache, and returns q [B, H, L, D].

    qkv       [B, L, 3, H, D] bf16, fp16 or fp32, D contiguous: the product with its bias added, of L new tokens.
    cache_k, cache_v  [B', H, N, D] of the same dtype, B' >= B, D contiguous. Places start .. start + L - 1 of the first B
              rows are written, nothing else is.
    query     [B, L, H, D] of the same dtype, D contiguous: where q is written; allocated when None.
    q_scale   [H] fp32, multiplies q: the learned factor exp(min(s, log 100)) of cosine attention.
    normalise divides q and k by max(their L2 norm over D, eps).
    rotation  fp32 [L, D / 2, 2], or [B, L, D / 2, 2] where rows differ: (cos, sin) of each pair, contiguous per token.
    pairs     "interleaved": channels 2i and 2i + 1 turn by angle i (Infinity). "halves": channels i and i + D / 2 do
              (Llama). "rotate_half": x * cos + rotate_half(x) * sin with a (cos, sin) for each *channel*, a rotation of
              [L, D, 2] or [B, L, D, 2]. HART's image tokens need it: of its 2-D angles the first half of D holds those of
              the row, twice, and the second half those of the column, so the two members of a pair turn by different
              angles (basic_hart.py, LlamaRotaryEmbedding). torch.stack((cos, sin), -1) of what that class returns is the
              table; its context tokens have the same form with both halves equal.

    The returned q is a view of memory laid out [B, L, H, D]: an attention that lays its output out as q is makes the
    reshape to [B, L, H * D] free. All arithmetic is fp32, rounded once at the end. On a GPU this is one kernel on the
    device of qkv that never waits, so it can be captured in a CUDA graph.
    Raises ValueError, in one line, for anything else than the above.
    """
    device = qkv.device
    if query is None:
        if qkv.ndim != 5:
            raise ValueError(f"qkv: got {tuple(qkv.shape)}, want five axes [B, L, 3, H, D]")
        query = torch.empty(qkv.shape[0], qkv.shape[1], *qkv.shape[3:], dtype=qkv.dtype, device=device)
    tensors = {"qkv": qkv, "cache_k": cache_k, "cache_v": cache_v, "query": query, "q_scale": q_scale, "rotation": rotation}
    check_plain(tensors, device)
    forms = form(qkv), form(cache_k), form(cache_v), form(query), form(q_scale), form(rotation)
    reason = why_not_append(*forms, pairs) or _why_not_place(cache_k.shape[2], start, qkv.shape[1])
    if reason:
        raise ValueError(reason)
    if qkv.numel() == 0:
        return query.transpose(1, 2)
    if not by_triton(device):
        _append(qkv, cache_k, cache_v, start, query, q_scale, normalise, rotation, pairs, eps)
        return query.transpose(1, 2)
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.append import NO_TURN, TURNS, append_launch

    turn = NO_TURN if rotation is None else TURNS[pairs]
    run, grid, rest = append_launch(*forms, normalise, turn, device)
    scale_at = pointer(qkv if q_scale is None else q_scale)
    table_at = pointer(qkv if rotation is None else rotation)
    arguments = (
        pointer(qkv), pointer(cache_k), pointer(cache_v), pointer(query), scale_at, table_at, *rest, start, eps
    )  # fmt: skip
    on_device(device, run, grid, *arguments)
    return query.transpose(1, 2)


@lru_cache(maxsize=4096)
def why_not_append(qkv: Form, cache_k: Form, cache_v: Form, query: Form, q_scale: Form, rotation: Form, pairs: str) -> str | None:
    """Why tensors of these forms cannot be appended, or None."""
    assert qkv is not None and cache_k is not None and cache_v is not None
    if len(qkv[0]) != 5 or qkv[0][2] != 3:
        return f"qkv: got {tuple(qkv[0])}, want [B, L, 3, H, D]"
    batch, length, _, heads, dim = qkv[0]
    if dim % 2 or not 2 <= dim <= MOST_HEAD_DIM:
        return f"qkv: got head_dim {dim}, want an even one of 2..{MOST_HEAD_DIM}"
    if pairs not in PAIRS:
        return f"pairs: got {pairs!r}, want one of {', '.join(PAIRS)}"
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        if len(cache[0]) != 4 or cache[0][0] < batch:
            return f"{name}: got {tuple(cache[0])}, want [B', {heads}, N, {dim}] with B' >= {batch}"
    if cache_k[0][2] != cache_v[0][2]:
        return f"cache_v: got {cache_v[0][2]} places, want {cache_k[0][2]} like cache_k"
    channels = dim if pairs == "rotate_half" else dim // 2
    dtype = (qkv[2],)
    wants = (
        ("qkv", qkv, FLOATS, [tuple(qkv[0])]),
        ("cache_k", cache_k, dtype, [(*cache_k[0][:1], heads, cache_k[0][2], dim)]),
        ("cache_v", cache_v, dtype, [(*cache_v[0][:1], heads, cache_v[0][2], dim)]),
        ("query", query, dtype, [(batch, length, heads, dim)]),
        ("q_scale", q_scale, (torch.float32,), [(heads,)]),
        ("rotation", rotation, (torch.float32,), [(length, channels, 2), (batch, length, channels, 2)]),
    )
    for name, t, dtypes, shapes in wants:
        reason = why_not_like(name, t, dtypes, *shapes)
        if reason:
            return reason
    if rotation is not None and rotation[1][-2] != 2 and channels > 1:
        return f"rotation: got strides {rotation[1]}, want each token's {channels} pairs contiguous"
    for name, t in (("cache_k", cache_k), ("cache_v", cache_v), ("query", query)):
        if t is not None and any(n > 1 and s == 0 for n, s in zip(t[0], t[1], strict=True)):
            return f"{name}: got strides {t[1]}, want memory of its own for every place"
    if max(s for t in (qkv, cache_k, cache_v, query) if t is not None for s in t[1][1:]) >= 1 << 31:
        return "qkv, caches: a stride of 2**31 elements or more; make them contiguous"
    return None


def _why_not_place(places: int, start: int, length: int) -> str | None:
    if not 0 <= start <= places - length:
        return f"start: got {start} for {length} tokens, want 0..{places - length} in a cache of {places} places"
    return None


def _append(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, start: int, query: Tensor, q_scale: Tensor | None, normalise: bool,
    rotation: Tensor | None, pairs: str, eps: float,
) -> None:  # fmt: skip
    """The same on a CPU."""
    batch, length = qkv.shape[:2]
    place = slice(start, start + length)
    cache_v[:batch, :, place] = qkv[:, :, 2].transpose(1, 2)
    for i, out in enumerate((query, cache_k[:batch, :, place].transpose(1, 2))):
        x = qkv[:, :, i].float()
        if normalise:
            x = F.normalize(x, dim=-1, eps=eps)
        if i == 0 and q_scale is not None:
            x = x * q_scale[:, None]
        if rotation is not None:
            x = _turned(x, rotation.unsqueeze(-3), pairs)
        out.copy_(x)


def _turned(x: Tensor, table: Tensor, pairs: str) -> Tensor:
    """x [B, L, H, D] fp32 turned by a table [L, 1, channels, 2], or one a row."""
    cos, sin = table.unbind(-1)
    if pairs == "interleaved":
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    if pairs == "halves":
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return x * cos + torch.cat((-b, a), -1) * sin
