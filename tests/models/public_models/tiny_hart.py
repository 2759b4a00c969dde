"""A tiny HART from a checkout. Its text context of 12 tokens stands in for the 300 of the released model."""

from __future__ import annotations

import sys
import types

import torch

from public_models.stand_ins import autocast, put_module, quietly
from sparvar_tune.adapters.cross_attention import dense_attention_bnhd

SIDES = (1, 2, 3, 4, 6, 8)
CONTEXT = 12


def rms_norm(out, x, weight, eps, use_quant):
    """The one function of its CUDA extension that drawing calls."""
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float())


class Tiny:
    name = "hart"

    def __init__(self, checkout: str, dtype: str = "fp32", flash: bool = False) -> None:
        sys.path.insert(0, checkout)
        put_module("hart_backend.fused_kernels", rms_norm=rms_norm)
        put_module("hart_backend", fused_kernels=sys.modules["hart_backend.fused_kernels"])
        if not torch.cuda.is_available():
            torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **kw: self  # its code calls them by name
        torch.manual_seed(0)
        with quietly():
            from hart.modules.models.autoencoder import HARTAutoEncoder, HARTAutoEncoderWithDisc
            from hart.modules.models.autoencoder.configuration import HARTAutoEncoderConfig
            from hart.modules.models.transformer import HARTForT2I, HARTForT2IConfig
            from hart.modules.networks import basic_hart

            if flash:  # imported by now, so that transformers does not look for the package
                for module in [m for name, m in sys.modules.items() if name.startswith("hart.modules.networks.")]:
                    if hasattr(module, "flash_attn_func"):
                        module.flash_attn_func = dense_attention_bnhd
            coder = HARTAutoEncoder(HARTAutoEncoderConfig(
                vocab_size=640, z_channels=8, ch=32, v_patch_nums=SIDES, quantizer_type="var_hybrid", test_mode=True
            ))  # fmt: skip
            coder.decoder = torch.nn.Conv2d(8, 3, 1)  # the real one takes all the time
            HARTAutoEncoderWithDisc.from_pretrained = classmethod(lambda cls, *a, **kw: types.SimpleNamespace(vae=coder))
            self.model = HARTForT2I(HARTForT2IConfig(
                vae_path="none", context_token=CONTEXT, context_dim=32, depth=4, embed_dim=128, num_heads=2, patch_nums=SIDES,
                mlp_type="llama", attn_type="llama", disable_aln=True, shared_aln=False, use_timestep_embed=True,
                sep_aln_pooling_mode="avg", diff_width=64, diff_depth=2, num_sampling_steps="4", flash_if_available=flash,
                fused_if_available=False, use_context_norm=True,
            ))  # fmt: skip
            self.model.init_weights(init_adaln=0.5, init_adaln_gamma=0.3, init_head=1.0, init_std=-1)
        self.model.requires_grad_(False).eval()
        self.dtype, self.blocks = dtype, self.model.blocks
        self.globals = vars(basic_hart)

    def grids(self) -> list[tuple[int, int]]:
        return [(s, s) for s in SIDES[1:]]

    def sample(self, batch: int = 1, cfg: float = 4.5, rounds: int = 1):
        g = torch.Generator().manual_seed(7)
        context = torch.randn(batch, CONTEXT, 32, generator=g)
        mask = torch.ones(batch, CONTEXT, dtype=torch.long)
        for row in range(batch):
            mask[row, CONTEXT - 3 - row :] = 0  # prompts of unequal lengths
        torch.manual_seed(1)  # the diffusion head draws from the global generator
        with torch.inference_mode(), autocast(self.dtype):
            return self.model.autoregressive_infer_cfg(
                B=batch, label_B=context, g_seed=1, cfg=cfg, more_smooth=True, context_position_ids=mask.cumsum(1) - 1,
                context_mask=mask, num_maskgit_iters=rounds,
            )  # fmt: skip
