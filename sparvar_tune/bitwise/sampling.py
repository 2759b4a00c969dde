"""Sampling scale by scale, for models that give a logit for each bit of a token.

A picture is a pure function of (what is drawn, seed, temperature): all noise is drawn up front on the CPU, so dense and sparse
attention get the same noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.bitwise.decisions import of_one_picture
from sparvar_tune.bitwise.thinning import Given, Thinning
from sparvar_tune.bitwise.tokenizer import pool
from sparvar_tune.generation.scaled_product import scaled_block

CPU_PORTION = 1024  # tokens; of 256, 512, 1024, 1536, 2048 and all at once the fastest on 2 cores: the same bits with each


class Attend(Protocol):
    """(q [B, H, Nq, D], k, v [B, H, Nk, D], layer, scale_index) -> [B, H, Nq, D]."""

    @property
    def skip_scales(self) -> tuple[int, ...]:
        """Trailing scales the generation leaves out."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor: ...


class DenseAttention:
    """PyTorch's scaled_dot_product_attention: the dense baseline everywhere in this project."""

    skip_scales: tuple[int, ...] = ()

    def __init__(self, softmax_scale: float) -> None:
        self.softmax_scale = softmax_scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)


def rope_angles(schedule: ScaleSchedule, head_dim: int) -> Tensor:
    """[tokens, head_dim / 2] angles over coordinates stretched to the last grid, as in Infinity; none for the prefix.

    The first half of the pairs turns with y, the second with x.
    """
    full = schedule.grids[-1]
    freqs = 1.5 * 100.0 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    angles = [torch.zeros(schedule.prefix, head_dim // 2)]
    for h, w in schedule.grids:
        y = (torch.arange(h) + 0.5) / h * full[0]
        x = (torch.arange(w) + 0.5) / w * full[1]
        yx = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2, 1)
        angles.append((yx * freqs).flatten(1))
    return torch.cat(angles)


def turns_of(angles: Tensor) -> Tensor:
    """[N, D / 2] complex numbers of length 1, as `rotate` takes them, of angles [N, D / 2]."""
    angles = angles.float()
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor, into: Tensor | None = None) -> Tensor:
    """x [..., N, D] of floats, its neighbouring pairs turned by turns [N, D / 2] of `turns_of`: one pass over x.

    into [..., N, D]: where the result goes; written by that pass where it holds fp32 in rows of unit stride.
    """
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    if into is not None and into.dtype == torch.float32 and into.stride(-1) == 1 and not any(n % 2 for n in into.stride()[:-1]):
        torch.mul(turned, turns, out=torch.view_as_complex(into.unflatten(-1, (-1, 2))))
        return into
    out = torch.view_as_real(turned * turns).flatten(-2)
    return out if into is None else into.copy_(out)


