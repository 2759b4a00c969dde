"""Live look-alikes with the `generate(prompt, seed) -> picture` a user has, and a clock that the tokens they draw turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import lookalikes
import torch
import torch.nn.functional as F


@dataclasses.dataclass
class TokenClock:
    """Seconds as milliseconds a token: what a picture takes hangs on how many tokens it has, and on no machine."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def watch(self, head: torch.nn.Module) -> None:
        head.register_forward_hook(lambda _module, _given, logits: setattr(self, "now", self.now + logits.shape[1] * 1e-3))


def generate_of(driven: lookalikes.Driven) -> Callable[[int, int], torch.Tensor]:
    """[1, 3, 32, 32] in 0..1 from a prompt's number and a seed."""
    model, grids = driven.model, driven.grids()

    def noise(prompt: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(prompt))

    def generate(prompt: int, seed: int) -> torch.Tensor:
        with lookalikes.autocast(driven.dtype):
            if driven.name == "infinity":
                n = 4 + prompt % 3
                text = noise(prompt, n, lookalikes.WIDTH), [n], torch.tensor([0, n], dtype=torch.int32), n
                picture = model.autoregressive_infer_cfg(
                    scale_schedule=[(1, h, w) for h, w in grids],
                    label_B_or_BLT=text,
                    B=1,
                    g_seed=seed,
                    cfg_list=[3.0] * len(grids),
                )
                picture = picture.add(1).mul(0.5)
            elif driven.name == "var":
                picture = model.autoregressive_infer_cfg(1, torch.tensor([prompt]), g_seed=seed)
            else:
                mask = torch.ones(1, lookalikes.CONTEXT, dtype=torch.long)
                picture = model.autoregressive_infer_cfg(
                    B=1, label_B=noise(prompt, 1, lookalikes.CONTEXT, lookalikes.WIDTH), g_seed=seed,
                    context_position_ids=mask.cumsum(1) - 1, context_mask=mask,
                )  # fmt: skip
        return F.interpolate(picture.float(), scale_factor=4).clamp(0, 1)

    return generate
