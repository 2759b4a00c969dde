"""Infinity from a checkout of github.com/FoundationVision/Infinity.

A folder of weights holds what its README names: `infinity_2b_reg.pth` and `infinity_vae_d32reg.pth`, or `infinity_8b_weights`
(`infinity_8b_512x512_weights`) and `infinity_vae_d56_f8_14_patchify.pth`; and `flan-t5-xl`. They are loaded by the functions of
its `tools/run_infinity.py`, with the settings of its scripts. Prompts are encoded once and the text encoder is let go.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_tune.catalog.models import Model
from sparvar_tune.live.checkouts.importing import Names, checkout, fill, need, noise_of, quietly, unfilled

UNUSED: Names = {
    "timm.models": {"register_model": lambda f: f},
    "timm.models.layers": {"DropPath": torch.nn.Identity, "drop_path": None},
    "timm.loss": {"SoftTargetCrossEntropy": torch.nn.Identity},
    "pytz": {"timezone": lambda name: None},
    "tqdm": {"tqdm": None},
}
TEXT_CHANNELS = 2048


@dataclass(frozen=True)
class Release:
    """One published model: how it is built and sampled by the public scripts."""

    kind: str
    model: str
    checkpoint: str
    coder: tuple[str, ...]
    bits: int
    patchify: int
    cfg: float
    tau: float


_D56 = ("infinity_vae_d56_f8_14_patchify.pth",)
RELEASES = {
    "infinity-2b": Release(
        "infinity_2b", "infinity_2b_reg.pth", "torch", ("infinity_vae_d32reg.pth", "infinity_vae_d32_reg.pth"), 32, 0, 4.0, 0.5
    ),
    "infinity-8b": Release("infinity_8b", "infinity_8b_weights", "torch_shard", _D56, 14, 1, 3.0, 1.0),
    "infinity-8b-512": Release("infinity_8b", "infinity_8b_512x512_weights", "torch_shard", _D56, 14, 1, 3.0, 1.0),
}


def open_live(row: Model, size: tuple[str, str], device: str, place: Any) -> tuple[Any, Any, float]:
    """The live model, `generate(prompt, seed)`, and the temperature it samples with."""
    release = RELEASES[row.slug]
    schedule = [(1, h, w) for h, w in row.schedule(*size).grids]
    if place.weights is None:
        model, generate = _random(row, release, size[0], device, place, schedule)
    else:
        model, generate = _released(release, size[0], device, place, schedule)
    return model, generate, release.tau


class DryCoder(torch.nn.Module):
    """The real quantiser, and one product in the place of the decoder."""

    def __init__(self, bits: int, side: int) -> None:
        super().__init__()
        from infinity.models.bsq_vae.multiscale_bsq import MultiScaleBSQ

        self.quantizer = MultiScaleBSQ(dim=bits, codebook_size=2**bits, new_quant=True, schedule_mode="dynamic")
        self.embed_dim, self.vocab_size, self.side = bits, 2**bits, side
        self.register_buffer("mix", torch.randn(3, bits, generator=torch.Generator().manual_seed(0)))

    def decode(self, z: Tensor) -> Tensor:
        mixed = torch.einsum("cd,bdhw->bchw", self.mix, z.float()).tanh()
        return F.interpolate(mixed, scale_factor=4, mode="bilinear")


def _random(row: Model, release: Release, pixels: str, device: str, place: Any, schedule: list[tuple[int, int, int]]) -> Any:
    kind = device.split(":")[0]
    with checkout(place.source, "infinity", device, UNUSED), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        from infinity.models.infinity import Infinity

        coder = DryCoder(release.bits, 8 if release.patchify else 16).to(device)
        with unfilled():
            model = Infinity(
                vae_local=coder, text_channels=TEXT_CHANNELS, text_maxlen=512, shared_aln=True, raw_scale_schedule=None,
                checkpointing="full-block", customized_flash_attn=False, fused_norm=True, pad_to_multiplier=128,
                add_lvl_embeding_only_first_block=1, use_bit_label=1, rope2d_each_sa_layer=1, rope2d_normalized_by_hw=2,
                pn=pixels, apply_spatial_patchify=release.patchify, inference_mode=True, train_h_div_w_list=[1.0],
                depth=row.layers, embed_dim=row.width, num_heads=row.heads, drop_path_rate=0.1, mlp_ratio=4,
                block_chunks=min(8, row.layers // 2),
            ).to(device)  # fmt: skip
        fill(model)
        model.special_init(aln_init=0.5, aln_gamma_init=0.3, scale_head=1.0, scale_proj=1)
        for block in model.unregistered_blocks:
            block.bfloat16()
            if kind == "cpu":
                block.ca_norm.float()  # CUDA's autocast norms in fp32, a CPU's does not
    model.eval().requires_grad_(False)
    model.rng = torch.Generator(device=device)
    texts = {}
    for prompt in place.prompts:
        n = 16 + len(prompt) % 32
        ends = torch.tensor([0, n], dtype=torch.int32, device=device)
        texts[prompt] = (noise_of(prompt, n, TEXT_CHANNELS).to(device), [n], ends, n)

    def generate(prompt: str, seed: int) -> Tensor:
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16), quietly():
            _, _, pictures = model.autoregressive_infer_cfg(
                vae=coder, scale_schedule=schedule, label_B_or_BLT=texts[prompt], B=1, g_seed=seed,
                cfg_list=[release.cfg] * len(schedule), tau_list=[release.tau] * len(schedule), top_k=900, top_p=0.97,
                returns_vemb=1, cfg_insertion_layer=[0], vae_type=release.bits, ret_img=True, gt_leak=0, inference_mode=True,
            )  # fmt: skip
        return pictures[0].flip(-1)  # its channels come blue first

    return model, generate


def _released(release: Release, pixels: str, device: str, place: Any, schedule: list[tuple[int, int, int]]) -> Any:
    if device == "cpu":
        raise ValueError(
            "--weights: the public loaders of Infinity put its weights on a CUDA GPU; --weights random runs on a CPU"
        )
    files = [need(place.weights, release.model), need(place.weights, *release.coder)]
    text = need(place.weights, "flan-t5-xl", "flan-t5-xl-official")
    with checkout(place.source, "infinity", device):
        import transformers.modeling_utils as moved

        if release.checkpoint == "torch_shard" and not hasattr(moved, "load_sharded_checkpoint"):  # transformers 5
            from transformers.trainer_utils import load_sharded_checkpoint

            moved.load_sharded_checkpoint = load_sharded_checkpoint
        from tools import run_infinity as public

        args = argparse.Namespace(
            pn=pixels, model_path=str(files[0]), vae_path=str(files[1]), vae_type=release.bits, cfg_insertion_layer=0,
            add_lvl_embeding_only_first_block=1, use_bit_label=1, model_type=release.kind, rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2, use_scale_schedule_embedding=0, sampling_per_bits=1, text_channels=TEXT_CHANNELS,
            apply_spatial_patchify=release.patchify, use_flex_attn=0, bf16=1, cache_dir="", enable_model_cache=0,
            checkpoint_type=release.checkpoint,
        )  # fmt: skip
        with torch.no_grad():
            tokenizer, encoder = public.load_tokenizer(t5_path=str(text))
            texts = {prompt: public.encode_prompt(tokenizer, encoder, prompt) for prompt in place.prompts}
            del tokenizer, encoder
            torch.cuda.empty_cache()
            coder = public.load_visual_tokenizer(args)
            model = public.load_transformer(coder, args)
    public.encode_prompt = lambda _tokenizer, _encoder, prompt, *_more: texts[prompt]

    def generate(prompt: str, seed: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16), quietly():
            picture: Tensor = public.gen_one_img(
                model, coder, None, None, prompt, g_seed=seed, gt_leak=0, gt_ls_Bl=None, cfg_list=release.cfg,
                tau_list=release.tau, scale_schedule=schedule, cfg_insertion_layer=[0], vae_type=release.bits,
                sampling_per_bits=1, enable_positive_prompt=0,
            )  # fmt: skip
        return picture.flip(-1)  # its channels come blue first

    return model, generate
