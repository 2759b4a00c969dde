"""A tiny Infinity from a checkout: heads of 128 and a published schedule are what its code asks for at least."""

from __future__ import annotations

import sys

import torch

from public_models.stand_ins import autocast, put_missing, quietly
from sparvar_tune.adapters import flash_attn_stand_in

DEPTH = 4
PIXELS = "0.06M"


class Coder(torch.nn.Module):
    """The real quantiser, and one product in the place of the decoder."""

    def __init__(self, bits: int, side: int) -> None:
        super().__init__()
        from infinity.models.bsq_vae.multiscale_bsq import MultiScaleBSQ

        self.quantizer = MultiScaleBSQ(dim=bits, codebook_size=2**bits, new_quant=True, schedule_mode="dynamic")
        self.embed_dim, self.vocab_size, self.side = bits, 2**bits, side
        self.register_buffer("mix", torch.randn(3, bits))

    def decode(self, z):
        return torch.einsum("cd,bdhw->bchw", self.mix, z.float()).tanh()


class Tiny:
    name = "infinity"

    def __init__(self, checkout: str, dtype: str = "fp32", patchify: bool = False, fused: bool = True) -> None:
        sys.path.insert(0, checkout)
        put_missing()
        torch.manual_seed(0)
        with quietly(), torch.no_grad(), flash_attn_stand_in():
            from infinity.models.infinity import Infinity
            from infinity.utils.dynamic_resolution import dynamic_resolution_h_w

            self.table = dynamic_resolution_h_w
            self.coder = Coder(8, 8 if patchify else 16)
            self.model = Infinity(
                vae_local=self.coder, text_channels=256, text_maxlen=32, shared_aln=True, raw_scale_schedule=None,
                checkpointing="full-block", fused_norm=fused, pad_to_multiplier=128, rope2d_each_sa_layer=1,
                rope2d_normalized_by_hw=2, pn=PIXELS, apply_spatial_patchify=int(patchify), inference_mode=True,
                train_h_div_w_list=[1.0], depth=DEPTH, embed_dim=256, num_heads=2, block_chunks=2,
            )  # fmt: skip
            self.model.special_init(aln_init=0.5, aln_gamma_init=0.3, scale_head=1.0, scale_proj=1)
            for block in self.model.unregistered_blocks:
                block.sa.scale_mul_1H11.add_(torch.randn_like(block.sa.scale_mul_1H11) * 0.3)
                if dtype == "bf16":
                    block.bfloat16()
                    block.ca_norm.float()  # CUDA's autocast norms in fp32, a CPU's does not
        self.model.eval().requires_grad_(False)
        self.model.rng = torch.Generator()
        self.dtype, self.blocks = dtype, self.model.unregistered_blocks
        self.globals = vars(sys.modules[type(self.blocks[0].sa).__module__])

    def grids(self, aspect: float = 1.0) -> list[tuple[int, int]]:
        nearest = min(self.table, key=lambda known: abs(known - aspect))  # the public keys are cut after three decimals
        return [(h, w) for _, h, w in self.table[nearest][PIXELS]["scales"]]

    def sample(self, batch: int = 1, aspect: float = 1.0, cfg: float | list[float] = 3.0, **more):
        """(pictures, bits of every scale); prompts of unequal lengths."""
        schedule = [(1, h, w) for h, w in self.grids(aspect)]
        g = torch.Generator().manual_seed(7)
        lens = [5 + 3 * b for b in range(batch)]
        text = torch.randn(sum(lens), self.model.Ct5, generator=g)
        ends = torch.tensor([sum(lens[:i]) for i in range(batch + 1)], dtype=torch.int32)
        with autocast(self.dtype):
            cfgs = cfg if isinstance(cfg, list) else [cfg] * len(schedule)
            _, _, pictures = self.model.autoregressive_infer_cfg(
                vae=self.coder, scale_schedule=schedule, label_B_or_BLT=(text, lens, ends, max(lens)), B=batch, g_seed=1,
                cfg_list=cfgs, tau_list=[1.0] * len(schedule), top_k=900, top_p=0.97, returns_vemb=1, cfg_insertion_layer=[0],
                vae_type=32, ret_img=True, gt_leak=0, inference_mode=True, **more,
            )  # fmt: skip
        return pictures
