"""Features <-> bits: the multi-scale residual one-bit quantiser, and the block that the autoencoders around it are made of.

z [B, C, h, w] is written coarse to fine: at each scale the residual z - fhat is averaged over the cells of that
grid, one bit per channel keeps its sign, and +-amplitude is added back to fhat, bilinearly enlarged. Enlarging and
averaging are small matrices, so every size, square or not, is exact, deterministic and runs the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@lru_cache(maxsize=128)
def _pool_matrix(source: int, target: int) -> Tensor:
    """[target, source]: row i averages the source cells under cell i, by the length they share."""
    edge = torch.arange(target + 1, dtype=torch.float64) * source / target
    cell = torch.arange(source, dtype=torch.float64)
    shared = torch.minimum(edge[1:, None], cell + 1) - torch.maximum(edge[:-1, None], cell)
    return (shared.clamp(min=0) * target / source).float()


@lru_cache(maxsize=128)
def _grow_matrix(source: int, target: int) -> Tensor:
    """[target, source]: bilinear interpolation at pixel centres, clamped at the border."""
    at = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(0, source - 1)
    low = at.floor().long().clamp(max=max(source - 2, 0))
    frac = at - low
    out = torch.zeros(target, source, dtype=torch.float64)
    out[torch.arange(target), low] += 1 - frac
    out[torch.arange(target), (low + 1).clamp(max=source - 1)] += frac
    return out.float()


def _resample(x: Tensor, size: tuple[int, int], matrix: Callable[[int, int], Tensor]) -> Tensor:
    h, w = x.shape[-2:]
    if (h, w) == size:
        return x
    rows, columns = (_like(matrix, source, target, x.dtype, x.device) for source, target in ((h, size[0]), (w, size[1])))
    return rows @ x @ columns.T


@lru_cache(maxsize=512)
def _like(
    matrix: Callable[[int, int], Tensor], source: int, target: int, dtype: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    """The matrix where it is used: a copy each time would wait for a GPU."""
    with torch.inference_mode(False):  # training may find what sampling left here
        return matrix(source, target).to(device, dtype)


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [..., H, W] averaged over the cells of a `size` grid."""
    return _resample(x, size, _pool_matrix)


def grow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [..., h, w] bilinearly enlarged to `size`."""
    return _resample(x, size, _grow_matrix)


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class FeatureEncoder(nn.Module):
    """Pictures -> features [B, bits, h, w] by such layers, brought to unit RMS over channels at each place."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x).float()
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-6)


class Quantiser(nn.Module):
    """Residual bits over the grids of a schedule. `amplitude` [scales, bits] is the mean |residual|, an EMA."""

    amplitude: Tensor

    def __init__(self, grids: tuple[tuple[int, int], ...], bits: int) -> None:
        super().__init__()
        self.grids, self.bits, self.full = grids, bits, grids[-1]
        self.register_buffer("amplitude", torch.full((len(grids), bits), 0.5))

    def add(self, fhat: Tensor, bits: Tensor, scale_index: int) -> Tensor:
        """fhat [B, C, H, W] after adding the bits [B, C, h, w] (values 0/1) of one scale."""
        step = (2 * bits.to(fhat) - 1) * self.amplitude[scale_index].view(1, -1, 1, 1)
        return fhat + grow(step, self.full)

    def forward(self, z: Tensor, flip: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Encodes z [B, C, H, W]; returns the true bits of each scale, fhat after each scale, and mean |residual|.

        flip [B]: the share of bits turned over, per sample, *after* the true bit was noted, so that later scales
        see and mend the damage (Infinity's bitwise self-correction).
        """
        fhat, bits, states, sizes = torch.zeros_like(z), [], [], []
        for i, grid in enumerate(self.grids):
            residual = pool(z - fhat, grid)
            bit = residual >= 0
            bits.append(bit)
            sizes.append(residual.abs().mean((0, 2, 3)))
            if flip is not None:
                bit = bit ^ (torch.rand_like(residual) < flip.view(-1, 1, 1, 1))
            fhat = self.add(fhat, bit, i)
            states.append(fhat)
        return bits, states, torch.stack(sizes)
