"""The public Infinity at its published sizes with random weights, from an unmodified checkout, on a GPU.

Its real decoder, no text encoder: a prompt is random text features. Random weights draw noise, at the real cost of a picture.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lab.whole_image.decoding import Decoding
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.adapters import flash_attn_stand_in
from sparvar_tune.catalog.models import MODELS

# blocks, bits a token after patchify, pixels a token's side in the decoder (scripts/ and load_transformer of the public code)
SIZES = {"infinity-2b": (32, 2048, 32, False), "infinity-8b": (40, 3584, 14, True)}
TEXT = 64  # tokens of the prompt
# the published square grids and two more, for a picture of 2048 x 2048; not published, so its places are made here
GRIDS_2048 = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)


class PublicInfinity:
    """`draw()` draws one picture (or `images` at once) with guidance; see the module docstring."""

    family = "infinity"

    def __init__(self, checkout: str, slug: str, images: int = 1, large: bool = False) -> None:
        sys.path.insert(0, checkout)
        depth, width, bits, patchify = SIZES[slug]
        self.slug, self.images = slug, images
        row = MODELS[slug]
        self.schedule = ScaleSchedule.square(GRIDS_2048) if large else row.schedule("1M", "1.000")
        torch.manual_seed(0)
        with flash_attn_stand_in(), _quiet(), torch.no_grad(), torch.device("cuda"), _any_generator():
            from infinity.models.bsq_vae.vae import vae_model
            from infinity.models.infinity import Infinity, precompute_rope2d_freqs_grid

            mult = [1, 2, 4, 4] if patchify else [1, 2, 4, 4, 4]
            self.coder = vae_model(
                {}, "dynamic", bits, 2**bits, patch_size=8 if patchify else 16, encoder_ch_mult=mult, decoder_ch_mult=mult
            )  # fmt: skip
            with torch.autocast("cuda", torch.bfloat16):
                self.model: Any = Infinity(
                    vae_local=self.coder, text_channels=2048, text_maxlen=512, shared_aln=True, raw_scale_schedule=None,
                    checkpointing="full-block", customized_flash_attn=False, fused_norm=True, pad_to_multiplier=128,
                    use_flex_attn=False, add_lvl_embeding_only_first_block=1, use_bit_label=1, rope2d_each_sa_layer=1,
                    rope2d_normalized_by_hw=2, pn="1M", apply_spatial_patchify=int(patchify), inference_mode=True,
                    train_h_div_w_list=[1.0], depth=depth, embed_dim=width, num_heads=width // 128, drop_path_rate=0.1,
                    mlp_ratio=4, block_chunks=8,
                )  # fmt: skip
            self.model.special_init(aln_init=0.5, aln_gamma_init=0.3, scale_head=1.0, scale_proj=1)
            for block in self.model.unregistered_blocks:
                block.bfloat16()
            if large:
                grids = {1.0: {"1M": {"scales": self._triples()}}}
                self.model.rope2d_freqs_grid.update(
                    precompute_rope2d_freqs_grid(128, grids, pad_to_multiplier=128, rope2d_normalized_by_hw=2)
                )
        self.model.eval().requires_grad_(False)
        self.coder.eval().requires_grad_(False)
        self.model.rng = torch.Generator("cuda")
        generator = torch.Generator("cuda").manual_seed(7)
        self.text = torch.randn(images * TEXT, 2048, generator=generator, device="cuda")
        self.ends = torch.arange(0, (images + 1) * TEXT, TEXT, dtype=torch.int32, device="cuda")
        self.decoding = Decoding(self.coder, "decode")

    def _triples(self) -> list[tuple[int, int, int]]:
        return [(1, h, w) for h, w in self.schedule.grids]

    def draw(self) -> Tensor:
        """[B, H, W, 3] uint8, as tools/run_infinity.py draws it."""
        n = len(self.schedule)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=True), torch.no_grad():
            _, _, pictures = self.model.autoregressive_infer_cfg(
                vae=self.coder, scale_schedule=self._triples(), B=self.images, g_seed=0, cfg_sc=3,
                label_B_or_BLT=(self.text, [TEXT] * self.images, self.ends, TEXT),
                cfg_list=[4.0] * n, tau_list=[1.0] * n, top_k=900, top_p=0.97, returns_vemb=1, cfg_insertion_layer=[0],
                vae_type=32, ret_img=True, gt_leak=0, inference_mode=True,
            )  # fmt: skip
        out: Tensor = pictures
        return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _any_generator() -> Iterator[None]:
    """The constructor asks for a CPU generator on whatever device; random weights need none."""
    own = nn.init.trunc_normal_
    nn.init.trunc_normal_ = lambda tensor, *args, generator=None, **rest: own(tensor, *args, **rest)
    try:
        yield
    finally:
        nn.init.trunc_normal_ = own
