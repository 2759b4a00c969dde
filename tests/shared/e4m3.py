"""E4M3 and products of scaled rows in fp64, from the definition of the format; shares no code with what it checks."""

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


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] as the rule scales them, in fp32 as it says, rounded by hand; and the scales [M, 1]."""
    largest = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
    factor = torch.tensor(448.0) / largest
    return rounded((x.float() * factor).double()), (largest / 448.0).double()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[M, N] fp64: x [M, K] times weight [N, K], row by row."""
    (a, s), (b, t) = scaled(x), scaled(weight)
    out = (a @ b.T) * s * t.T
    return out if bias is None else out + bias.double()
