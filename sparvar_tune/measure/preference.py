"""How much better people are taken to like the sparse picture than the dense one, by a model that the user has the weights of.

No weights ship or are downloaded, and no text-image model is written here: transformers and the ImageReward package run them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparvar_tune.catalog.names import words_of


class Hpsv2:
    """Callable: (sparse, dense, prompt), pictures [1, 3, H, W] in 0..1 -> score(sparse) - score(dense).

    The score is CLIP's cosine of picture and prompt (HPSv2, arXiv 2306.09341: CLIP ViT-H/14 trained on preferences), so any
    folder that transformers' CLIPModel opens will do, such as PickScore's. Raises ValueError for what it cannot open.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError:
            raise ValueError("hpsv2: wants transformers; pip install 'sparvar-tune[preference]'") from None
        if not folder.is_dir():
            raise ValueError(f"{folder}: no folder; want one that transformers' CLIPModel opens")
        try:  # safetensors alone: nothing is unpickled
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # what it raises has no common kind
            raise ValueError(f"{folder}: not a CLIP model of transformers ({words_of(error, 120)})") from None

    @torch.inference_mode()
    def __call__(self, sparse: Tensor, dense: Tensor, prompt: str) -> float:
        pictures = [as_image(picture) for picture in (sparse, dense)]
        out = self.model(**self.processor(text=[prompt], images=pictures, return_tensors="pt", padding=True, truncation=True))
        ours, theirs = (out.image_embeds @ out.text_embeds.T).flatten().tolist()  # both of length 1
        return float(ours - theirs)


class ImageReward:
    """Callable as `Hpsv2`, the score that of the ImageReward package (arXiv 2304.05977)."""

    def __init__(self, folder: Path) -> None:
        try:
            import ImageReward as package
        except ImportError:
            raise ValueError("image_reward: wants the ImageReward package; pip install image-reward") from None
        for name in ("ImageReward.pt", "med_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: no such file; want the folder that ImageReward's weights were saved to")
        try:
            self.model: Any = package.load(
                str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json")
            )
        except Exception as error:
            raise ValueError(f"{folder}: ImageReward cannot open it ({words_of(error, 120)})") from None

    @torch.inference_mode()
    def __call__(self, sparse: Tensor, dense: Tensor, prompt: str) -> float:
        ours, theirs = (float(self.model.score(prompt, as_image(picture))) for picture in (sparse, dense))
        return ours - theirs


def as_image(picture: Tensor) -> Any:
    """The PIL image of [1, 3, H, W] in 0..1."""
    from PIL import Image

    return Image.fromarray((picture[0].cpu() * 255).round().byte().permute(1, 2, 0).numpy())
