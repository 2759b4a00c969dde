"""Trains pocketvar from nothing: `python -m lab.pocketvar.train --out runs/pocketvar`.

Two phases, each a fixed number of steps: the tokenizer (autoencoder and residual bits), then the transformer on the
frozen bits. About 19 minutes on one H100; a CPU can run `--smoke` only, which checks the code, not the model.
Writes pocketvar.safetensors (the shipped file), samples.png, reconstructions.png and log.json into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lab.pocketvar.photos import Crops, load_photos
from sparvar_tune.pocketvar.model import CLASSES, Generation, PocketConfig, PocketVAR, draw_noise, save_weights
from sparvar_tune.pocketvar.tokenizer import Encoder

MASKED_SCALES = 7  # scales 1..16 are so small that one masked call over their 521 tokens beats seven calls


class Progress:
    """One line every few seconds: phase, step, loss, time per step, time left."""

    def __init__(self, phase: str, steps: int, every_s: float = 10.0) -> None:
        self.phase, self.steps, self.every_s = phase, steps, every_s
        self.begun = self.shown = time.monotonic()
        self.rows: list[dict[str, float | str]] = []

    def __call__(self, step: int, **values: Tensor) -> None:
        now = time.monotonic()
        if now - self.shown < self.every_s and step not in (1, self.steps):
            return
        self.shown = now
        numbers = {name: round(float(v.detach()), 4) for name, v in values.items()}  # the only host sync
        each = (time.monotonic() - self.begun) / step
        self.rows.append({"phase": self.phase, "step": step, "seconds": round(now - self.begun, 1), **numbers})
        shown = "  ".join(f"{k} {v}" for k, v in numbers.items())
        left = each * (self.steps - step)
        print(f"{self.phase} {step}/{self.steps}  {shown}  {each * 1e3:.0f} ms/step  {left:.0f} s left", flush=True)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> None:
    """Linear warm-up, then cosine down to 2 % of `peak`."""
    share = min(1.0, step / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = peak * share


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """[B] dB between pictures [B, 3, H, W] in 0..1."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)))


def train_tokenizer(model: PocketVAR, encoder: Encoder, crops: Crops, steps: int, batch: int, progress: Progress) -> None:
    """Loss L1 + 2 MSE + 0.5 L1 of gradients. A quarter of each batch has flipped bits, a quarter stops early."""
    quantiser, decoder = model.quantiser, model.decoder
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    quarter = max(1, batch // 4)
    device = model.start.device
    for step in range(1, steps + 1):
        set_rate(optimizer, 2e-3, step, steps, 200)
        pictures, _ = crops.batch(batch)
        with torch.autocast(device.type, torch.bfloat16):
            z = encoder(pictures.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            flip = torch.zeros(batch, device=device)
            flip[:quarter] = torch.rand(quarter, device=device) * 0.15
            _, states, sizes = quantiser(z.detach(), flip)
            quantiser.amplitude.lerp_(sizes, 0.02 if step > 100 else 0.2)
            early = int(torch.randint(5, len(states), ()))
            fhat = states[-1].clone()
            fhat[quarter : 2 * quarter] = states[early][quarter : 2 * quarter]
        passed = z + (fhat - z).detach()  # straight through
        with torch.autocast(device.type, torch.bfloat16):
            output = decoder(passed).float()
        error = output - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        commit = (z[2 * quarter :] - fhat[2 * quarter :]).square().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.1 * commit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress(step, loss=loss, psnr=psnr(output[2 * quarter :] / 2 + 0.5, pictures[2 * quarter :] / 2 + 0.5).mean())


class TeacherForcing:
    """All scales at once: block-causal attention as one masked call for the small scales, one call per larger scale."""

    def __init__(self, model: PocketVAR, compiled: bool) -> None:
        self.model = model
        starts = model.schedule.starts
        self.masked_scales = min(MASKED_SCALES, len(model.schedule))
        scale_of = torch.repeat_interleave(torch.arange(len(model.schedule)), torch.tensor(starts).diff())
        small = scale_of[: starts[self.masked_scales]].to(model.start.device)
        self.mask = small[:, None] >= small[None, :]
        self.before = torch.compile(model.before_attention) if compiled else model.before_attention
        self.after = torch.compile(model.after_attention) if compiled else model.after_attention

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts, first = self.model.schedule.starts, self.masked_scales
        n = starts[first]
        out = [F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], attn_mask=self.mask, scale=1.0)]
        for begin, end in zip(starts[first:-1], starts[first + 1 :], strict=True):
            out.append(F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=1.0))
        return torch.cat(out, 2)

    def __call__(self, states: list[Tensor], labels: Tensor) -> Tensor:
        """Logits [B, tokens, bits] from fhat after each scale (the last one is not used) and classes [B]."""
        model = self.model
        x = model.inputs([None, *states[:-1]], range(len(states)))
        mod, head_mod = model.modulations(labels)
        for block in model.blocks:
            q, k, v = self.before(block, x, mod, model.rotations)
            x = self.after(block, x, self.attention(q, k, v), mod)
        return model.logits(x, head_mod)


