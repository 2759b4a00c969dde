"""The photos pocketvar is trained on: those that ship inside the scikit-image and scikit-learn wheels.

Needs `pip install 'sparvar-tune[train]'`; nothing is downloaded. Licences are listed in MODEL_CARD.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparvar_tune.pocketvar.model import CLASSES

SIDE = 256
# The short side is resized to SIDE times one of these, so that a crop shows all or most of the photo.
ZOOMS = (1.0, 1.125, 1.25)


def _arrays(name: str) -> Iterator[np.ndarray]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    if name == "motorcycle":
        left, right, _disparity = data.stereo_motorcycle()
        yield left
        yield right
    elif name in ("pagoda", "flower"):
        yield load_sample_image({"pagoda": "china.jpg", "flower": "flower.jpg"}[name])
    else:
        loader = {"galaxies": "hubble_deep_field", "tissue": "immunohistochemistry"}.get(name, name)
        yield getattr(data, loader)()


def load_photos() -> list[list[Tensor]]:
    """For each class its photos at every zoom, as uint8 [3, H, W] with the short side SIDE * zoom."""
    photos = []
    for name in CLASSES:
        versions = []
        for array in _arrays(name):
            image = Image.fromarray(np.ascontiguousarray(array[..., :3]))
            for zoom in ZOOMS:
                scale = SIDE * zoom / min(image.size)
                size = (max(SIDE, round(image.width * scale)), max(SIDE, round(image.height * scale)))
                resized = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
                versions.append(torch.from_numpy(resized.copy()).permute(2, 0, 1).contiguous())
        photos.append(versions)
    return photos


class Crops:
    """Random SIDE x SIDE crops, offsets on a lattice of `step` pixels, classes uniform. No flips.

    Flips made the first coarse grids undecided between a picture and its mirror image (two-handled cups).
    """

    def __init__(self, photos: list[list[Tensor]], step: int, device: torch.device, seed: int) -> None:
        self.photos = [[p.to(device) for p in versions] for versions in photos]
        self.step, self.rng = step, np.random.default_rng(seed)

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, SIDE, SIDE] in -1..1, float32, and their classes [n] int64."""
        labels = self.rng.integers(len(self.photos), size=n)
        crops = []
        for label in labels:
            photo = self.photos[label][self.rng.integers(len(self.photos[label]))]
            y, x = (self.step * self.rng.integers((s - SIDE) // self.step + 1) for s in photo.shape[1:])
            crops.append(photo[:, y : y + SIDE, x : x + SIDE])
        pictures = torch.stack(crops).float() / 127.5 - 1
        return pictures, torch.as_tensor(labels, device=pictures.device)
