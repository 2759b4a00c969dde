"""What this machine can do at most, measured on the spot: the limits that a step's time is held against."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from sparvar_kernels.geometry.problem import DTYPES
from sparvar_tune.measure.timing import Stopwatch, interleaved

# elements copied, side of the matrices, repetitions: more than any cache holds, and no second on a slow CPU
SIZES = {"cuda": (1 << 28, 8192, 20), "cpu": (1 << 24, 768, 5)}


@dataclass(frozen=True)
class Limits:
    """copy_bytes_per_s: read and written by a copy. gemm_flops_per_s: of a large matrix product."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float

    def ms(self, flops: float, moved: float) -> float:
        """Milliseconds below which nothing here can do so many FLOPs and move so many bytes."""
        return max(flops / self.gemm_flops_per_s, moved / self.copy_bytes_per_s) * 1e3

    def best(self, other: Limits) -> Limits:
        """Of two looks the better: a machine that was busy at one of them can do no less."""
        return Limits(max(self.copy_bytes_per_s, other.copy_bytes_per_s), max(self.gemm_flops_per_s, other.gemm_flops_per_s))


def machine_limits(device: str, dtype: str = "bf16") -> Limits:
    """This machine's own copy rate and matrix-product rate in `dtype` (a name of DTYPES) on random data; "cpu" or "cuda"."""
    elements, side, rounds = SIZES[device]
    kind = DTYPES[dtype]
    size = torch.empty((), dtype=kind).element_size()
    a = torch.randn(elements, device=device).to(kind)
    b = torch.empty_like(a)
    m, n = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    ways = {"copy": lambda: b.copy_(a), "gemm": lambda: m @ n}
    if device == "cpu":
        watch = Stopwatch(device)
        spent = {name: [min(watch(way) for _ in range(rounds + 1))] for name, way in ways.items()}  # others only slow it down
    else:
        spent = interleaved(ways, rounds)
    copy, product = (median(spent[name]) / 1e3 for name in ("copy", "gemm"))
    return Limits(2 * elements * size / copy, 2 * side**3 / product)