def train_transformer(
    model: PocketVAR,
    encoder: Encoder,
    crops: Crops,
    steps: int,
    batch: int,
    progress: Progress,
    compiled: bool,
    save: Callable[[], None],
) -> None:
    """Weighted bitwise cross-entropy; scale weights grow with the grid's side (the square root of its tokens)."""
    device = model.start.device
    frozen = {id(p) for p in model.decoder.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in frozen]
    matrices, rest = ([p for p in parameters if (p.ndim > 1) == flag] for flag in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
        lr=1.5e-3, betas=(0.9, 0.97), fused=device.type == "cuda",
    )  # fmt: skip
    forward = TeacherForcing(model, compiled)
    counts = torch.tensor(model.schedule.starts).diff()
    side = counts.double().sqrt()
    weight = torch.repeat_interleave(side / side.sum() / counts, counts).float().to(device)  # [tokens]
    last = model.schedule.starts[-2]
    for step in range(1, steps + 1):
        set_rate(optimizer, 1.5e-3, step, steps, 150)
        pictures, labels = crops.batch(batch)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            z = encoder(pictures.contiguous(memory_format=torch.channels_last))
            bits, states, _ = model.quantiser(z, torch.rand(batch, device=device) * 0.2)
            target = torch.cat([b.flatten(2).transpose(1, 2) for b in bits], 1).float()
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(states, labels)
        each = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean((0, 2))  # [tokens]
        loss = (each * weight).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress(step, loss=loss, last_scale=each[last:].mean(), norm=norm)
        if step % 1000 == 0:
            save()


@torch.no_grad()
def reconstruct(model: PocketVAR, encoder: Encoder, crops: Crops) -> tuple[Tensor, dict[str, float]]:
    """Twenty crops per class through the tokenizer: a sheet (photo above, reconstruction below) and mean PSNR."""
    sheet: dict[str, Tensor] = {}
    rows: dict[str, list[float]] = {}
    while len(rows) < len(CLASSES) or min(len(r) for r in rows.values()) < 20:
        pictures, labels = crops.batch(16)
        with torch.autocast(pictures.device.type, torch.bfloat16):
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


def save_png(picture: Tensor, path: Path) -> None:
    """picture [3, H, W] in 0..1."""
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)


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
    progress = Progress("tokenizer", args.tokenizer_steps)
    train_tokenizer(model, encoder, Crops(photos, 8, device, args.seed), args.tokenizer_steps, args.tokenizer_batch, progress)
    crops = Crops(photos, 16, device, args.seed + 1)
    encoder.eval()
    sheet, means = reconstruct(model, encoder, crops)
    save_png(sheet, args.out / "reconstructions.png")
    print("tokenizer PSNR dB on its own crops:", means, flush=True)
    log["tokenizer"], log["tokenizer_psnr"] = progress.rows, means

    progress = Progress("transformer", args.steps)
    train_transformer(
        model, encoder, crops, args.steps, args.batch, progress, not args.no_compile and device.type == "cuda", save
    )
    log["transformer"] = progress.rows
    save()
    model.eval()
    save_png(sample_sheet(model), args.out / "samples.png")
    size = (args.out / "pocketvar.safetensors").stat().st_size
    log["bytes"] = size
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"{args.out / 'pocketvar.safetensors'}: {size / 2**20:.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
