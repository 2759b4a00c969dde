"""HART from a checkout of github.com/mit-han-lab/hart. Its code puts everything on a CUDA GPU.

A folder of weights is `hart-0.7b-1024px` as it is published (`llm`, `tokenizer`) with `Qwen2-VL-1.5B-Instruct` in it. Loaded and
sampled as its `sample.py` does, the EMA weights where they are there; transformers below 5, with which its classes load.
Prompts are encoded once and the text encoder is let go. Its CUDA extension is used where it is built.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from sparvar_tune.catalog.models import Model
from sparvar_tune.live.checkouts.importing import Names, checkout, need, noise_of, quietly

CFG, CONTEXT_DIM = 4.5, 1536
FIRST_SIDE = 1  # the grid that the context tokens stand in for


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, _quantise: bool) -> None:
    """The one function of its CUDA extension that drawing calls."""
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float())


UNUSED: Names = {"hart_backend.fused_kernels": {"rms_norm": rms_norm}}


def open_live(row: Model, size: tuple[str, str], device: str, place: Any) -> tuple[Any, Any, float]:
    """The live model, `generate(prompt, seed)`, and the temperature it samples with."""
    if device == "cpu":
        raise ValueError("--source: HART's code puts its model on a CUDA GPU; there is none of it on a CPU")
    schedule = row.schedule(*size)
    with checkout(place.source, "hart", device, UNUSED), torch.random.fork_rng():
        torch.manual_seed(0)
        if place.weights is None:
            model, texts = _random(row, schedule, device, place.prompts)
        else:
            model, texts = _released(schedule.prefix, device, place)
    model.eval().requires_grad_(False)

    def generate(prompt: str, seed: int) -> Tensor:
        context, mask, positions = texts[prompt]
        with (
            torch.random.fork_rng(), torch.inference_mode(), quietly(),
            torch.autocast(device.split(":")[0], dtype=torch.float16),
        ):  # fmt: skip
            torch.manual_seed(seed)  # its diffusion head draws from the global generator
            picture: Tensor = model.autoregressive_infer_cfg(
                B=1, label_B=context, cfg=CFG, g_seed=seed, more_smooth=True, context_position_ids=positions, context_mask=mask
            )
        return picture.float().clamp(0, 1)

    return model, generate, 1.0


def _random(row: Model, schedule: Any, device: str, prompts: tuple[str, ...]) -> Any:
    from hart.modules.models.autoencoder import HARTAutoEncoder, HARTAutoEncoderWithDisc
    from hart.modules.models.autoencoder.configuration import HARTAutoEncoderConfig
    from hart.modules.models.transformer import HARTForT2I, HARTForT2IConfig

    sides = (FIRST_SIDE, *(h for h, _ in schedule.grids))
    coder = HARTAutoEncoder(HARTAutoEncoderConfig(
        vocab_size=4096, z_channels=32, ch=32, v_patch_nums=sides, quantizer_type="var_hybrid", test_mode=True
    ))  # fmt: skip
    coder.decoder = torch.nn.Sequential(torch.nn.Conv2d(32, 3, 1), torch.nn.Upsample(scale_factor=4, mode="bilinear"))
    own = HARTAutoEncoderWithDisc.__dict__.get("from_pretrained")
    HARTAutoEncoderWithDisc.from_pretrained = classmethod(lambda cls, *_a, **_kw: types.SimpleNamespace(vae=coder))
    try:
        model = HARTForT2I(HARTForT2IConfig(
            vae_path="none", context_token=schedule.prefix, context_dim=CONTEXT_DIM, depth=row.layers, embed_dim=row.width,
            num_heads=row.heads, patch_nums=sides, mlp_type="llama", attn_type="llama", disable_aln=True, shared_aln=False,
            use_timestep_embed=True, sep_aln_pooling_mode="avg", diff_width=1024, diff_depth=6, num_sampling_steps="8",
            use_context_norm=True,
        ))  # fmt: skip
    finally:
        if own is None:
            del HARTAutoEncoderWithDisc.from_pretrained
        else:
            HARTAutoEncoderWithDisc.from_pretrained = own
    model.init_weights(init_adaln=0.5, init_adaln_gamma=0.3, init_head=1.0, init_std=-1)
    texts = {}
    for prompt in prompts:
        mask = torch.ones(1, schedule.prefix, dtype=torch.long, device=device)
        mask[:, 20 + len(prompt) % 200 :] = 0
        texts[prompt] = noise_of(prompt, 1, schedule.prefix, CONTEXT_DIM).to(device), mask, mask.cumsum(1) - 1
    return model.to(device), texts


def _released(context: int, device: str, place: Any) -> Any:
    llm, text = need(place.weights, "llm"), need(place.weights, "Qwen2-VL-1.5B-Instruct")
    need(place.weights, "tokenizer")
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        raise ValueError(f"--source: transformers {transformers.__version__} loads HART wrongly; pip install 'transformers<5'")
    from hart.modules.models.transformer import HARTForT2I
    from hart.utils import encode_prompts, llm_system_prompt

    tokenizer = transformers.AutoTokenizer.from_pretrained(text)
    encoder = transformers.AutoModel.from_pretrained(text).to(device).eval()
    texts = {}
    for prompt in place.prompts:
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16):
            _, mask, positions, features = encode_prompts([prompt], encoder, tokenizer, context, llm_system_prompt, True)
        texts[prompt] = features, mask, positions
    del encoder
    torch.cuda.empty_cache()
    model = HARTForT2I.from_pretrained(llm).to(device)
    if (llm / "ema_model.bin").exists():
        model.load_state_dict(torch.load(llm / "ema_model.bin", map_location=device, weights_only=True))
    return model, texts
