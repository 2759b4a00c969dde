"""Steps that leave out tokens, where all blocks run as one: how long each layer's cache is, and what is done to it.

Every length follows from the policy and the schedule alone, so a scale is one CUDA graph as ever. Which tokens are kept, and what
stands for the others, `generation/tokens.py` says. What parts gave at one scale lies at addresses that stay, so a later scale's
graph may read it whatever ran there, a graph or launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune.generation import CacheBudget, PruneTokens
from sparvar_tune.generation.tokens import Work, is_given, kept_rows, not_given, pruned, window_places

Buffer = Callable[[Any, tuple[int, ...], torch.dtype, torch.device], Tensor]  # what for, shape, ... -> memory that stays


class Lengths:
    """Of images of one schedule. Where the policy has no such step all is as the schedule says.

    filled: [layer][scale], tokens in a layer's cache before that scale; the last one: after all. cuts: scales after which some
    layer's may be cut.
    """

    def __init__(self, policy: Policy | None, schedule: ScaleSchedule, layers: int) -> None:
        steps = () if policy is None else policy.steps
        self.prune = next((step for step in steps if isinstance(step, PruneTokens)), None)
        self.budget = next((step for step in steps if isinstance(step, CacheBudget)), None)
        self.schedule = schedule
        self.filled: list[list[int]] = []
        for layer in range(layers):
            self.filled.append([schedule.prefix])
            for s in range(len(schedule)):
                held = self.held(layer, s)
                self.filled[layer].append(min(held, self._budget(layer, s) or held))
        self.cuts = range(self.budget.from_scale - 1, len(schedule) - 1) if self.budget else range(0)

    def new(self, layer: int, s: int) -> int:
        """Tokens that a layer appends at a scale."""
        kept = self.prune.at(s) if self.prune and self.prune.by_parts(s, layer) else None
        return self.schedule.num_queries(s) if kept is None else kept

    def held(self, layer: int, s: int) -> int:
        """Tokens in a layer's cache when it attends at a scale."""
        return self.filled[layer][s] + self.new(layer, s)

    def lengths(self) -> list[int]:
        """Of all passes, in tokens: prefix, grids, what is left of them."""
        kept = self.prune.kept if self.prune else ()
        grids = (self.schedule.num_queries(s) for s in range(len(self.schedule)))
        return [*filter(None, [self.schedule.prefix]), *grids, *kept]

    def layout(self) -> list[tuple[int, int]]:
        """Of each layer, where its cache begins and ends among all places.

        What the last grid appends nobody reads again once its layer has attended. So layers lie one behind the other, the last
        one first, and the last grid runs over into the layers before its own, which are done by then: 39 % less at 1024 pixels.
        """
        places, at = [], 0
        for layer in reversed(range(len(self.filled))):
            held = [self.held(layer, s) for s in range(len(self.schedule))]
            places.append((at, at + max(held)))
            at += max(self.schedule.prefix, *held[:-1])
        return places[::-1]

    def before(self, s: int) -> list[int]:
        """By layer, the tokens in its cache before a scale."""
        return [filled[s] for filled in self.filled]

    def overwrites(self, s: int) -> bool:
        """Whether a pass that breaks off there has lost what the caches held before: the last one, and one that cuts them."""
        return s == len(self.schedule) - 1 or s in self.cuts

    def by_parts(self, layer: int, s: int) -> bool:
        """Whether a block runs part by part: some tokens are left out, or what its parts give is kept for then."""
        return self.prune is not None and self.prune.by_parts(s, layer)

    def _budget(self, layer: int, s: int) -> int | None:
        return None if self.budget is None else self.budget.before(s + 1, layer)


