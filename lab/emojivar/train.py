"""Trains emojivar from nothing: `python -m lab.emojivar.train --pictures runs/emojivar/emoji.npz --out runs/emojivar`.

Two phases that share `--minutes`: the tokenizer (autoencoder and residual bits), then the transformer on the frozen bits. Meant
for one H100; a CPU can run `--smoke` only, which checks the code, not the model. `--start FOLDER` goes on from the weights of
an earlier run, whose tokenizer stays. A tenth of all captions is held out: the log's end says how well they are drawn.
Writes emojivar.safetensors (the shipped file), encoder.safetensors, samples.png, reconstructions.png and log.json into --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.emojivar.pictures import Scenes
from lab.training import BlockCausal, Phase, adamw, autocast, psnr, save_png, scale_weights, set_rate, train_tokenizer
from sparvar_tune.bitwise.sampling import turns_of
from sparvar_tune.emojivar.caption import CLASSES, say
from sparvar_tune.emojivar.coder import Encoder
from sparvar_tune.emojivar.model import EmojiConfig, EmojiVAR, Generation, draw_noise, load_emojivar, save_weights

MASKED_SCALES = 5  # the prefix and scales up to 9x12: 181 tokens in one masked call
UNSAID, WORD_UNSAID = 0.1, 0.03  # how often a caption, or else one of its words, is left out
EMA = 0.999
SHEET_ROWS = ((1.0, 0.0), (1.0, 1.0), (0.7, 0.0), (0.7, 1.0), (0.7, 2.0), (0.5, 1.0), (0.0, 1.0))  # temperature, guidance


class TeacherForcing:
    """Prefix and all scales at once: the logits that sampling sees scale by scale."""

    def __init__(self, model: EmojiVAR, compiled: bool) -> None:
        self.model, self.compiled = model, compiled
        self.attention = BlockCausal(model.schedule, MASKED_SCALES, model.config.head_dim**-0.5, model.start.device)
        self.before = torch.compile(model.before_attention) if compiled else model.before_attention
        self.after = torch.compile(model.after_attention) if compiled else model.after_attention

    def __call__(self, states: list[Tensor], captions: Tensor) -> Tensor:
        """Logits [B, tokens on grids, bits] from fhat after each scale (the last one is not used) and captions [B, slots]."""
        model = self.model
        drawn = model.inputs([None, *states[:-1]], range(len(states)))
        x = torch.cat((model.prefix(captions), drawn.expand(len(captions), -1, -1)), 1)
        turns = turns_of(model.rotations)
        for block in model.blocks:
            q, k, v = self.before(block, x, turns)
            x = self.after(block, x, self.attention(q, k, v))
        return model.logits(x[:, model.schedule.prefix :])


def encode(model: EmojiVAR, encoder: nn.Module, pictures: Tensor, most_flips: float) -> tuple[list[Tensor], Tensor]:
    """fhat after each scale, and the true bits [B, tokens on grids, bits]. Up to `most_flips` of a picture's bits turned over."""
    with torch.no_grad(), autocast(pictures):
        z = encoder(pictures.contiguous(memory_format=torch.channels_last))
        flip = torch.rand(len(pictures), device=pictures.device) * most_flips if most_flips else None
        bits, states, _ = model.quantiser(z, flip)
        return states, torch.cat([b.flatten(2).transpose(1, 2) for b in bits], 1).float()


