"""The public HART at its published size with random weights, from an unmodified checkout, on a GPU; drawn as its sample.py does.

Its one needed CUDA extension, an RMSNorm, is stood in for by PyTorch's fused one and a copy of its output.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.whole_image.decoding import Decoding
from sparvar_tune.catalog.models import MODELS

CONTEXT_WIDTH = 1536  # Qwen2-VL-1.5B's
PROMPT = 60  # tokens of the 300 that are no padding


def _rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, use_quant: bool) -> None:
    out.copy_(F.rms_norm(x, (x.shape[-1],), weight, eps))


class PublicHart:
    """`draw()` draws `images` pictures with guidance, fp16 model under fp16 autocast."""

    family = "hart"

    def __init__(self, checkout: str, slug: str, images: int = 1) -> None:
        sys.path.insert(0, checkout)
        for name, own in (("hart_backend", {}), ("hart_backend.fused_kernels", {"rms_norm": _rms_norm})):
            module = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
            vars(module).update(own)
            sys.modules[name] = module
        sys.modules["hart_backend"].fused_kernels = sys.modules["hart_backend.fused_kernels"]  # type: ignore[attr-defined]
        row = MODELS[slug]
        self.slug, self.images, self.schedule = slug, images, row.schedule(row.default_resolution, row.default_aspect)
        torch.manual_seed(0)
        with torch.device("cuda"):
            from hart.modules.models.autoencoder import HARTAutoEncoder, HARTAutoEncoderWithDisc
            from hart.modules.models.autoencoder.configuration import HARTAutoEncoderConfig
            from hart.modules.models.transformer import HARTForT2I, HARTForT2IConfig

            sides = (1, *(h for h, _ in self.schedule.grids))
            coder = HARTAutoEncoder(
                HARTAutoEncoderConfig(v_patch_nums=sides, quantizer_type="var_hybrid", test_mode=True, hybrid=True)
            )
            HARTAutoEncoderWithDisc.from_pretrained = classmethod(lambda cls, *a, **kw: types.SimpleNamespace(vae=coder))
            self.model: Any = HARTForT2I(HARTForT2IConfig(
                vae_path="none", context_token=self.schedule.prefix, context_dim=CONTEXT_WIDTH, depth=row.layers,
                embed_dim=row.width, num_heads=row.heads, patch_nums=sides, mlp_type="llama", attn_type="llama", disable_aln=True,
                shared_aln=False, use_timestep_embed=True, sep_aln_pooling_mode="avg", diff_width=1024, diff_depth=6,
                num_sampling_steps="8", use_context_norm=True,
            ))  # fmt: skip
            self.model.init_weights(init_adaln=0.5, init_adaln_gamma=0.3, init_head=1.0, init_std=-1)
        self.model.half().requires_grad_(False).eval()
        coder.requires_grad_(False).eval()
        mask = torch.zeros(images, self.schedule.prefix, dtype=torch.long, device="cuda")
        mask[:, :PROMPT] = 1
        self.mask, self.places = mask, (mask.cumsum(1) - 1).clamp_min(0)
        generator = torch.Generator("cuda").manual_seed(7)
        self.text = torch.randn(images, self.schedule.prefix, CONTEXT_WIDTH, generator=generator, device="cuda").half()
        self.decoding = Decoding(coder, "fhat_to_img")

    def draw(self) -> Tensor:
        """[B, 3, H, W] in 0..1. It draws from PyTorch's and NumPy's global generators too."""
        torch.manual_seed(1)
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, cache_enabled=True):
            out: Tensor = self.model.autoregressive_infer_cfg(
                B=self.images, label_B=self.text, g_seed=1, cfg=4.5, more_smooth=True, context_position_ids=self.places,
                context_mask=self.mask,
            )  # fmt: skip
        return out
