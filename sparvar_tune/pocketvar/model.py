"""The pocketvar transformer and its sampling.

Attention is cosine (queries and keys L2-normalised, a learned scale per head folded into the query, so |logit| is at
most `logit_bound`) with 2-D RoPE, as in Infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.bitwise import weights
from sparvar_tune.bitwise.sampling import Attend, DenseAttention, Generating, draw_noise, grid_inputs, rope_angles, rotate
from sparvar_tune.bitwise.tokenizer import Quantiser
from sparvar_tune.pocketvar.coder import Decoder

__all__ = [
    "CLASSES", "DENSE", "SIDES", "WEIGHTS", "Attend", "Block", "Generation", "PocketConfig", "PocketVAR", "draw_noise",
    "load_pocketvar", "save_weights",
]  # fmt: skip

WEIGHTS = Path(__file__).with_name("pocketvar.safetensors")

# What it draws, by class index; the photos each is made of are in lab/pocketvar/photos.py.
CLASSES: tuple[str, ...] = (
    "astronaut", "cat", "coffee", "motorcycle", "rocket", "galaxies", "retina", "tissue", "pagoda", "flower",
)  # fmt: skip
SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


@dataclass(frozen=True)
class PocketConfig:
    classes: int = 10
    bits: int = 16
    depth: int = 8
    heads: int = 4
    head_dim: int = 64
    mlp: int = 768
    sides: tuple[int, ...] = SIDES

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.square(self.sides)


DENSE = DenseAttention(1.0)


class Block(nn.Module):
    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        width = config.width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, config.mlp), nn.Linear(config.mlp, width)
        self.log_scale = nn.Parameter(torch.full((config.heads,), 10.0).log())
        # added to the shared modulation: shift, scale, gate for attention, then for the MLP; gates start at 1
        bias = torch.zeros(6, width)
        bias[2] = bias[5] = 1
        self.modulation = nn.Parameter(bias)


class PocketVAR(nn.Module):
    """Decoder-only VAR over the bits of `Quantiser`; see the module docstring."""

    rotations: Tensor
    softmax_scale = 1.0
    attend: Attend = DENSE  # what sampling uses unless told otherwise; `sparvar_tune.apply` replaces it

    def __init__(self, config: PocketConfig | None = None) -> None:
        super().__init__()
        self.config = config or PocketConfig()
        c, width = self.config, self.config.width
        self.schedule = c.schedule
        self.quantiser = Quantiser(self.schedule.grids, c.bits)
        self.decoder = Decoder(c.bits)
        self.class_embedding = nn.Embedding(c.classes, width)
        self.level_embedding = nn.Embedding(len(c.sides), width)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.embed = nn.Linear(c.bits, width)
        self.condition = nn.Linear(width, 6 * width)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(c) for _ in range(c.depth))  # type: ignore[assignment]
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, c.bits)
        self.register_buffer("rotations", rope_angles(self.schedule, c.head_dim), persistent=False)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        nn.init.zeros_(self.head_modulation.weight)
        nn.init.zeros_(self.head_modulation.bias)

    @property
    def logit_bound(self) -> float:
        """The largest |attention logit| any head can make: cosine <= 1 times its learned scale."""
        return max(float(self.head_scale(b).detach().max()) for b in self.blocks)

    @staticmethod
    def head_scale(block: Block) -> Tensor:
        """[heads]: the learned attention scale, at most 100 as in Infinity."""
        return block.log_scale.clamp(max=math.log(100.0)).exp()

    # The three steps around attention are pure functions of tensors, shared by training and sampling.

    def inputs(self, states: Sequence[Tensor | None], scales: range) -> Tensor:
        """[B, tokens of `scales`, width] from fhat [B, C, H, W] *before* each scale (None: nothing drawn yet)."""
        return grid_inputs(self.schedule, self.start, self.level_embedding.weight, self.embed, states, scales)

    def modulations(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shared block modulation [B, 6, width] and head modulation [B, 2, width] of the classes [B]."""
        c = F.silu(self.class_embedding(labels))
        return self.condition(c).unflatten(-1, (6, -1)), self.head_modulation(c).unflatten(-1, (2, -1))

    def before_attention(
        self, block: Block, x: Tensor, turns: Tensor, mod: Tensor, into: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """x [B, N, width], turns of `turns_of` -> q, k, v [B, H, N, D]; q carries the head's learned scale.

        into: three tensors that take them.
        """
        qk, v = (
            block.qkv(self._attention_input(block, x, mod))
            .unflatten(-1, (3 * self.config.heads, -1))
            .transpose(1, 2)
            .split((2 * self.config.heads, self.config.heads), 1)
        )
        q, k = F.normalize(qk.float(), dim=-1).chunk(2, 1)
        q = q * self.head_scale(block).view(1, -1, 1, 1)
        if into is not None:
            return rotate(q, turns, into[0]), rotate(k, turns, into[1]), into[2].copy_(v)
        return rotate(q, turns).to(v), rotate(k, turns).to(v), v

    def after_attention(self, block: Block, x: Tensor, attended: Tensor, mod: Tensor) -> Tensor:
        """x [B, N, width] after the attention output [B, H, N, D] and the MLP."""
        x = x + self.attention_part(block, attended, mod)
        return x + self.mlp_part(block, x, mod)

    def attention_part(self, block: Block, attended: Tensor, mod: Tensor) -> Tensor:
        """[B, N, width]: what the attention output [B, H, N, D] adds."""
        return (mod + block.modulation)[:, 2:3] * block.proj(attended.transpose(1, 2).flatten(2))

    def mlp_part(self, block: Block, x: Tensor, mod: Tensor) -> Tensor:
        """[B, N, width]: what the MLP adds to x [B, N, width]."""
        shift, scale, gate = (mod + block.modulation)[:, 3:].unbind(1)
        return gate[:, None] * block.fc2(F.gelu(block.fc1(modulated_norm(x, shift, scale))))

    def raw_queries(self, block: Block, x: Tensor, mod: Tensor) -> Tensor:
        """[B, H, N, D] of x [B, N, width]: no bias, norm, rotation or learned factor."""
        raw = F.linear(self._attention_input(block, x, mod), block.qkv.weight[: self.config.width])
        return raw.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    @staticmethod
    def _attention_input(block: Block, x: Tensor, mod: Tensor) -> Tensor:
        return modulated_norm(x, *(mod + block.modulation)[:, :2].unbind(1))

    def logits(self, x: Tensor, mod: Tensor) -> Tensor:
        """[B, N, bits] from the last block's x [B, N, width]."""
        return self.head(modulated_norm(x, *mod.unbind(1)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x [B, N, width] times 1 + scale, plus shift, both [B, width]; of one picture in one pass."""
    if len(x) == 1 and x.dtype == scale.dtype == shift.dtype:  # under autocast they are not
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0])
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale)[:, None] + shift[:, None]


class Generation(Generating):
    """One batch of pictures on its way from coarse to fine. classes: one class index per picture; see `Generating`."""

    model: PocketVAR
    constants = ("noise", "modulation", "head_modulation")

    def __init__(
        self, model: PocketVAR, classes: Sequence[int], noise: Tensor, temperature: float, attend: Attend | None = None
    ) -> None:
        known = model.config.classes
        if not classes or not all(0 <= k < known for k in classes):
            raise ValueError(f"classes={list(classes)}: want class indices 0..{known - 1}, at least one")
        super().__init__(model, len(classes), len(classes), noise, temperature, attend or model.attend)
        labels = torch.tensor(classes, device=model.start.device)
        self.modulation, self.head_modulation = model.modulations(labels)

    @property
    def told(self) -> tuple[Tensor, ...]:
        return (self.modulation,)

    def draw(self, through: Callable[[Tensor], Tensor]) -> None:
        model, i = self.model, self.scale
        x = model.inputs([self.fhat.to(model.head.weight.dtype) if i else None], range(i, i + 1))
        x = through(x.expand(self.fhat.shape[0], -1, -1))
        self.take(model.logits(x, self.head_modulation).float())


def save_weights(model: PocketVAR, path: Path, note: dict[str, str]) -> None:
    """Writes matrices as bf16 and the decoder as fp16 (its activations tolerate it; it halves the wheel)."""
    weights.save(model, path, lambda name: torch.float16 if name.startswith("decoder") else torch.bfloat16, note)


def load_pocketvar(path: Path = WEIGHTS, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PocketVAR:
    """The trained model, in eval mode. Raises FileNotFoundError or ValueError (damaged file) with what to do."""
    fields, tensors = weights.load(path, "pocketvar", "reinstall the package or run python -m lab.pocketvar.train")
    model = PocketVAR(PocketConfig(**{**fields, "sides": tuple(fields["sides"])}))
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=dtype).eval()
