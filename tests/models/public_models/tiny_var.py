"""A tiny VAR from a checkout."""

from __future__ import annotations

import sys

import torch

from public_models.stand_ins import autocast, quietly
from sparvar_tune.adapters.cross_attention import dense_attention_bnhd

SIDES = (1, 2, 3, 4, 6, 8)


class Tiny:
    name = "var"

    def __init__(self, checkout: str, dtype: str = "fp32", kernel: str = "slow", shared: bool = False) -> None:
        sys.path.insert(0, checkout)
        torch.manual_seed(0)
        with quietly():
            from models import basic_var
            from models.var import VAR
            from models.vqvae import VQVAE

            if kernel == "flash":
                basic_var.flash_attn_func = dense_attention_bnhd
            if kernel == "xformers":
                basic_var.memory_efficient_attention = lambda q, k, v, attn_bias=None, p=0.0, scale=None: dense_attention_bnhd(
                    q, k, v, softmax_scale=scale
                )
            coder = VQVAE(vocab_size=64, z_channels=8, ch=32, test_mode=True, share_quant_resi=4, v_patch_nums=SIDES)
            coder.decoder = torch.nn.Conv2d(8, 3, 1)  # the real one takes all the time
            self.model = VAR(
                coder, num_classes=10, depth=4, embed_dim=128, num_heads=2, norm_eps=1e-6, shared_aln=shared, attn_l2_norm=True,
                patch_nums=SIDES, flash_if_available=kernel != "slow", fused_if_available=False,
            )  # fmt: skip
            self.model.init_weights(init_adaln=0.5, init_adaln_gamma=0.3, init_head=1.0, init_std=-1)
        self.model.requires_grad_(False).eval()
        self.dtype, self.blocks = dtype, self.model.blocks
        self.globals = vars(basic_var)

    def grids(self) -> list[tuple[int, int]]:
        return [(s, s) for s in SIDES]

    def sample(self, batch: int = 1, cfg: float = 1.5):
        with torch.inference_mode(), autocast(self.dtype):
            return self.model.autoregressive_infer_cfg(
                B=batch, label_B=torch.arange(batch), g_seed=1, cfg=cfg, top_k=16, top_p=0.95
            )