def draw_noise(schedule: ScaleSchedule, bits: int, seed: int) -> Tensor:
    """[tokens, bits] logistic noise, float32 on the CPU: the whole randomness of one picture."""
    u = torch.rand(schedule.num_tokens, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.logit(u.clamp(1e-9, 1 - 1e-9)).float()


def grid_inputs(
    schedule: ScaleSchedule, start: Tensor, levels: Tensor, embed: Callable[[Tensor], Tensor],
    states: Sequence[Tensor | None], scales: range,
) -> Tensor:  # fmt: skip
    """[B, tokens of `scales`, width] from fhat [B, C, H, W] *before* each scale (None: nothing drawn yet).

    start [width] stands for nothing drawn; levels [scales, width] are added; embed: [B, N, C] -> [B, N, width].
    """
    out = []
    for i, fhat in zip(scales, states, strict=True):
        if fhat is None:
            out.append((start + levels[i]).expand(1, schedule.num_queries(i), -1))
        else:
            out.append(embed(pool(fhat, schedule.grids[i]).flatten(2).transpose(1, 2)) + levels[i])
    batch = max(x.shape[0] for x in out)
    return torch.cat([x.expand(batch, -1, -1) for x in out], 1)


PRODUCTS = ("qkv", "proj", "fc1", "fc2")  # of a block, by name: what `Precision` scales


def portions(x: Tensor) -> list[slice]:
    """Everything but attention works on the tokens of x [B, N, C] one by one; on a CPU in portions that stay in cache."""
    tokens = x.shape[1]
    portion = CPU_PORTION if x.device.type == "cpu" else tokens
    return [slice(a, min(a + portion, tokens)) for a in range(0, tokens, portion)]


class Sampled(Protocol):
    """What sampling asks of a model. Its methods get a block first, and last what blocks are told of the picture (`told`).

    before_attention(block, x [B, N, width], turns [(B, 1,) N, D / 2] of `turns_of`, into three tensors) -> q, k, v [B, H, N, D].
    attention_part(block, attended [B, H, N, D]) and mlp_part(block, x) -> what they add to x; after_attention(block, x, attended)
    -> x after both. raw_queries(block, x) -> [B, H, N, D] without bias, norm, rotation or learned factor.
    """

    config: Any  # depth, heads, head_dim, bits
    schedule: ScaleSchedule
    blocks: Sequence[Any]
    rotations: Tensor  # [tokens, D / 2] angles
    softmax_scale: float
    quantiser: Any
    decoder: Any
    head: Any

    def before_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]: ...

    def attention_part(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def mlp_part(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def after_attention(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def raw_queries(self, *args: Any, **kwargs: Any) -> Tensor: ...


class AsOne(Protocol):
    """An attention that brings a faster way to run the model around it.

    `Generating` asks it first, and goes its own way where the answer is no, with the attention that is in the state by then.
    """

    def draw(self, state: Any) -> bool:
        """Draws the state's next scale, or not: False."""

    def read(self, state: Any, x: Tensor) -> bool:
        """Takes in x [rows, prefix, width], the tokens before the first grid, or not: False."""

    def give_back(self, state: Any) -> None:
        """Puts the keys and values that it holds for a state into `state.cache`, and holds them no more."""


Twin = TypeVar("Twin", bound="Generating")


class Generating(ABC):
    """One batch of pictures on its way from coarse to fine; `step` draws the next scale.

    noise [tokens, bits] or [pictures, tokens, bits] from `draw_noise`. Temperature 0 is greedy. rows: of the batch that the
    blocks run, one a picture or two with guidance. `attend` may be changed between steps; `fork` copies the state, so that
    several ways to do the last scales can start from the same coarse picture.

    constants: names of the tensors, beside fhat and keys and values, that `draw` reads of a state; they stay from scale to scale.
    """

    constants: tuple[str, ...] = ("noise",)

    def __init__(self, model: Sampled, pictures: int, rows: int, noise: Tensor, temperature: float, attend: Attend) -> None:
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: want >= 0")
        self.model, self.temperature = model, temperature
        c, device = model.config, model.head.weight.device
        self.noise = noise.to(device).expand(pictures, -1, -1)
        self.scale, self.rows = 0, rows
        self.fhat = torch.zeros(pictures, c.bits, *model.schedule.grids[-1], device=device)
        # k and v of every layer: of `filled` tokens and nobody's to write, or this state's own with room for all tokens
        self.cache = torch.empty(c.depth, 2, rows, c.heads, 0, c.head_dim, dtype=model.head.weight.dtype, device=device)
        self.holder: AsOne | None = None  # what has the keys and values, where they are not in the cache
        self.filled = [0] * c.depth  # tokens in each layer's cache
        self.given: Given = {}
        self.decided: Any = None  # the decision scale that later ones live on, for an attention that many states share
        self.attend = self.fitted(attend)

    @abstractmethod
    def draw(self, through: Callable[[Tensor], Tensor]) -> None:
        """Draws the next scale. through: its tokens x [rows, N, width] -> the same after all blocks."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What `draw` depends on beside tensors and the scale."""
        return self.fhat.shape[0], self.temperature

    @property
    def told(self) -> tuple[Tensor, ...]:
        """What the blocks' steps get of the picture."""
        return ()

    def fitted(self, attend: Attend) -> Attend:
        """An attention that begins with the next scale, as this state uses it."""
        return attend

    def narrow(self) -> None:
        """Lets go of the rows that the next scale does without."""
        return None

    @torch.inference_mode()
    def step(self) -> None:
        """Draws the next scale."""
        self.narrow()
        as_one: AsOne | None = self.attend if hasattr(self.attend, "draw") else None  # type: ignore[assignment]
        if as_one is None or not as_one.draw(self):
            with of_one_picture(self), self._again():
                self.draw(self.through_blocks)

    def parked(self: Twin) -> Twin:
        """The same state holding only the part of the cache that is filled; `fork` it to go on."""
        self._take_back()
        self.cache = self.cache[..., : max(self.filled), :].clone()
        return self

    def fork(self: Twin, attend: Attend | None = None, noise: Tensor | None = None) -> Twin:
        self._take_back()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.filled, twin.given = list(self.filled), dict(self.given)
        if self._owns_cache:
            twin.cache = self._roomy(self.cache)
        if attend is not None:
            twin.attend = twin.fitted(attend)
        if noise is not None:
            twin.noise = noise.to(self.noise.device).expand_as(self.noise)
        return twin

    def run(self: Twin, until: int | None = None) -> Twin:
        """Draws every scale before index `until` (default: all that `attend` does not skip)."""
        end = len(self.model.schedule) - len(self.attend.skip_scales)
        while self.scale < (end if until is None else min(until, end)):
            self.step()
        return self

    @torch.inference_mode()
    def pictures(self) -> Tensor:
        """[B, 3, height, width] float32 in 0..1, from the scales drawn so far."""
        fhat = self.fhat.to(self.model.head.weight.dtype)
        if fhat.device.type == "cpu":  # convolutions of pixels that lie together take a fifth less there
            fhat = fhat.contiguous(memory_format=torch.channels_last)
        decoded = self.model.decoder(fhat)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    # What a model's `step` is made of

    def through_blocks(self, x: Tensor) -> Tensor:
        """x [B, N, width], all tokens of the scale, after all blocks; their keys and values are in the cache then."""
        self._own_cache()
        x, thinning = x.clone(), Thinning.of(self.attend, self.model.schedule)
        turns = turns_of(self.model.rotations[self._span])
        for layer in range(self.model.config.depth):
            budget = thinning.budget_after(self.scale, layer)
            window = None if budget is None else thinning.window_of(x, self.scale)
            if thinning.by_parts(self.scale, layer):
                x = self._by_parts(x, layer, thinning, turns)
            else:
                self._whole(x, layer, self._span, turns)
            if budget is not None and window is not None:
                self._cut(layer, budget, window, thinning)
        return x

    @torch.inference_mode()
    def read(self, x: Tensor) -> None:
        """x [rows, prefix, width], the tokens before the first grid, through all blocks; their keys and values stay."""
        as_one: AsOne | None = self.attend if hasattr(self.attend, "read") else None  # type: ignore[assignment]
        if as_one is not None and as_one.read(self, x):
            return
        self._own_cache()
        x, tokens = x.clone(), slice(0, self.model.schedule.prefix)
        for layer in range(self.model.config.depth):
            self._whole(x, layer, tokens, turns_of(self.model.rotations[tokens]))

    def take(self, logits: Tensor) -> None:
        """Draws the bits of the scale from its logits [pictures, N, bits] and adds them to what is drawn so far."""
        bits = logits + self.temperature * self.noise[:, self._span] > 0
        grid = self.model.schedule.grids[self.scale]
        self.fhat = self.model.quantiser.add(self.fhat, bits.transpose(1, 2).unflatten(2, grid), self.scale)
        self.scale += 1

    # Keys and values

    @property
    def _owns_cache(self) -> bool:
        return self.cache.shape[-2] == self.model.schedule.num_tokens

    def _roomy(self, cache: Tensor) -> Tensor:
        """A copy of what is filled, with room for all tokens."""
        done = max(self.filled)
        out = cache.new_empty(*cache.shape[:-2], self.model.schedule.num_tokens, cache.shape[-1])
        out[..., :done, :] = cache[..., :done, :]
        return out

    def check_kept(self) -> None:
        """Raises ValueError where the keys and values that the next scale needs are nowhere."""
        if self.holder is None and self.cache.shape[-2] < max(self.filled):
            raise ValueError("the picture's keys and values are lost: an error broke off its last scale; begin it anew")

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Around a scale: one that breaks off may be drawn again, but where it cuts caches, whose keys are lost then."""
        filled, given = list(self.filled), dict(self.given)
        try:
            yield
        except BaseException:
            self.filled, self.given = filled, given
            if Thinning.of(self.attend, self.model.schedule).budget_after(self.scale, 0) is not None:
                self.cache = self.cache[..., :0, :]
            raise

    def _own_cache(self) -> None:
        """Before a block writes to it."""
        self._take_back()
        self.check_kept()
        if not self._owns_cache:
            self.cache = self._roomy(self.cache)

    def _take_back(self) -> None:
        if self.holder is not None:
            self.holder.give_back(self)

    @property
    def _span(self) -> slice:
        """The scale's tokens among all."""
        return slice(*self.model.schedule.starts[self.scale : self.scale + 2])

    def _whole(self, x: Tensor, layer: int, tokens: slice, turns: Tensor) -> None:
        """One block on x [B, N, width] of such tokens, which change in place; turns: theirs."""
        block = self.model.blocks[layer]
        with scaled_block(self.attend, self.scale if tokens == self._span else None, layer, block, *PRODUCTS):
            attended = self._attend(x, layer, turns)
            for part in portions(x):
                x[:, part] = self.model.after_attention(block, x[:, part], attended[:, :, part], *self.told)

    def _attend(self, x: Tensor, layer: int, turns: Tensor) -> Tensor:
        """Attention of rows x [B, n, width], whose turns are [(B, 1,) n, D / 2]; their keys and values join the layer's cache."""
        model, c, begin = self.model, self.model.config, self.filled[layer]
        end = self.filled[layer] = begin + x.shape[1]
        q = x.new_empty(x.shape[0], c.heads, x.shape[1], c.head_dim)  # fresh: it may be captured
        keys, values = (cache[:, :, :end] for cache in self.cache[layer])
        new_keys, new_values = keys[:, :, begin:], values[:, :, begin:]
        for part in portions(x):
            into = tuple(t[:, :, part] for t in (q, new_keys, new_values))
            model.before_attention(model.blocks[layer], x[:, part], turns[..., part, :], *self.told, into=into)
        if slice(begin, end) == self._span:
            return self.attend(q, keys, values, layer, self.scale)
        # no call of the schedule, so no rule may stand there: a prefix, or what is left of the tokens
        return DenseAttention(model.softmax_scale)(q, keys, values, layer, self.scale)

    def _by_parts(self, x: Tensor, layer: int, thinning: Thinning, turns: Tensor) -> Tensor:
        """The same block, each of its parts on the tokens that it chooses, or on all where later scales need what it gives."""
        model, block = self.model, self.model.blocks[layer]

        def attend(rows: Tensor, places: Tensor | None) -> Tensor:
            attended = self._attend(rows, layer, turns if places is None else turns[places][:, None])
            return model.attention_part(block, attended, *self.told)

        def mlp(rows: Tensor, _places: Tensor | None) -> Tensor:
            return torch.cat([model.mlp_part(block, rows[:, part], *self.told) for part in portions(rows)], 1)

        with scaled_block(self.attend, self.scale, layer, block, *PRODUCTS):
            x = x + thinning.part(self.given, (layer, "attention"), self.scale, x, attend)
            return x + thinning.part(self.given, (layer, "mlp"), self.scale, x, mlp)

    def _cut(self, layer: int, keep: int, window: Tensor, thinning: Thinning) -> None:
        """Leaves `keep` keys of the layer's cache, as window [B, w, width], tokens of x before the block, asks for."""
        filled = self.filled[layer]
        if filled <= keep:
            return
        q = self.model.raw_queries(self.model.blocks[layer], window, *self.told)
        rows = thinning.kept(q, self.cache[layer, 0][:, :, :filled], keep, self.scale)[..., None]
        for cache in self.cache[layer]:
            cache[:, :, :keep] = cache[:, :, :filled].gather(2, rows.expand(-1, -1, -1, cache.shape[-1]))
        self.filled[layer] = keep