def bit_losses(forward: TeacherForcing, states: list[Tensor], captions: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each token's bits, [tokens on grids]."""
    with autocast(target):
        logits = forward(states, captions)
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean((0, 2))


def compiled_if_it_works(model: EmojiVAR, encoder: nn.Module, scenes: Scenes, batch: int) -> TeacherForcing:
    """With torch.compile where that does here what it should, else without. Takes the compile time out of the first step."""
    forward = TeacherForcing(model, True)
    try:
        pictures, captions = scenes.batch(batch)
        states, target = encode(model, encoder, pictures, 0.2)
        bit_losses(forward, states, captions, target).mean().backward()
    except Exception as error:  # whatever it is, training without it is right, and slower
        print(f"torch.compile does not work here, so without: {' '.join(str(error).split())[:300]}", flush=True)
        forward = TeacherForcing(model, False)
    model.zero_grad(set_to_none=True)
    return forward


def train_transformer(
    model: EmojiVAR, encoder: nn.Module, scenes: Scenes, batch: int, rate: float, phase: Phase, forward: TeacherForcing,
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Weighted bitwise cross-entropy. What is kept in the end is an average of the weights over about 1 / (1 - EMA) steps."""
    device = model.start.device
    optimizer = adamw(model, rate, (0.9, 0.97))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = [p.detach().clone() for p in parameters]
    weight = scale_weights(model.schedule).to(device)
    last = model.schedule.starts[-2] - model.schedule.prefix
    saved = time.monotonic()
    for step in phase:
        set_rate(optimizer, rate, phase, 300)
        pictures, captions = scenes.batch(batch)
        unsaid = torch.rand(captions.shape, device=device) < WORD_UNSAID
        unsaid |= torch.rand(batch, 1, device=device) < UNSAID
        states, target = encode(model, encoder, pictures, 0.2)
        each = bit_losses(forward, states, captions.masked_fill(unsaid, -1), target)
        loss = (each * weight).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(EMA, step / (step + 10)))
        phase.tell(loss=loss, last_scale=each[last:].mean(), norm=norm)
        if time.monotonic() - saved > 60:
            save()
            saved = time.monotonic()
    with torch.no_grad():
        for p, kept in zip(parameters, average, strict=True):
            p.copy_(kept)


@torch.no_grad()
def held_out_losses(model: EmojiVAR, encoder: nn.Module, scenes: Scenes, batch: int) -> dict[str, list[float]]:
    """Cross-entropy by scale, nothing turned over, of captions in training and of held-out ones."""
    forward, starts = TeacherForcing(model, False), model.schedule.starts
    found = {}
    for name, held_out in (("in training", False), ("held out", True)):
        sums = torch.zeros(model.schedule.num_tokens - model.schedule.prefix, device=model.start.device)
        for _ in range(4):
            pictures, captions = scenes.batch(batch, held_out)
            states, target = encode(model, encoder, pictures, 0.0)
            sums += bit_losses(forward, states, captions, target) / 4
        bounds = [s - model.schedule.prefix for s in starts]
        found[name] = [round(float(sums[a:b].mean()), 4) for a, b in pairwise(bounds)]
    return found


@torch.no_grad()
def sheets(model: EmojiVAR, encoder: nn.Module, scenes: Scenes) -> tuple[Tensor, list[dict[str, float]], list[str]]:
    """One held-out caption of every thing (columns). Rows: the true picture, the tokenizer's, then samples by `SHEET_ROWS`.

    And by row the mean PSNR (dB) to the true picture, and the captions.
    """
    captions = scenes.one_of_each(held_out=True)
    truth = scenes.draw(captions)
    states, _ = encode(model, encoder, truth, 0.0)
    rows = [truth / 2 + 0.5, (model.decoder(states[-1]).float() / 2 + 0.5).clamp(0, 1)]
    told = [{"tokenizer_psnr": round(float(psnr(rows[1], rows[0]).mean()), 2)}]
    noise = torch.stack([draw_noise(model.schedule, model.config.bits, 100 + k) for k in range(len(captions))])
    words = [tuple(int(w) for w in row) for row in captions]
    for temperature, guidance in SHEET_ROWS:
        rows.append(Generation(model, words, noise, temperature, guidance).run().pictures())
        db = round(float(psnr(rows[-1], rows[0]).mean()), 2)
        told.append({"temperature": temperature, "guidance": guidance, "psnr_to_truth": db})
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1), told, [say(w) for w in words]


@torch.no_grad()
def tokenizer_psnr(model: EmojiVAR, encoder: nn.Module, scenes: Scenes, batch: int) -> dict[str, float]:
    """Mean dB by thing over some 20 batches."""
    rows: dict[int, list[float]] = {}
    for _ in range(20):
        pictures, captions = scenes.batch(batch)
        states, _ = encode(model, encoder, pictures, 0.0)
        output = (model.decoder(states[-1]).float() / 2 + 0.5).clamp(0, 1)
        for thing, db in zip(captions[:, 0].tolist(), psnr(output, pictures / 2 + 0.5).tolist(), strict=True):
            rows.setdefault(thing, []).append(db)
    means = {CLASSES[k]: round(sum(v) / len(v), 2) for k, v in sorted(rows.items())}
    return means | {"mean": round(sum(means.values()) / len(means), 2)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.emojivar.train", description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="what python -m lab.emojivar.pictures wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, sheets and log")
    parser.add_argument("--start", type=Path, help="folder of an earlier run to go on from; its tokenizer is kept")
    parser.add_argument("--minutes", type=float, default=8.0, help="of both phases; start and end take about one more")
    parser.add_argument("--tokenizer-share", type=float, default=0.31, help="of these minutes")
    parser.add_argument("--tokenizer-batch", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile (slower, starts at once)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model: checks the code only")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    steps = 3 if args.smoke else None
    config = EmojiConfig(depth=2, heads=2, head_dim=32, mlp=64) if args.smoke else EmojiConfig()
    model = (load_emojivar(args.start / "emojivar.safetensors") if args.start else EmojiVAR(config)).to(device).train()
    encoder = Encoder(model.config.bits).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    log: dict[str, object] = {"torch": torch.__version__, "arguments": {k: str(v) for k, v in vars(args).items()}}
    log["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log["parameters"] = sum(p.numel() for p in model.parameters())

    def save() -> None:
        partial = args.out / "emojivar.safetensors.part"
        save_weights(model, partial, {"licence": "CC-BY-4.0; see MODEL_CARD.md"})
        partial.replace(args.out / "emojivar.safetensors")
        (args.out / "log.json").write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", "utf-8")

    scenes = Scenes(args.pictures, device, args.seed)
    if args.start:
        encoder.load_state_dict(load_file(args.start / "encoder.safetensors"))
    else:
        phase = Phase("tokenizer", steps, args.minutes * 60 * args.tokenizer_share)
        train_tokenizer(model, encoder, lambda n: scenes.batch(n)[0], args.tokenizer_batch, 4, phase)
        log["tokenizer"] = phase.rows
    tensors = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    save_file(tensors, args.out / "encoder.safetensors")
    encoder.eval()
    log["tokenizer_psnr"] = tokenizer_psnr(model, encoder, scenes, args.batch)
    print("tokenizer PSNR dB:", log["tokenizer_psnr"], flush=True)
    save()

    if args.no_compile or device.type != "cuda":
        forward = TeacherForcing(model, False)
    else:
        forward = compiled_if_it_works(model, encoder, scenes, args.batch)
    log["compiled"] = forward.compiled
    print(f"compiled: {forward.compiled}, {time.monotonic() - begun:.0f} s since the start", flush=True)
    phase = Phase("transformer", steps, args.minutes * 60 - (time.monotonic() - begun))
    log["transformer"] = phase.rows
    train_transformer(model, encoder, scenes, args.batch, args.rate, phase, forward, save)
    model.eval()
    save()  # what follows only looks
    log["bit_losses"] = held_out_losses(model, encoder, scenes, args.batch)
    as_shipped = load_emojivar(args.out / "emojivar.safetensors", str(device))
    sheet, log["samples"], log["captions"] = sheets(as_shipped, encoder, scenes)
    small = F.interpolate(sheet[None], scale_factor=0.5, mode="area")[0]
    save_png(sheet[:, : 2 * 192], args.out / "reconstructions.png")
    save_png(small, args.out / "samples.png")
    log["bytes"] = (args.out / "emojivar.safetensors").stat().st_size
    log["seconds"] = round(time.monotonic() - begun)
    (args.out / "log.json").write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps({name: log[name] for name in ("bit_losses", "samples", "bytes", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
