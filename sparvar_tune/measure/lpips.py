"""LPIPS (AlexNet), for users who have its weights: Zhang et al., CVPR 2018, version 0.1.

No weights ship or are downloaded. Give one safetensors file with `features.{0,3,6,8,10}.{weight,bias}` as torchvision's
AlexNet names its convolutions and `lin{0..4}.weight` [1, C, 1, 1], the linear heads of the lpips package.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# index in AlexNet's features, stride, padding, and whether a 3x3 max pool of stride 2 comes before it
_CONVOLUTIONS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """Callable: two pictures [1, 3, H, W] in 0..1 -> distance, 0 for equal ones. Raises ValueError for a bad file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path}: no such file; want a safetensors file of LPIPS weights")
        try:
            self.weights = {name: t.float() for name, t in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a safetensors file of LPIPS weights ({error})") from None
        wanted = [f"features.{i}.{part}" for i, *_ in _CONVOLUTIONS for part in ("weight", "bias")]
        wanted += [f"lin{n}.weight" for n in range(5)]
        missing = [name for name in wanted if name not in self.weights]
        if missing:
            raise ValueError(f"{path}: {missing[0]} is missing; want {', '.join(wanted)}")

    def __call__(self, a: Tensor, b: Tensor) -> float:
        total = 0.0
        for n, (x, y) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            difference = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)).square()
            total += float((difference * self.weights[f"lin{n}.weight"]).sum(1).mean())
        return total

    @torch.inference_mode()
    def _features(self, picture: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        x, out = (picture.cpu().float() * 2 - 1 - shift) / scale, []
        for i, stride, padding, pooled in _CONVOLUTIONS:
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.relu(F.conv2d(x, self.weights[f"features.{i}.weight"], self.weights[f"features.{i}.bias"], stride, padding))
            out.append(x)
        return out
