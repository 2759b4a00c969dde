"""Cross-attention whose text is multiplied into its two products once an image.

A token y attends to a row's text by softmax(s (W_q y + b_q) . k_t) and takes W_o of the values it weighs. Both W_q^T k_t and
W_o v_t are the same for every token and scale, so with T places of text and H heads of D dims

    scores [L, H * T] = y K'^T,  K'[h, t] = W_q[h]^T k[h, t]        instead of   W_q y   [L, H * D], and the dots with k
    update [L, C]     = p V' + b_o,  V'[h, t] = W_o[:, h] v[h, t]   instead of   the sums of v, and W_o of them [L, C]

is T / D of their multiplications: at 64 places and 128 dims half, which is 7 % of all products of a block. The sums are the same
in another order. K' and V' are rounded once to the products' dtype where q and the weighed sums were; scores stay in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.path import text_softmax
from sparvar_kernels.path.added_linear import added_form
from sparvar_kernels.path.cublaslt import ProductForm
from sparvar_tune.fused.product import Product

ROOM = 32  # places of a row are a multiple of this, so that prompts of like lengths share graphs
MOST_OF_HEAD = 0.75  # of a head's dims: with more places the fp32 scores cost what the products save


def room_of(given: Mapping[str, Any], head_dim: int) -> int | None:
    """Places to keep for each row's text, or None where folding it gains nothing.

    given: a block's arguments; `ca_kv` is (all texts [S, C], where each begins, the longest's length).
    """
    longest = given["ca_kv"][2]
    if not isinstance(longest, int) or longest < 1:  # a length on the device is not waited for
        return None
    room = -(-longest // ROOM) * ROOM
    return room if room <= MOST_OF_HEAD * head_dim else None


class FoldedText:
    """Keys and values of all layers' texts, folded. heads * head_dim is the width of both products' inner side."""

    def __init__(
        self, layers: int, rows: int, room: int, heads: int, head_dim: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.room, self.heads, self.head_dim, self.dtype = rows, room, heads, head_dim, dtype
        self.keys = torch.zeros(layers, rows, heads, room, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.bias = torch.zeros(layers, rows, heads, room, device=device)
        self.places = torch.arange(room, device=device)

    def padded(self, text: Tensor, starts: Tensor) -> Tensor:
        """[rows * room, C] of text [S, C]: each row's own, and behind its end whatever comes; no weight ever meets that."""
        at = (starts[:-1, None] + self.places).clamp_(max=text.shape[0] - 1)
        return text.index_select(0, at.flatten())

    def fold(self, layer: int, kv: Tensor, to_query: Product, from_text: Product) -> None:
        """kv [rows * room, 2 * H * D] of what `padded` gave."""
        assert to_query.weight is not None and from_text.weight is not None
        keys, values = kv.view(self.rows, self.room, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)  # [rows, H, T, D]
        query = to_query.weight.view(self.heads, self.head_dim, -1)
        out = from_text.weight.t().view(self.heads, self.head_dim, -1)
        for row in range(self.rows):
            torch.bmm(keys[row], query, out=self.keys[layer, row])
            torch.bmm(values[row], out, out=self.values[layer, row])
        if to_query.bias is not None:
            own = to_query.bias.view(self.heads, 1, self.head_dim).float()
            torch.sum(keys.float().mul_(own), -1, out=self.bias[layer])

    def multiply_once(self, rows: int, length: int, bias: Tensor | None, adds: bool) -> None:
        """Its products, of zeros and the first layer; a second one that `adds` itself to the stream is looked for elsewhere."""
        keys, values = self.keys[0, :rows].flatten(1, 2), self.of(0, bias)
        _in_fp32(keys.new_zeros(rows, length, keys.shape[2]), keys.transpose(1, 2))
        if not adds:
            values(keys.new_zeros(rows, length, keys.shape[1]))

    def weights(self, layer: int, y: Tensor, starts: Tensor, softmax_scale: float) -> Tensor:
        """[rows, L, H * T] of y [rows, L, C], of the first rows of the image: what `values` multiplies."""
        rows, length, _ = y.shape
        scores = _in_fp32(y, self.keys[layer, :rows].flatten(1, 2).transpose(1, 2)).view(rows, length, self.heads, self.room)
        return text_softmax(scores, starts, softmax_scale, self.bias[layer, :rows], self.dtype).flatten(2)

    def of(self, layer: int, bias: Tensor | None) -> Values:
        """What a layer's weights are multiplied by. bias [width]: from_text's."""
        return Values(self.values[layer].flatten(1, 2), bias)


class Values:
    """The second product, by a text's values [rows or more, H * T, width] for each row of the batch; a bias [width] behind it."""

    def __init__(self, values: Tensor, bias: Tensor | None) -> None:
        self.values, self.bias = values, bias

    def __call__(self, weights: Tensor) -> Tensor:
        """[rows, L, width] of weights [rows, L, H * T]."""
        if self.bias is None:
            return torch.bmm(weights, self.values[: len(weights)])
        update = weights.new_empty(*weights.shape[:2], self.values.shape[2])
        for row in range(len(weights)):  # one by one the bias goes into the product
            torch.addmm(self.bias, weights[row], self.values[row], out=update[row])
        return update

    def added(self, rows: int, length: int) -> ProductForm:
        """The product as `add_linear` takes it."""
        return added_form(self.values.mT, rows, length, turned=True)

    def by_rows(self, gate: Tensor | None, rows: int) -> Tensor:
        """[rows, width, H * T]: the values times gate [width], without the bias."""
        values = self.values[:rows]
        return (values if gate is None else (values * gate).to(values.dtype)).mT


def _in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [rows, L, n] in fp32 from operands of one dtype."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
