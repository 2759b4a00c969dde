"""The residual cache: what a sparse variant missed at the decision scale, enlarged onto later scales (paper eq. 9)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def enlarge(cached: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """cached [B, H, h*w, D] on the `source` grid -> [B, H, H*W, D] on `target`, bilinear at pixel centres."""
    batch, heads, _, dim = cached.shape
    picture = cached.reshape(batch * heads, *source, dim).permute(0, 3, 1, 2)  # a channels_last view, no copy
    grown = F.interpolate(picture, target, mode="bilinear", align_corners=False)
    return grown.permute(0, 2, 3, 1).reshape(batch, heads, target[0] * target[1], dim)
