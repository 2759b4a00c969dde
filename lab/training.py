"""What training the models in the box shares: steps or time, rates, the tokenizer's loop, attention to all scales."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule


class Phase:
    """Steps 1, 2, .. of a phase until `steps` are done or `seconds` are over; one line every few seconds with the time left."""

    def __init__(self, name: str, steps: int | None = None, seconds: float = math.inf, every_s: float = 10.0) -> None:
        self.name, self.steps, self.seconds, self.every_s = name, steps, seconds, every_s
        self.rows: list[dict[str, float | str]] = []
        self.step = 0
        self.begun = self.shown = time.monotonic()

    @property
    def share(self) -> float:
        """How much of the phase is done, 0..1."""
        by_steps = 0.0 if self.steps is None else self.step / self.steps
        return min(1.0, max(by_steps, (time.monotonic() - self.begun) / self.seconds))

    def __iter__(self) -> Iterator[int]:
        self.begun = self.shown = time.monotonic()
        while self.share < 1:
            self.step += 1
            yield self.step

    def tell(self, **values: Tensor) -> None:
        now = time.monotonic()
        if now - self.shown < self.every_s and self.step != 1 and self.share < 1:
            return
        self.shown = now
        numbers = {name: round(float(v.detach()), 4) for name, v in values.items()}  # the only host sync
        elapsed = time.monotonic() - self.begun
        self.rows.append({"phase": self.name, "step": self.step, "seconds": round(elapsed, 1), **numbers})
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if bad:
            raise SystemExit(f"{self.name} step {self.step}: {bad[0]} is {numbers[bad[0]]}; start again with a lower --rate")
        left = elapsed * (1 / max(self.share, 1e-9) - 1)
        shown = "  ".join(f"{k} {v}" for k, v in numbers.items())
        each = elapsed / self.step * 1e3
        print(f"{self.name} step {self.step} ({self.share:.0%})  {shown}  {each:.0f} ms/step  {left:.0f} s left", flush=True)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, phase: Phase, warmup: int) -> None:
    """Linear warm-up over so many steps, then cosine down to 2 % of `peak`."""
    share = min(1.0, phase.step / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * phase.share)))
    for group in optimizer.param_groups:
        group["lr"] = peak * share


def autocast(like: Tensor) -> torch.autocast:
    """bf16 on a GPU; a CPU without bf16 units would take a hundred times as long."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=like.is_cuda)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """[B] dB between pictures [B, 3, H, W] in 0..1."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)))


def save_png(picture: Tensor, path: Path) -> None:
    """picture [3, H, W] in 0..1."""
    array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)


def train_tokenizer(
    model: Any, encoder: nn.Module, pictures_of: Callable[[int], Tensor], batch: int, first_early: int, phase: Phase
) -> None:
    """Encoder, amplitudes and decoder of a model. pictures_of(n): [n, 3, H, W] in -1..1.

    Loss L1 + 2 MSE + 0.5 L1 of gradients. A quarter of each batch has flipped bits, a quarter stops early, at a scale from
    `first_early` on.
    """
    quantiser, decoder = model.quantiser, model.decoder
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    quarter = max(1, batch // 4)
    device = model.start.device
    for step in phase:
        set_rate(optimizer, 2e-3, phase, 200)
        pictures = pictures_of(batch)
        with autocast(pictures):
            z = encoder(pictures.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            flip = torch.zeros(batch, device=device)
            flip[:quarter] = torch.rand(quarter, device=device) * 0.15
            _, states, sizes = quantiser(z.detach(), flip)
            quantiser.amplitude.lerp_(sizes, 0.02 if step > 100 else 0.2)
            early = int(torch.randint(first_early, len(states), ()))
            fhat = states[-1].clone()
            fhat[quarter : 2 * quarter] = states[early][quarter : 2 * quarter]
        passed = z + (fhat - z).detach()  # straight through
        with autocast(pictures):
            output = decoder(passed).float()
        error = output - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        commit = (z[2 * quarter :] - fhat[2 * quarter :]).square().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.1 * commit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        phase.tell(loss=loss, psnr=psnr(output[2 * quarter :] / 2 + 0.5, pictures[2 * quarter :] / 2 + 0.5).mean())


class BlockCausal:
    """Attention of all scales at once, each to itself and all before: one masked call for the prefix and the first
    `masked_scales`, which are so small that one call beats many, and one call for each larger scale."""

    def __init__(self, schedule: ScaleSchedule, masked_scales: int, softmax_scale: float, device: torch.device) -> None:
        self.softmax_scale = softmax_scale
        self.starts = schedule.starts[min(masked_scales, len(schedule)) :]
        blocks = torch.tensor((0, *schedule.starts)).diff()  # the prefix is a block of its own
        block_of = torch.repeat_interleave(torch.arange(len(blocks)), blocks)[: self.starts[0]].to(device)
        self.mask = block_of[:, None] >= block_of[None, :]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(begin: int, end: int, mask: Tensor | None = None) -> Tensor:
            return F.scaled_dot_product_attention(
                q[:, :, begin:end], k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=self.softmax_scale
            )

        out = [attend(0, self.starts[0], self.mask)]
        out += [attend(begin, end) for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return torch.cat(out, 2)


def scale_weights(schedule: ScaleSchedule) -> Tensor:
    """[tokens on grids] that sum to one; a scale's share grows with its grid's side (the square root of its tokens)."""
    counts = torch.tensor(schedule.starts).diff()
    side = counts.double().sqrt()
    return torch.repeat_interleave(side / side.sum() / counts, counts).float()


def adamw(model: Any, rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """For everything but the decoder; weight decay on matrices alone."""
    frozen = {id(p) for p in model.decoder.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in frozen]
    matrices, rest = ([p for p in parameters if (p.ndim > 1) == flag] for flag in (True, False))
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
        lr=rate, betas=betas, fused=model.start.is_cuda,
    )  # fmt: skip
