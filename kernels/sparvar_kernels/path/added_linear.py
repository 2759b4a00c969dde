"""A product added to a stream that is kept in fp32, in one call of the library."""

from __future__ import annotations

import torch
from torch import Tensor

from sparvar_kernels.path.cublaslt import ProductForm
from sparvar_kernels.path.fastest_product import fastest


def add_linear(stream: Tensor, x: Tensor, weight: Tensor) -> None:
    """stream [B, L, N] fp32 += x [B, L, K] @ weight [B, N, K]^T, each row of the batch by a weight of its own.

    x and weight have one dtype; the sum is fp32, nothing is rounded on the way. On a GPU the product itself reads and writes the
    stream, at the speed of one that only writes half the bytes. Raises what torch does.
    """
    form = added_form(weight, x.shape[0], x.shape[1], turned=not weight.is_contiguous())
    run = fastest(form, x, weight.mT if form.turned else weight, None, stream)
    if run is not None:
        run(x, weight, None, stream)
    elif x.is_cuda and x.dtype != torch.float32:
        torch.baddbmm(stream, x, weight.mT, out_dtype=torch.float32, out=stream)
    else:
        stream.baddbmm_(x.float(), weight.mT.float())


def added_form(weight: Tensor, batch: int, rows: int, turned: bool = False) -> ProductForm:
    """What `look_for` looks for, and `add_linear` then calls for x [batch, rows, K].

    weight: [..., N, K], of each row of the batch or of all; turned: such a view of [..., K, N].
    """
    outputs, inputs = weight.shape[-2:]
    return ProductForm(weight.device, weight.dtype, batch, rows, outputs, inputs, turned=turned, adds=True)
