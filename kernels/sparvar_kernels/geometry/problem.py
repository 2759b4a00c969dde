"""One attention call, described by sizes alone: what a kernel needs to know before it sees a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class AttentionProblem:
    """Queries of one scale against the keys of the prefix and all scales up to their own.

    `logit_bound`: |q.k * softmax_scale| never exceeds it (cosine attention: the largest learned head scale); kernels
    may then leave the running maximum out of the softmax. None when nothing is known.
    """

    schedule: ScaleSchedule
    scale_index: int
    batch: int
    heads: int
    head_dim: int
    dtype: str = "fp32"
    softmax_scale: float = 1.0
    logit_bound: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, ScaleSchedule):
            raise ValueError(f"schedule: got a {type(self.schedule).__name__}, want a ScaleSchedule")
        if not isinstance(self.scale_index, int) or not 0 <= self.scale_index < len(self.schedule):
            raise ValueError(f"scale_index={self.scale_index!r}: want 0..{len(self.schedule) - 1}")
        for name in ("batch", "heads", "head_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: want >= 1, a whole number")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: want one of {', '.join(DTYPES)}")
        if not isinstance(self.softmax_scale, float | int) or not math.isfinite(self.softmax_scale):
            raise ValueError(f"softmax_scale={self.softmax_scale!r}: want a finite number")
        if self.logit_bound is not None and not (isinstance(self.logit_bound, float | int) and self.logit_bound > 0):
            raise ValueError(f"logit_bound={self.logit_bound!r}: want > 0 or None")

    @property
    def grid(self) -> tuple[int, int]:
        return self.schedule.grids[self.scale_index]

    @property
    def num_queries(self) -> int:
        return self.schedule.num_queries(self.scale_index)

    @property
    def num_keys(self) -> int:
        return self.schedule.num_keys(self.scale_index)

    def make_inputs(self, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Random q [B, H, Nq, D], k and v [B, H, Nk, D]; cosine-like (unit keys) when `logit_bound` is set."""
        g = torch.Generator().manual_seed(seed)
        shapes = [(self.batch, self.heads, n, self.head_dim) for n in (self.num_queries, self.num_keys, self.num_keys)]
        q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
        if self.logit_bound is not None:
            k = torch.nn.functional.normalize(k, dim=-1)
            q = torch.nn.functional.normalize(q, dim=-1) * (self.logit_bound / self.softmax_scale * 0.99)
        return tuple(t.to(device=device, dtype=DTYPES[self.dtype]) for t in (q, k, v))  # type: ignore[return-value]

    def check_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raises ValueError naming the first that is no tensor, or whose shape or dtype is not this problem's."""
        for name, t, n in (("q", q, self.num_queries), ("k", k, self.num_keys), ("v", v, self.num_keys)):
            if not isinstance(t, Tensor):
                raise ValueError(no_tensor(name, t))
            want = (self.batch, self.heads, n, self.head_dim)
            if tuple(t.shape) != want or t.dtype != DTYPES[self.dtype]:
                raise ValueError(f"{name}: got {tuple(t.shape)} {t.dtype}, want {want} {DTYPES[self.dtype]} [B, H, N, D]")


def no_tensor(name: str, got: object) -> str:
    """Why q, k or v is refused that is no tensor: None, a list, an array of numpy."""
    return f"{name}: got a {type(got).__name__}, want a torch.Tensor [B, H, N, D]"
