"""The public VAR at its published sizes with random weights, from an unmodified checkout, on a GPU; drawn as its demo does."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from lab.whole_image.decoding import Decoding
from sparvar_tune.catalog.models import MODELS

SHARED_ALN = {"var-d36"}  # the 512 px model shares its AdaLN product between blocks


class PublicVar:
    """`draw()` draws `images` pictures with guidance, fp16 by autocast over fp32 weights."""

    family = "var"

    def __init__(self, checkout: str, slug: str, images: int = 1) -> None:
        sys.path.insert(0, checkout)
        row = MODELS[slug]
        self.slug, self.images, self.schedule = slug, images, row.schedule(row.default_resolution, row.default_aspect)
        torch.manual_seed(0)
        with torch.device("cuda"):
            from models.var import VAR
            from models.vqvae import VQVAE

            sides = tuple(h for h, _ in self.schedule.grids)
            coder = VQVAE(vocab_size=4096, z_channels=32, ch=160, test_mode=True, share_quant_resi=4, v_patch_nums=sides)
            self.model: Any = VAR(
                coder, num_classes=1000, depth=row.layers, embed_dim=row.width, num_heads=row.heads, norm_eps=1e-6,
                shared_aln=slug in SHARED_ALN, attn_l2_norm=True, patch_nums=sides, flash_if_available=True,
                fused_if_available=True,
            )  # fmt: skip
            self.model.init_weights(init_adaln=0.5, init_adaln_gamma=0.3, init_head=1.0, init_std=-1)
        self.model.requires_grad_(False).eval()
        coder.requires_grad_(False).eval()
        self.model.rng = torch.Generator("cuda")
        self.labels = torch.arange(images, device="cuda")
        self.decoding = Decoding(coder, "fhat_to_img")

    def draw(self) -> Tensor:
        """[B, 3, H, W] fp32 in 0..1."""
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, cache_enabled=True):
            out: Tensor = self.model.autoregressive_infer_cfg(
                B=self.images, label_B=self.labels, g_seed=0, cfg=4, top_k=900, top_p=0.95, more_smooth=False
            )
        return out
