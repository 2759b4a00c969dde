"""Trains pocketvar from nothing: `python -m lab.pocketvar.train --out runs/pocketvar`.

Two phases, each a fixed number of steps: the tokenizer (autoencoder and residual bits), then the transformer on the
frozen bits. About 19 minutes on one H100; a CPU can run `--smoke` only, which checks the code, not the model.
Writes pocketvar.safetensors (the shipped file), samples.png, reconstructions.png and log.json into --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.pocketvar.photos import Crops, load_photos
from lab.training import (
    BlockCausal,
    Phase,
    adamw,
    autocast,
    psnr,
    save_png,
    scale_weights,
    set_rate,
    train_tokenizer,
)  # fmt: skip
from sparvar_tune.bitwise.sampling import turns_of
from sparvar_tune.pocketvar.coder import Encoder
from sparvar_tune.pocketvar.model import CLASSES, Generation, PocketConfig, PocketVAR, draw_noise, save_weights

MASKED_SCALES = 7  # scales 1..16 are so small that one masked call over their 521 tokens beats seven calls


class TeacherForcing:
    """All scales at once: the logits that sampling sees scale by scale."""

    def __init__(self, model: PocketVAR, compiled: bool) -> None:
        self.model = model
        self.attention = BlockCausal(model.schedule, MASKED_SCALES, 1.0, model.start.device)
        self.before = torch.compile(model.before_attention) if compiled else model.before_attention
        self.after = torch.compile(model.after_attention) if compiled else model.after_attention

    def __call__(self, states: list[Tensor], labels: Tensor) -> Tensor:
        """Logits [B, tokens, bits] from fhat after each scale (the last one is not used) and classes [B]."""
        model = self.model
        x = model.inputs([None, *states[:-1]], range(len(states)))
        mod, head_mod = model.modulations(labels)
        turns = turns_of(model.rotations)
        for block in model.blocks:
            q, k, v = self.before(block, x, turns, mod)
            x = self.after(block, x, self.attention(q, k, v), mod)
        return model.logits(x, head_mod)


def train_transformer(
    model: PocketVAR, encoder: Encoder, crops: Crops, batch: int, phase: Phase, compiled: bool, save: Callable[[], None]
) -> None:
    """Weighted bitwise cross-entropy."""
    device = model.start.device
    optimizer = adamw(model, 1.5e-3, (0.9, 0.97))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    forward = TeacherForcing(model, compiled)
    weight = scale_weights(model.schedule).to(device)
    last = model.schedule.starts[-2]
    for step in phase:
        set_rate(optimizer, 1.5e-3, phase, 150)
        pictures, labels = crops.batch(batch)
        with torch.no_grad(), autocast(pictures):
            z = encoder(pictures.contiguous(memory_format=torch.channels_last))
            bits, states, _ = model.quantiser(z, torch.rand(batch, device=device) * 0.2)
            target = torch.cat([b.flatten(2).transpose(1, 2) for b in bits], 1).float()
        with autocast(pictures):
            logits = forward(states, labels)
        each = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean((0, 2))  # [tokens]
        loss = (each * weight).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        phase.tell(loss=loss, last_scale=each[last:].mean(), norm=norm)
        if step % 1000 == 0:
            save()


@torch.no_grad()
def reconstruct(model: PocketVAR, encoder: Encoder, crops: Crops) -> tuple[Tensor, dict[str, float]]:
    """Twenty crops per class through the tokenizer: a sheet (photo above, reconstruction below) and mean PSNR."""
    sheet: dict[str, Tensor] = {}
    rows: dict[str, list[float]] = {}
    while len(rows) < len(CLASSES) or min(len(r) for r in rows.values()) < 20:
        pictures, labels = crops.batch(16)
        with autocast(pictures):
            z = encoder(pictures)
        _, states, _ = model.quantiser(z)
        output = (model.decoder(states[-1]) / 2 + 0.5).clamp(0, 1)
        for picture, out, label, db in zip(pictures / 2 + 0.5, output, labels, psnr(output, pictures / 2 + 0.5), strict=True):
            rows.setdefault(CLASSES[int(label)], []).append(float(db))
            sheet[CLASSES[int(label)]] = torch.cat([picture, out], 1)
    means = {name: round(sum(rows[name]) / len(rows[name]), 2) for name in CLASSES}
    means["mean"] = round(sum(means.values()) / len(means), 2)
    return torch.cat([sheet[name] for name in CLASSES], 2), means


@torch.no_grad()
def sample_sheet(model: PocketVAR, temperatures: tuple[float, ...] = (1.0, 0.7, 0.5, 0.0)) -> Tensor:
    """Every class (columns) at every temperature (rows), one seed each."""
    rows = []
    for temperature in temperatures:
        noise = torch.stack([draw_noise(model.schedule, model.config.bits, 100 + k) for k in range(len(CLASSES))])
        run = Generation(model, list(range(len(CLASSES))), noise, temperature).run()
        rows.append(torch.cat(list(run.pictures()), 2))
    return torch.cat(rows, 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.pocketvar.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, sheets and log")
    parser.add_argument("--tokenizer-steps", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=9_000, help="transformer steps")
    parser.add_argument("--tokenizer-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile (slower, starts at once)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model: checks the code only")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    config = PocketConfig(classes=len(CLASSES))
    if args.smoke:
        config = PocketConfig(classes=len(CLASSES), depth=2, mlp=64, sides=(1, 2, 4, 8, 16, 20, 24, 64))
        args.tokenizer_steps, args.steps, args.tokenizer_batch, args.batch = 3, 3, 4, 2
    model = PocketVAR(config).to(device)
    encoder = Encoder(config.bits).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    log: dict[str, object] = {"torch": torch.__version__, "arguments": {k: str(v) for k, v in vars(args).items()}}
    log["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"

    def save() -> None:
        partial = args.out / "pocketvar.safetensors.part"
        save_weights(model, partial, {"licence": "see MODEL_CARD.md"})
        partial.replace(args.out / "pocketvar.safetensors")

    photos = load_photos()
    phase, crops = Phase("tokenizer", args.tokenizer_steps), Crops(photos, 8, device, args.seed)
    train_tokenizer(model, encoder, lambda n: crops.batch(n)[0], args.tokenizer_batch, 5, phase)
    crops = Crops(photos, 16, device, args.seed + 1)
    encoder.eval()
    sheet, means = reconstruct(model, encoder, crops)
    save_png(sheet, args.out / "reconstructions.png")
    print("tokenizer PSNR dB on its own crops:", means, flush=True)
    log["tokenizer"], log["tokenizer_psnr"] = phase.rows, means

    phase = Phase("transformer", args.steps)
    train_transformer(model, encoder, crops, args.batch, phase, not args.no_compile and device.type == "cuda", save)
    log["transformer"] = phase.rows
    save()
    model.eval()
    save_png(sample_sheet(model), args.out / "samples.png")
    size = (args.out / "pocketvar.safetensors").stat().st_size
    log["bytes"] = size
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"{args.out / 'pocketvar.safetensors'}: {size / 2**20:.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
