"""The pocketvar transformer and its sampling.

Attention is cosine (queries and keys L2-normalised, a learned scale per head folded into the query, so |logit| is at
most `logit_bound`) with 2-D RoPE over coordinates stretched to the last grid, as in Infinity. Sampling is a pure
function of (class, seed, temperature): all noise is drawn up front on the CPU, so dense and sparse attention get the
same noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.pocketvar.thinning import Given, Thinning
from sparvar_tune.pocketvar.tokenizer import Decoder, Quantiser, pool

WEIGHTS = Path(__file__).with_name("pocketvar.safetensors")

# What it draws, by class index; the photos each is made of are in lab/pocketvar/photos.py.
CLASSES: tuple[str, ...] = (
    "astronaut", "cat", "coffee", "motorcycle", "rocket", "galaxies", "retina", "tissue", "pagoda", "flower",
)  # fmt: skip
CPU_PORTION = 512  # tokens; of 256, 512, 1024, 2048 and all at once the fastest on 2 cores
SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


class Attend(Protocol):
    """(q [B, H, Nq, D], k, v [B, H, Nk, D], layer, scale_index) -> [B, H, Nq, D]; the softmax scale is 1."""

    @property
    def skip_scales(self) -> tuple[int, ...]:
        """Trailing scales the generation leaves out."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor: ...


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


