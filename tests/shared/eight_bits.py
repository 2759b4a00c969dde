"""E4M3, int8 and products of rows scaled to them in fp64, from the formats' definitions; shares no code with what it checks."""

from __future__ import annotations

import torch
from torch import Tensor


def values() -> Tensor:
    """Every finite value of 4 exponent bits (bias 7) and 3 of mantissa that is not negative, ascending; 448 is the largest."""
    found = [m / 8 * 2.0**-6 for m in range(8)]  # exponent 0: no leading one
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]  # that one is NaN
    return torch.tensor(found, dtype=torch.float64)


def rounded(x: Tensor) -> Tensor:
    """x fp64 to the nearest value of the format, of two as near the one whose last mantissa bit is 0; up to 448."""
    table = values()
    size = x.abs().clamp(max=448.0)
    above = torch.searchsorted(table, size.contiguous()).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    down, up = size - table[below], table[above] - size
    even = torch.where(above % 2 == 0, above, below)  # codes count up by one, so the last bit is the place's
    place = torch.where(down < up, below, torch.where(up < down, above, even))
    return table[place] * x.sign()


def whole(x: Tensor) -> Tensor:
    """x fp64 to the nearest whole number, of two as near the even one."""
    below = torch.floor(x)
    part = x - below
    up = (part > 0.5) | ((part == 0.5) & (below % 2 != 0))
    return below + up


def scaled(x: Tensor, fmt: str = "e4m3") -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] as the rule scales them, in fp32 as it says, rounded by hand; and the scales [M, 1]."""
    largest = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
    most = torch.tensor(448.0 if fmt == "e4m3" else 127.0)
    rows = (x.float() * (most / largest)).double()
    return rounded(rows) if fmt == "e4m3" else whole(rows), (largest / most).double()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, fmt: str = "e4m3") -> Tensor:
    """[M, N] fp64: x [M, K] times weight [N, K], row by row."""
    (a, s), (b, t) = scaled(x, fmt), scaled(weight, fmt)
    out = (a @ b.T) * s * t.T
    return out if bias is None else out + bias.double()
