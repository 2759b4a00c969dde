"""What a family says of its blocks, so that all of them run as one function of the residual stream.

A family's file (infinity.py is the model to follow) has `stack(parts)`, a `Stack`; engine.py does the rest: buffers,
caches, graphs, the hooks in the live model and the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.generation.tokens import Work


class Pass(Protocol):
    """One run through all blocks: `length` new tokens of `rows` rows, the schedule's from `start` on."""

    rows: int
    start: int
    length: int
    scale_index: int | None  # None: tokens before the first grid

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [rows or more, H, N, D], for `append_qkv` to write into.

        Layers run in order, each once a pass: in the last pass a layer's writes run over what earlier layers kept."""

    def filled(self, layer: int) -> int:
        """Tokens in a layer's cache before this pass: `start`, or fewer where a step left some out. The new ones go there."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """[rows, L, H * D] from q [rows, H, L, D], over all that was appended; no copy where q is laid out [rows, L, H, D]."""

    def cut(self, layer: int, queries: Callable[[Tensor], Tensor]) -> None:
        """After `attend`: cuts the cache to its budget, if the policy has one for the next scale.

        queries(places [n] of this grid's tokens) -> [rows, n, H, D], raw from the projection."""

    def scaled(self, layer: int) -> str | None:
        """The 8-bit format that the rows of a layer's products are scaled to, or None."""

    def by_parts(self, layer: int) -> bool:
        """Whether a block is to run as parts, each by `add`, since some tokens may be left out."""

    def add(self, layer: int, part: str, x: Tensor, work: Work) -> None:
        """x [rows, L, C] += the part's result, in place.

        work(chosen rows [rows, n, C] of x, their places [rows, n], or None where they are all) -> [rows, n, C], gated."""


class Stack(Protocol):
    """The blocks of one live model. `prepare` comes once per kind of image, `begin` and `derive` once an image, `run`
    once a scale.

    parameters: names of a block's arguments, in order. stream: dtype of the residual stream, None where it is the input's.
    thins: kinds of steps that leave out tokens which `run` can do. linears(block): those whose products `Precision` scales.
    exact_gelu: of its MLPs, in place of the tanh form or of SiLU.
    """

    exact_gelu: ClassVar[bool]
    parameters: Sequence[str]
    stream: torch.dtype | None
    thins: tuple[str, ...]

    def linears(self, block: Any) -> Sequence[Any]: ...

    @property
    def blocks(self) -> Sequence[Any]:
        """What `prepare` made of each block: its attributes are `Product`s and constants."""

    def why_not(self) -> str | None:
        """Why this model's blocks cannot run as one, or None; looked at when the path is put on."""

    def why_not_image(self, given: Mapping[str, Any]) -> str | None:
        """Why an image whose first block is called with `given` cannot, or None."""

    def schedule(self, given: Mapping[str, Any]) -> ScaleSchedule | str:
        """The grids of the image, or what is wrong with them."""

    def kind(self, given: Mapping[str, Any]) -> Hashable:
        """What the constants' shapes depend on besides rows, dtype, device and schedule."""

    def prepare(self, given: Mapping[str, Any], rows: int, dtype: torch.dtype, schedule: ScaleSchedule) -> None:
        """Weights in `dtype`, and buffers for what an image holds constant, at addresses that stay."""

    def builds(self, lengths: Sequence[int], by_parts: bool = False) -> Sequence[Any]:
        """Every binary (`backends.triton.binary.Build`) that `run` launches for passes of these lengths, but for attention's.

        by_parts: some blocks run as parts."""

    def multiply_once(self, rows: int, length: int) -> None:
        """Each product that `run` takes of so many rows and tokens, of zeros, of one block: they are all alike."""

    def begin(self, given: Mapping[str, Any]) -> None:
        """Copies what an image brings into those buffers: conditions, text, places."""

    def derive(self) -> None:
        """Computes from them what the image holds constant, at addresses that stay; like `run` it may be captured."""

    def run(self, x: Tensor, at: Pass) -> None:
        """All blocks over x [rows, L, C], in place. Nothing in it may wait for the device or look at values."""

    def around(self, drawing: Callable[[], bool], graphs: bool) -> Undos:
        """What else of the model is slow or waits for the device between the stacks, replaced by the same work done otherwise.

        drawing(): whether the image being drawn is on this path; where not, the model's own code runs. graphs: whether launches
        may be replayed as CUDA graphs."""