class DenseAttention:
    """PyTorch's scaled_dot_product_attention: the dense baseline everywhere in this project."""

    skip_scales: tuple[int, ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


DENSE = DenseAttention()


def _rotations(schedule: ScaleSchedule, head_dim: int) -> Tensor:
    """[tokens, head_dim / 2] angles: the first half of the pairs turns with y, the second with x."""
    full = schedule.grids[-1]
    freqs = 1.5 * 100.0 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    angles = []
    for h, w in schedule.grids:
        y = (torch.arange(h) + 0.5) / h * full[0]
        x = (torch.arange(w) + 0.5) / w * full[1]
        yx = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2, 1)
        angles.append((yx * freqs).flatten(1))
    return torch.cat(angles)


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
        self.register_buffer("rotations", _rotations(self.schedule, c.head_dim), persistent=False)
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
        out = []
        for i, fhat in zip(scales, states, strict=True):
            level = self.level_embedding.weight[i]
            if fhat is None:
                out.append((self.start + level).expand(1, self.schedule.num_queries(i), -1))
            else:
                out.append(self.embed(pool(fhat, self.schedule.grids[i]).flatten(2).transpose(1, 2)) + level)
        batch = max(x.shape[0] for x in out)
        return torch.cat([x.expand(batch, -1, -1) for x in out], 1)

    def modulations(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shared block modulation [B, 6, width] and head modulation [B, 2, width] of the classes [B]."""
        c = F.silu(self.class_embedding(labels))
        return self.condition(c).unflatten(-1, (6, -1)), self.head_modulation(c).unflatten(-1, (2, -1))

    def before_attention(self, block: Block, x: Tensor, mod: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
        """x [B, N, width] -> q, k, v [B, H, N, D]; q carries the head's learned scale."""
        shift, scale = (mod + block.modulation)[:, :2].unsqueeze(2).unbind(1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = block.qkv(y).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        q = q * self.head_scale(block).view(1, -1, 1, 1)
        cos, sin = angles.cos(), angles.sin()
        q, k = (torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
                for a, b in (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (q, k)))  # fmt: skip
        return q.to(v), k.to(v), v

    def after_attention(self, block: Block, x: Tensor, attended: Tensor, mod: Tensor) -> Tensor:
        """x [B, N, width] after the attention output [B, H, N, D] and the MLP."""
        x = x + self.attention_part(block, attended, mod)
        return x + self.mlp_part(block, x, mod)

    def attention_part(self, block: Block, attended: Tensor, mod: Tensor) -> Tensor:
        """[B, N, width]: what the attention output [B, H, N, D] adds."""
        return (mod + block.modulation)[:, 2:3] * block.proj(attended.transpose(1, 2).flatten(2))

    def mlp_part(self, block: Block, x: Tensor, mod: Tensor) -> Tensor:
        """[B, N, width]: what the MLP adds to x [B, N, width]."""
        shift, scale, gate = (mod + block.modulation)[:, 3:].unsqueeze(2).unbind(1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return gate * block.fc2(F.gelu(block.fc1(y)))

    def logits(self, x: Tensor, mod: Tensor) -> Tensor:
        """[B, N, bits] from the last block's x [B, N, width]."""
        shift, scale = mod.unsqueeze(2).unbind(1)
        return self.head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


def draw_noise(schedule: ScaleSchedule, bits: int, seed: int) -> Tensor:
    """[tokens, bits] logistic noise, float32 on the CPU: the whole randomness of one picture."""
    u = torch.rand(schedule.num_tokens, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.logit(u.clamp(1e-9, 1 - 1e-9)).float()


def portions(x: Tensor) -> list[slice]:
    """Everything but attention works on the tokens of x [B, N, C] one by one; on a CPU in portions that stay in cache."""
    tokens = x.shape[1]
    portion = CPU_PORTION if x.device.type == "cpu" else tokens
    return [slice(a, min(a + portion, tokens)) for a in range(0, tokens, portion)]


class Generation:
    """One batch of pictures on its way from coarse to fine; `step` draws the next scale.

    classes: one class index per picture; noise [tokens, bits] or [B, tokens, bits] from `draw_noise`.
    Temperature 0 is greedy. `attend` may be changed between steps; `fork` copies the state, so that several ways to
    do the last scales can start from the same coarse picture.
    """

    def __init__(
        self, model: PocketVAR, classes: Sequence[int], noise: Tensor, temperature: float, attend: Attend | None = None
    ) -> None:
        self.model, self.noise, self.temperature, self.attend = model, noise, temperature, attend or model.attend
        c, device = model.config, model.start.device
        if not classes or not all(0 <= k < c.classes for k in classes):
            raise ValueError(f"classes={list(classes)}: want class indices 0..{c.classes - 1}, at least one")
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: want >= 0")
        self.noise = noise.to(device).expand(len(classes), -1, -1)
        self.scale = 0
        self.modulation, self.head_modulation = model.modulations(torch.tensor(classes, device=device))
        self.fhat = torch.zeros(len(classes), c.bits, *model.schedule.grids[-1], device=device)
        shape = (c.depth, 2, len(classes), c.heads, model.schedule.num_tokens, c.head_dim)
        self.cache = torch.empty(shape, dtype=model.head.weight.dtype, device=device)  # k and v of every layer
        self.filled = [0] * c.depth  # tokens in each layer's cache
        self.given: Given = {}

    def parked(self) -> Generation:
        """The same state holding only the part of the cache that is filled; `fork` it to go on."""
        self.cache = self.cache[..., : max(self.filled), :].clone()
        return self

    def fork(self, attend: Attend | None = None, noise: Tensor | None = None) -> Generation:
        twin = object.__new__(Generation)
        twin.__dict__.update(self.__dict__)
        done, room = max(self.filled), self.model.schedule.num_tokens
        twin.filled, twin.given = list(self.filled), dict(self.given)
        twin.cache = self.cache.new_empty(*self.cache.shape[:-2], room, self.cache.shape[-1])
        twin.cache[..., :done, :] = self.cache[..., :done, :]
        if attend is not None:
            twin.attend = attend
        if noise is not None:
            twin.noise = noise.to(self.noise.device).expand_as(self.noise)
        return twin

    @torch.inference_mode()
    def step(self) -> None:
        model, i = self.model, self.scale
        begin, end = model.schedule.starts[i], model.schedule.starts[i + 1]
        dtype = model.head.weight.dtype
        x = model.inputs([self.fhat.to(dtype) if i else None], range(i, i + 1)).expand(self.fhat.shape[0], -1, -1)
        x, thinning = x.clone(), Thinning.of(self.attend, model.schedule)
        for layer in range(model.config.depth):
            budget = thinning.budget_after(i, layer)
            window = None if budget is None else thinning.window_of(x, i)
            if thinning.by_parts(i, layer):
                x = self._by_parts(x, layer, thinning)
            else:
                self._whole(x, layer)
            if budget is not None and window is not None:
                self._cut(layer, budget, window, thinning)
        logits = model.logits(x, self.head_modulation).float()
        bits = logits + self.temperature * self.noise[:, begin:end] > 0
        grid = model.schedule.grids[i]
        self.fhat = model.quantiser.add(self.fhat, bits.transpose(1, 2).unflatten(2, grid), i)
        self.scale += 1

    def _whole(self, x: Tensor, layer: int) -> None:
        """One block on all tokens x [B, N, width] of the scale, which change in place."""
        attended, block = self._attend(x, layer, self.model.rotations[self._span]), self.model.blocks[layer]
        for part in portions(x):
            x[:, part] = self.model.after_attention(block, x[:, part], attended[:, :, part], self.modulation)

    def _attend(self, x: Tensor, layer: int, angles: Tensor) -> Tensor:
        """Attention of rows x [B, n, width] turned by angles [(B, 1,) n, D / 2], which are appended to the layer's cache."""
        model, c, begin = self.model, self.model.config, self.filled[layer]
        end = self.filled[layer] = begin + x.shape[1]
        q = x.new_empty(x.shape[0], c.heads, x.shape[1], c.head_dim)  # fresh: it may be captured
        keys, values = (cache[:, :, :end] for cache in self.cache[layer])
        new_keys, new_values = keys[:, :, begin:], values[:, :, begin:]
        for part in portions(x):
            q[:, :, part], new_keys[:, :, part], new_values[:, :, part] = model.before_attention(
                model.blocks[layer], x[:, part], self.modulation, angles[..., part, :]
            )
        whole = slice(begin, end) == self._span  # else it is no call of the schedule, and no rule may stand there
        return (self.attend if whole else DENSE)(q, keys, values, layer, self.scale)

    @property
    def _span(self) -> slice:
        """The scale's tokens among all."""
        return slice(*self.model.schedule.starts[self.scale : self.scale + 2])

    def _by_parts(self, x: Tensor, layer: int, thinning: Thinning) -> Tensor:
        """The same block, each of its parts on the tokens that it chooses, or on all where later scales need what it gives."""
        model, block, angles = self.model, self.model.blocks[layer], self.model.rotations[self._span]

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            attended = self._attend(rows, layer, angles if places is None else angles[places][:, None])
            return model.attention_part(block, attended, self.modulation)

        def mlp(rows: Tensor, _places: Tensor | None) -> Tensor:
            return torch.cat([model.mlp_part(block, rows[:, part], self.modulation) for part in portions(rows)], 1)

        x = x + thinning.part(self.given, (layer, "attention"), self.scale, x, attend)
        return x + thinning.part(self.given, (layer, "mlp"), self.scale, x, mlp)

    def _cut(self, layer: int, keep: int, window: Tensor, thinning: Thinning) -> None:
        """Leaves `keep` keys of the layer's cache, as window [B, w, width], tokens of x before the block, asks for."""
        filled = self.filled[layer]
        if filled <= keep:
            return
        model, block = self.model, self.model.blocks[layer]
        shift, scale = (self.modulation + block.modulation)[:, :2].unsqueeze(2).unbind(1)
        y = F.layer_norm(window, window.shape[-1:]) * (1 + scale) + shift
        raw = F.linear(y, block.qkv.weight[: model.config.width])  # no bias, norm, rotation or learned factor
        q = raw.unflatten(-1, (model.config.heads, -1)).transpose(1, 2)
        rows = thinning.kept(q, self.cache[layer, 0][:, :, :filled], keep, self.scale)[..., None]
        for cache in self.cache[layer]:
            cache[:, :, :keep] = cache[:, :, :filled].gather(2, rows.expand(-1, -1, -1, cache.shape[-1]))
        self.filled[layer] = keep

    def run(self, until: int | None = None) -> Generation:
        """Draws every scale before index `until` (default: all that `attend` does not skip)."""
        end = len(self.model.schedule) - len(self.attend.skip_scales)
        while self.scale < (end if until is None else min(until, end)):
            self.step()
        return self

    @torch.inference_mode()
    def pictures(self) -> Tensor:
        """[B, 3, 256, 256] float32 in 0..1, from the scales drawn so far."""
        decoded = self.model.decoder(self.fhat.to(self.model.head.weight.dtype))
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


def save_weights(model: PocketVAR, path: Path, note: dict[str, str]) -> None:
    """Writes matrices as bf16 and the decoder as fp16 (its activations tolerate it; it halves the wheel)."""
    from safetensors.torch import save_file

    tensors = {}
    for name, t in model.state_dict().items():
        tensors[name] = t.detach().cpu().to(torch.float16 if name.startswith("decoder") else torch.bfloat16).contiguous()
    save_file(tensors, path, {"config": json.dumps(asdict(model.config)), **note})


def load_pocketvar(path: Path = WEIGHTS, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PocketVAR:
    """The trained model, in eval mode. Raises FileNotFoundError or ValueError (damaged file) with what to do."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no weights; reinstall the package or run python -m lab.pocketvar.train")
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a pocketvar weight file ({error}); reinstall the package") from None
    model = PocketVAR(PocketConfig(**{**fields, "sides": tuple(fields["sides"])}))
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=dtype).eval()
