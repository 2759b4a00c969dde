"""VAR from a checkout of github.com/FoundationVision/VAR.

A folder of weights holds `vae_ch160v4096z32.pth` and `var_d16.pth` .. `var_d36.pth`, as its README names them. A prompt is the
number of an ImageNet class. Sampled as its demo does: guidance 4, top-k 900, top-p 0.95, fp16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparvar_tune.catalog.models import Model
from sparvar_tune.live.checkouts.importing import Names, checkout, need, quietly

UNUSED: Names = {"huggingface_hub": {"PyTorchModelHubMixin": type("PyTorchModelHubMixin", (), {})}}
CFG, TOP_K, TOP_P = 4.0, 900, 0.95
LAYERS = (nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def open_live(row: Model, size: tuple[str, str], device: str, place: Any) -> tuple[Any, Any, float]:
    """The live model, `generate(prompt, seed)`, and the temperature it samples with."""
    sides = tuple(h for h, _ in row.schedule(*size).grids)
    files = None
    if place.weights is not None:
        files = need(place.weights, "vae_ch160v4096z32.pth"), need(place.weights, f"var_d{row.layers}.pth")
    kept = {kind: kind.__dict__.get("reset_parameters") for kind in LAYERS}  # its builder takes them away from torch
    with checkout(place.source, "models", device, UNUSED), torch.random.fork_rng():
        torch.manual_seed(0)
        from models import build_vae_var

        try:
            coder, model = build_vae_var(
                device=device, patch_nums=sides, num_classes=1000, depth=row.layers, shared_aln=row.layers == 36
            )
        finally:
            for kind, method in kept.items():
                if method is not None:
                    kind.reset_parameters = method  # type: ignore[method-assign]
                elif "reset_parameters" in kind.__dict__:
                    del kind.reset_parameters
        if files is None:
            _make_up(coder, model, device)
        else:
            for part, file in zip((coder, model), files, strict=True):
                part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    model.eval().requires_grad_(False)
    coder.eval().requires_grad_(False)

    def generate(prompt: str, seed: int) -> Tensor:
        label = torch.tensor([int(prompt)], device=device)
        with torch.inference_mode(), torch.autocast(device.split(":")[0], dtype=torch.float16), quietly():
            picture: Tensor = model.autoregressive_infer_cfg(
                B=1, label_B=label, cfg=CFG, top_k=TOP_K, top_p=TOP_P, g_seed=seed, more_smooth=False
            )
        return picture.float().clamp(0, 1)

    return model, generate, 1.0


def _make_up(coder: Any, model: Any, device: str) -> None:
    """Random numbers where the builder left memory as it was, and one product in the place of the decoder."""
    for p in coder.parameters():
        nn.init.normal_(p, std=0.5)
    coder.decoder = nn.Sequential(nn.Conv2d(coder.Cvae, 3, 1), nn.Upsample(scale_factor=4, mode="bilinear")).to(device)
    model.init_weights(init_adaln=0.5, init_adaln_gamma=0.3, init_head=1.0, init_std=-1)
