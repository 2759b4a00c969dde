"""torch's linear, by an algorithm that somebody looked for (fastest_product.py), with or without GELU behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.cublaslt import ProductForm
from sparvar_kernels.path.fastest_product import fastest, is_many


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """[..., N]: x [..., K] @ weight [N, K]^T + bias [N], all of one dtype, rounded as the library does.

    gelu: the tanh form of GELU of it; on a GPU within the product, but without a bias only where an algorithm was found. On a CPU
    plain torch. Raises what torch does.
    """
    if x.is_cuda and x.numel() and is_many(x.numel() // x.shape[-1]):  # nobody looked for others
        run = fastest(linear_form(x, weight, bias, gelu), x, weight, bias)
        if run is not None:
            y = x.new_empty(*x.shape[:-1], weight.shape[0])
            run(x, weight, bias, y)
            return y
    if not gelu or bias is None or not x.is_cuda:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], -1)


def linear_form(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> ProductForm:
    """What `look_for` looks for, and `linear` then calls."""
    outputs, inputs = weight.shape
    rows = x.numel() // max(x.shape[-1], 1)
    return ProductForm(x.device, x.dtype, 1, rows, outputs, inputs, bias=bias is not None, gelu=gelu)
