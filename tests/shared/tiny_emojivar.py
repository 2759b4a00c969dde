"""An emojivar small enough for tests: random weights, seven scales up to 12x16, two layers of two heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.catalog import models
from sparvar_tune.emojivar.model import EmojiConfig, EmojiVAR
from sparvar_tune.live import emojivar as adapter

GRIDS = ((1, 1), (2, 2), (3, 4), (4, 6), (6, 8), (9, 12), (12, 16))


def make_model(grids: tuple[tuple[int, int], ...] = GRIDS, heads: int = 2, **fields: int) -> EmojiVAR:
    torch.manual_seed(0)
    sizes = {"depth": 2, "heads": heads, "head_dim": 32, "mlp": 32, "bits": 8} | fields
    model = EmojiVAR(EmojiConfig(grids=grids, **sizes)).eval().requires_grad_(False)
    bits = model.config.bits  # the real decoder takes all the time
    model.decoder = torch.nn.Sequential(torch.nn.Conv2d(bits, 48, 1), torch.nn.PixelShuffle(4))
    for name, p in model.named_parameters():
        if "norm" not in name and "decoder" not in name:
            p.normal_(std=0.3)
    return model


def install(setattr_=setattr) -> None:
    """Puts the tiny model in emojivar's place; `setattr_` may be a monkeypatch's."""
    row = dataclasses.replace(
        models.MODELS["emojivar"], layers=2, heads=2, head_dim=32, width=64, softmax_scale=32**-0.5,
        resolutions={"192x256": {"0.750": ScaleSchedule(GRIDS, prefix=8)}},
    )  # fmt: skip
    setattr_(models, "MODELS", {**models.MODELS, "emojivar": row})
    setattr_(adapter, "load_emojivar", lambda *_args, **_options: make_model())
    setattr_(adapter, "place", lambda name: Path(__file__))
    setattr_(adapter.EmojiAdapter, "_yardstick_rows", lambda self: [
        {"name": adapter.REDRAW, "psnr_db": 20.0, "ssim": 0.5, "psnr_db_by_class": [20.0] * self.num_classes}
    ])  # fmt: skip