class ThinnedPasses(Lengths):
    """What is done in passes of so many rows, or fewer."""

    def __init__(
        self, policy: Policy | None, schedule: ScaleSchedule, layers: int, rows: int, device: torch.device, buffer: Buffer
    ) -> None:
        super().__init__(policy, schedule, layers)
        self.given = Given(rows, buffer)
        with torch.inference_mode(False):
            self.windows = {s: window_places(schedule.grids[s], self.budget.window).to(device) for s in self.cuts if self.budget}

    def add(self, layer: int, s: int, part: str, x: Tensor, work: Work) -> None:
        """x [rows, L, C] += what a part gives, or stands for it."""
        assert self.prune is not None
        x.add_(pruned(self.prune, self.schedule.grids, s, x, work, self.given, (layer, part)))

    def cut(self, layer: int, s: int, keys: Tensor, values: Tensor, queries: Callable[[Tensor], Tensor]) -> None:
        """Moves the keys and values [rows, H, N, D] that a layer keeps after a scale to the front; queries: see `Pass.cut`."""
        held, keep = self.held(layer, s), self.filled[layer][s + 1]
        if keep == held:
            return
        assert self.budget is not None
        window = self.windows[s]
        q = queries(window).transpose(1, 2)
        rows = kept_rows(q, keys[:, :, :held], window + (held - self.new(layer, s)), keep, self.budget.pool)
        rows = rows[..., None].expand(-1, -1, -1, keys.shape[3])
        for cache in (keys, values):
            cache[:, :, :keep] = cache.gather(2, rows)

    # What parts gave a picture, where pictures take turns

    def begin(self, given: Mapping[Any, Tensor], rows: int, dtype: torch.dtype) -> dict[Any, Tensor]:
        """Takes in what parts gave a picture elsewhere; it is then, as long as the picture is the one here, what is returned."""
        known = {part: out for part, out in given.items() if self._knows(part, out)}
        for part, out in known.items():
            self.given[part] = out[:rows].to(dtype)
        return {**given, **{part: self.given[part] for part in known}}

    def check(self, given: Mapping[Any, Tensor], s: int) -> None:
        """Raises ValueError where scale s lives on what parts did not give, as `pruned` does; a graph of it would not."""
        if self.prune is None or self.prune.at(s) is None:
            return
        layers = {part[0] for part, out in given.items() if self._knows(part, out)}
        if len(layers) <= self.prune.last_layer - self.prune.first_layer:
            raise not_given(self.prune)

    def after(self, given: dict[Any, Tensor], s: int) -> dict[Any, Tensor]:
        """What parts have given a picture once scale s of it is drawn."""
        if self.prune is None or not (s == self.prune.cached_scale or s >= self.prune.last_scale):
            return given
        return dict(self.given) if s == self.prune.cached_scale else {}

    def end(self, given: Mapping[Any, Tensor], rows: int) -> dict[Any, Tensor]:
        """The same in memory of its own: another picture comes."""
        return {part: out[:rows].clone() if out is self.given.get(part) else out for part, out in given.items()}

    def _knows(self, part: Any, out: Tensor) -> bool:
        step = self.prune
        return step is not None and step.first_layer <= part[0] <= step.last_layer and is_given(step, self.schedule.grids, out)


class Given(MutableMapping[Any, Tensor]):
    """What parts gave at one scale, for later ones, at addresses that stay: one graph writes there, another reads."""

    def __init__(self, rows: int, buffer: Buffer) -> None:
        self.rows, self.buffer = rows, buffer
        self.held: dict[Any, Tensor] = {}

    def __setitem__(self, part: Any, out: Tensor) -> None:
        if part not in self.held:  # in a picture before any capture
            self.held[part] = self.buffer(part, (self.rows, *out.shape[1:]), out.dtype, out.device)
        self.held[part][: out.shape[0]].copy_(out)

    def __getitem__(self, part: Any) -> Tensor:
        return self.held[part]

    def __delitem__(self, part: Any) -> None:
        """Its memory stays: the next picture writes it again."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def why_not_thinned(policy: Policy, kinds: tuple[str, ...]) -> str | None:
    """Why a stack that can do steps of these kinds cannot do a policy's that leave out tokens, or None."""
    cannot = [step.kind for step in policy.steps if step.thins and step.kind not in kinds]
    return f"{cannot[0]} works inside the model's own" if cannot else None
