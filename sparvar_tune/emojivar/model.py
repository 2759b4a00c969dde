"""The emojivar transformer and its sampling.

Attention is plain: softmax of q @ k^T / sqrt(head_dim), nothing normalised, with 2-D RoPE. A caption stands before the first
scale as `prefix` tokens, which see one another and are seen by every scale; nothing else tells the model what to draw. Guidance
runs the pictures twice, once with a caption that says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.bitwise import weights
from sparvar_tune.bitwise.sampling import Attend, DenseAttention, Generating, draw_noise, grid_inputs, rope_angles, rotate
from sparvar_tune.bitwise.tokenizer import Quantiser
from sparvar_tune.emojivar.caption import CLASSES, SLOTS, Caption, caption
from sparvar_tune.emojivar.coder import Decoder
from sparvar_tune.emojivar.installed import HOW, place
from sparvar_tune.generation import drop_from, halves_apart

__all__ = [
    "CLASSES", "GRIDS", "Block", "EmojiConfig", "EmojiVAR", "Generation", "caption", "draw_noise",
    "load_emojivar", "save_weights",
]  # fmt: skip

GRIDS = ((1, 1), (2, 2), (3, 4), (6, 8), (9, 12), (12, 16), (15, 20), (18, 24), (24, 32))


@dataclass(frozen=True)
class EmojiConfig:
    slots: tuple[int, ...] = tuple(SLOTS.values())
    bits: int = 24
    depth: int = 8
    heads: int = 5
    head_dim: int = 64
    mlp: int = 896
    grids: tuple[tuple[int, int], ...] = GRIDS

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def prefix(self) -> int:
        """Tokens of a caption: one that begins it, and a word a slot."""
        return 1 + len(self.slots)

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids, self.prefix)


class Block(nn.Module):
    def __init__(self, config: EmojiConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, config.mlp), nn.Linear(config.mlp, width)
        for last in (self.proj, self.fc2):
            nn.init.normal_(last.weight, std=0.02 / (2 * config.depth) ** 0.5)
            nn.init.zeros_(last.bias)


class EmojiVAR(nn.Module):
    """Decoder-only VAR over the bits of `Quantiser`; see the module docstring."""

    rotations: Tensor
    offsets: Tensor
    logit_bound: None = None  # nothing bounds plain attention
    attend: Attend  # what sampling uses unless told otherwise; `sparvar_tune.apply` replaces it

    def __init__(self, config: EmojiConfig | None = None) -> None:
        super().__init__()
        self.config = config or EmojiConfig()
        c, width = self.config, self.config.width
        self.schedule = c.schedule
        self.softmax_scale = c.head_dim**-0.5
        self.attend = DenseAttention(self.softmax_scale)
        self.quantiser = Quantiser(self.schedule.grids, c.bits)
        self.decoder = Decoder(c.bits)
        # word 0 begins a caption; each slot then has "unsaid" and its own words
        self.words = nn.Embedding(1 + sum(1 + n for n in c.slots), width)
        self.levels = nn.Embedding(len(c.grids), width)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.embed = nn.Linear(c.bits, width)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(c) for _ in range(c.depth))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, c.bits)
        self.register_buffer("rotations", rope_angles(self.schedule, c.head_dim), persistent=False)
        firsts = torch.tensor([1, *(1 + n for n in c.slots[:-1])]).cumsum(0)
        self.register_buffer("offsets", firsts, persistent=False)
        nn.init.normal_(self.words.weight, std=0.3)
        nn.init.normal_(self.levels.weight, std=0.1)

    # The steps around attention are pure functions of tensors, shared by training and sampling.

    def prefix(self, captions: Tensor) -> Tensor:
        """[B, prefix, width] of captions [B, slots]; -1 leaves a word unsaid."""
        return self.words(F.pad(self.offsets + captions + 1, (1, 0)))

    def inputs(self, states: Sequence[Tensor | None], scales: range) -> Tensor:
        """[B, tokens of `scales`, width] from fhat [B, C, H, W] *before* each scale (None: nothing drawn yet)."""
        return grid_inputs(self.schedule, self.start, self.levels.weight, self.embed, states, scales)

    def before_attention(
        self, block: Block, x: Tensor, turns: Tensor, into: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """x [B, N, width], turns of `turns_of` -> q, k, v [B, H, N, D]; into: three tensors that take them."""
        q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        if into is not None:
            return rotate(q.float(), turns, into[0]), rotate(k.float(), turns, into[1]), into[2].copy_(v)
        return rotate(q.float(), turns).to(v), rotate(k.float(), turns).to(v), v

    def after_attention(self, block: Block, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, N, width] after the attention output [B, H, N, D] and the MLP."""
        x = x + self.attention_part(block, attended)
        return x + self.mlp_part(block, x)

    def attention_part(self, block: Block, attended: Tensor) -> Tensor:
        """[B, N, width]: what the attention output [B, H, N, D] adds."""
        return block.proj(attended.transpose(1, 2).flatten(2))

    def mlp_part(self, block: Block, x: Tensor) -> Tensor:
        """[B, N, width]: what the MLP adds to x [B, N, width]."""
        return block.fc2(F.gelu(block.fc1(block.norm2(x))))

    def raw_queries(self, block: Block, x: Tensor) -> Tensor:
        """[B, H, N, D] of x [B, N, width]: no bias or rotation."""
        raw = F.linear(block.norm1(x), block.qkv.weight[: self.config.width])
        return raw.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def logits(self, x: Tensor) -> Tensor:
        """[B, N, bits] from the last block's x [B, N, width]."""
        return self.head(self.norm(x))


