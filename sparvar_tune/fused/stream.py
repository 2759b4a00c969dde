"""The residual stream between two norms, kept in one of two ways.

A part's product y = gate * (h W^T + b) is added to the stream x, and the next part reads a norm of it. `Stream` leaves y in
memory and adds it in the pass of the norm, which reads x and y and writes x and the norm: 12 bytes a number, and the product
writes 2.

`AddedStream` lets the product add itself, h (gate W)^T, to an x that is kept without biases: their sum so far, a number for each
channel, is added where x is normalised. The product then reads and writes 4 bytes, in the shadow of its multiplications, and
the norm reads 4 and writes 2. It costs a weight times its gate for each row of the batch, at each scale again, as all of them
would be 10 GB of an 8B model; so it is for rows of many tokens (`pays`). The gated weight is rounded where y was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.path import ScaledRows, add_linear, residual_norm
from sparvar_kernels.path.fastest_product import is_found, is_worth_it, look_for
from sparvar_tune.fused.folded_text import Values
from sparvar_tune.fused.product import Product, multiplied

LEAST_TOKENS = 2  # a channel


def pays(tokens: int, channels: int) -> bool:
    """Whether products of so many tokens a row are added faster than their sums. In bytes a block's three norms save
    18 * tokens * channels, and its gated weights, of 5 * channels ** 2 numbers, are written and read: 20 * channels ** 2."""
    return tokens >= LEAST_TOKENS * channels


class Stream:
    """x [B, L, C], changed in place; complete after `end`."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._update: Tensor | None = None
        self._gate: Tensor | None = None

    def norm(self, **operands: Any) -> Tensor:
        """`residual_norm` of the stream so far, by its keyword arguments."""
        y = residual_norm(self.x, self._update, self._gate, **operands)
        self._update = self._gate = None
        return y

    def add(self, product: Product | Values, h: Tensor | ScaledRows, gate: Tensor | None = None, fmt: str | None = None) -> None:
        """x += gate * product(h), h [B, L, K]; gate [C] or [B, C]. fmt: the 8-bit format of h's rows, of a `Product`; or None."""
        self._update = multiplied(product, h, fmt)
        self._gate = gate

    def end(self) -> None:
        """Adds what is left to add."""
        self.norm(norm="none", eps=0.0, out_dtype=self.x.dtype)


class AddedStream:
    """The same by products that add themselves, gate [B, C] of a `Product`, [C] of a text. offsets [n + 1, B, C] fp32: the sum of
    gated biases after k of n products."""

    def __init__(self, x: Tensor, offsets: Tensor) -> None:
        self.x, self._offsets, self._added = x, offsets[:, : len(x)], 0

    def norm(self, **operands: Any) -> Tensor:
        return residual_norm(self.x, offset=self._offsets[self._added], **operands)

    def add(self, product: Product | Values, h: Tensor | ScaledRows, gate: Tensor | None = None, fmt: str | None = None) -> None:
        assert isinstance(h, Tensor) and fmt is None, "a pass with 8-bit products keeps the other stream"
        add_linear(self.x, h, product.by_rows(gate, len(self.x)))
        self._added += 1

    def end(self) -> None:
        self.x += self._offsets[self._added][:, None]


class Adding:
    """What `AddedStream`s of one kind of image share. biases [n, C] fp32: of the n products of all blocks, in order; rows: of the
    image's batch. products: those of one block that are added; all blocks are alike."""

    def __init__(self, biases: Tensor, rows: int, products: Sequence[Product | Values]) -> None:
        self.biases, self.products = biases, products
        self.offsets = biases.new_empty(len(biases) + 1, rows, biases.shape[1])

    def derive(self, gates: Tensor) -> None:
        """The image's offsets, at an address that stays; gates [n, rows, C] fp32."""
        self.offsets[0].zero_()
        torch.cumsum(self.biases[:, None] * gates, 0, out=self.offsets[1:])

    def is_worth_it(self, rows: int, length: int) -> bool:
        """Whether products of `length` tokens in each of so many rows shall add themselves."""
        forms = [product.added(rows, length) for product in self.products]
        precise = all(form.dtype != torch.float16 for form in forms)  # there a weight times a small gate is subnormal
        return precise and pays(length, self.biases.shape[1]) and all(map(is_worth_it, forms))

    def look_for(self, rows: int, length: int) -> None:
        """Looks for their fastest algorithms."""
        for product in self.products:
            look_for(product.added(rows, length))

    def stream(self, x: Tensor) -> Stream | AddedStream:
        """That of x [B, L, C]: of products that add themselves where that is worth it and the library was seen to do it."""
        rows, length, _ = x.shape
        adds = self.is_worth_it(rows, length) and all(is_found(product.added(rows, length)) for product in self.products)
        return AddedStream(x, self.offsets) if adds else Stream(x)