class Generation(Generating):
    """One batch of pictures on its way from coarse to fine; see `Generating`.

    captions: one per picture, such as `caption(thing, seed)`. guidance t >= 0: logits are (1 + t) of the captioned row less t of
    the uncaptioned one; at 0, and where a policy's steps drop the unconditional half, that row is not run. An attention that
    `fork` is given is one that begins with the next scale.
    """

    model: EmojiVAR

    def __init__(
        self,
        model: EmojiVAR,
        captions: Sequence[Caption],
        noise: Tensor,
        temperature: float,
        guidance: float,
        attend: Attend | None = None,
    ) -> None:
        slots, n = model.config.slots, len(captions)
        for words in captions:
            if len(words) != len(slots) or not all(-1 <= w < most for w, most in zip(words, slots, strict=True)):
                raise ValueError(f"caption {words}: want {len(slots)} words, each 0 up to and without {slots}, -1 for unsaid")
        if not captions:
            raise ValueError("captions: got none, want at least one")
        if guidance < 0:
            raise ValueError(f"guidance={guidance}: want >= 0")
        rows = n if guidance == 0 else 2 * n
        super().__init__(model, n, rows, noise, temperature, attend or model.attend)
        self.guidance = guidance
        said = torch.tensor(captions, device=model.start.device)
        said = said if guidance == 0 else torch.cat((said, torch.full_like(said, -1)))
        with torch.inference_mode():
            self.read(model.prefix(said))

    @property
    def kind(self) -> tuple[Any, ...]:
        return *super().kind, self.guidance

    def fitted(self, attend: Attend) -> Attend:
        fits: Attend = halves_apart(attend, 2 * self.fhat.shape[0])
        return fits

    def narrow(self) -> None:
        policy = getattr(self.attend, "policy", None)
        dropped = None if policy is None else drop_from(policy)
        if dropped is not None and self.scale >= dropped:
            self.rows = self.fhat.shape[0]
            self.cache = self.cache[:, :, : self.rows]

    def draw(self, through: Callable[[Tensor], Tensor]) -> None:
        model, i, n = self.model, self.scale, self.fhat.shape[0]
        halves = self.rows // n
        x = model.inputs([self.fhat.to(model.head.weight.dtype) if i else None], range(i, i + 1))
        logits = model.logits(through(x.expand(n, -1, -1).repeat(halves, 1, 1)))
        if halves == 2:
            with_caption, without = logits.float().chunk(2)
            logits = (1 + self.guidance) * with_caption - self.guidance * without
        self.take(logits.float())


def save_weights(model: EmojiVAR, path: Path, note: dict[str, str]) -> None:
    """Writes everything as fp16, but amplitudes as fp32: they are few."""
    weights.save(model, path, lambda name: torch.float32 if name.startswith("quantiser") else torch.float16, note)


def load_emojivar(path: Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> EmojiVAR:
    """The trained model, in eval mode. Raises FileNotFoundError or ValueError (damaged file) with what to do."""
    fields, tensors = weights.load(path or place("emojivar.safetensors"), "emojivar", HOW)
    grids = tuple((int(h), int(w)) for h, w in fields["grids"])
    model = EmojiVAR(EmojiConfig(**{**fields, "grids": grids, "slots": tuple(fields["slots"])}))
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=dtype).eval()
