"""A module's matrix product as the fused path calls it: by its weights where they are plain, by the module itself where not.

A Linear that carries hooks, parametrisations or another class (LoRA, quantised) is called, so that what it adds is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparvar_kernels.path import ScaledRows, gated_weight, linear, scaled_rows
from sparvar_kernels.path.added_linear import added_form
from sparvar_kernels.path.cublaslt import ProductForm
from sparvar_kernels.path.fastest_product import look_for
from sparvar_kernels.path.linear import linear_form
from sparvar_kernels.path.scaled_product import SIDE, Then
from sparvar_tune.adapters.instance_forward import OLD, why_not_replace
from sparvar_tune.adapters.structure import is_plain
from sparvar_tune.generation import Precision
from sparvar_tune.generation.scaled_product import ScaledProduct, scaled_weights


class Product:
    """y = x W^T + b in `dtype`. bias: in the place of the module's own; of a module that is not plain it is added to its output.

    Weights in another dtype are copied once.
    """

    def __init__(self, module: Any, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self.module, self.dtype = module, dtype
        self.plain = is_plain(module)
        weight: Any = getattr(module, "weight", None)
        own: Any = getattr(module, "bias", None)
        bias = own if bias is None and self.plain else bias
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.weight = weight.detach().to(dtype) if self.plain else None
        self._scaled: dict[str, ScaledProduct] = {}  # by format; graphs of several policies read them
        # a module in another dtype ran under autocast, which the fused path has switched off around it
        self.casts = not self.plain and any(t.is_floating_point() and t.dtype != dtype for t in _tensors(module))

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return linear(x, self.weight, self.bias)
        out = self._called(x)
        return out if self.bias is None else out + self.bias

    def once(self, rows: int, length: int, gelu: bool = False) -> None:
        """Multiplies zeros [rows, length, K], by `gelu` or not: then the library has loaded what it takes for as many rows.
        For many rows its fastest algorithm is looked for.

        A module that is not plain is not called: what hangs on it might count calls.
        """
        if self.weight is not None:
            x = self.weight.new_zeros(rows, length, self.weight.shape[1])
            look_for(linear_form(x, self.weight, self.bias, gelu))
            self.gelu(x) if gelu else self(x)

    def bare(self, x: Tensor, outputs: int) -> Tensor:
        """The first `outputs` numbers of the module's product, without the bias in the place of its own."""
        return self._called(x)[..., :outputs] if self.weight is None else F.linear(x, self.weight[:outputs])

    def raw_queries(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        """[B, N, H, D] of x [B, N, C], of a product whose first outputs are a query's: no bias, norm, rotation or factor."""
        return self.bare(x, heads * head_dim).unflatten(2, (heads, head_dim))

    def _called(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.casts, cache_enabled=False):
            out: Tensor = self.module(x)
        return out.to(self.dtype)

    def scale(self, fmt: str) -> ScaledProduct:
        """The scaled weights of a format, of a plain module alone, made once."""
        if fmt not in self._scaled:
            self._scaled[fmt] = scaled_weights(self.module, self.dtype, fmt)
        return self._scaled[fmt]

    def scaled(self, x: Tensor | ScaledRows, fmt: str, then: Then = "none") -> Tensor:
        """The product of scaled rows (`generation.Precision`). then: "gelu" for the exact form of GELU of it."""
        return self.scale(fmt)(x, self.bias, then)

    def gelu(self, x: Tensor) -> Tensor:
        """The tanh form of GELU of the product; on a GPU within the product."""
        if self.weight is None:
            return F.gelu(self(x), approximate="tanh")
        return linear(x, self.weight, self.bias, gelu=True)

    def added(self, rows: int, length: int) -> ProductForm:
        """The product as `add_linear` takes it, by a weight for each of so many rows of a batch."""
        assert self.weight is not None
        return added_form(self.weight, rows, length)

    def by_rows(self, gate: Tensor | None, rows: int) -> Tensor:
        """[rows, N, K]: the weight of a plain module times gate [rows, N], for each row of a batch."""
        assert self.weight is not None and gate is not None and len(gate) == rows
        return gated_weight(self.weight.contiguous(), gate)


def multiplied(product: Any, x: Tensor | ScaledRows, fmt: str | None) -> Tensor:
    """The product of x [..., K], of rows scaled to an 8-bit format or, None, of x as it is. product: a `Product` or, without a
    format, another function of x."""
    out: Tensor = product(x) if fmt is None else product.scaled(x, fmt)
    return out


def gelu_up(up: Product, x: Tensor, fmt: str | None) -> Tensor | ScaledRows:
    """An MLP's first product and the tanh form of GELU, as its second one is `multiplied` of it."""
    return up.gelu(x) if fmt is None else scaled_rows(up.scaled(x, fmt), "gelu", fmt=fmt)


def gelu_mlp(up: Product, down: Product, x: Tensor, fmt: str | None) -> Tensor:
    """An MLP with the tanh form of GELU, its products like `multiplied`."""
    return multiplied(down, gelu_up(up, x, fmt), fmt)


def exact_gelu_mlp(up: Product, down: Product, x: Tensor, fmt: str | None) -> Tensor:
    """The same with the exact form."""
    return down(F.gelu(up(x))) if fmt is None else down.scaled(up.scaled(x, fmt, "gelu"), fmt)


def make_scaled(step: Precision | None, blocks: Sequence[Any], linears: Sequence[Sequence[Any]]) -> None:
    """Scales the weights that a step needs, before any graph is captured: one captured at first need would be replayed by nobody.

    That is a scale which the first image did not draw. linears: by block, the modules whose products the step scales.
    """
    for layer, (block, modules) in enumerate(zip(blocks, linears, strict=True)):
        if step is not None and step.at(step.from_scale, layer):
            for product in vars(block).values():
                if isinstance(product, Product) and any(product.module is module for module in modules):
                    product.scale(step.fmt)


def scaled_builds(blocks: Sequence[Any], dtype: torch.dtype, exact_gelu: bool, fmt: str) -> list[Any]:
    """Binaries that make scaled rows for the plain products of blocks and for those behind an MLP's activation, and where the
    library does not multiply them (`ScaledProduct`), those that do. exact_gelu: blocks end in `exact_gelu_mlp`. fmt: the rows'.
    """
    from sparvar_kernels.path.triton.scaled_product import scaled_product_build
    from sparvar_kernels.path.triton.scaled_rows import scaled_rows_build

    products = {name: p for b in blocks for name, p in vars(b).items() if isinstance(p, Product) and p.weight is not None}
    made: list[Any] = []
    for name, p in products.items():
        assert p.weight is not None
        (outputs, inputs), gelu = p.weight.shape, exact_gelu and name == "up"
        made.append(scaled_rows_build(dtype, inputs, fmt=fmt))
        if (gelu or dtype != torch.bfloat16 or fmt != "e4m3") and not (outputs | inputs) % SIDE:
            made.append(scaled_product_build(dtype, inputs, outputs, p.bias is not None, gelu, fmt))
        if name == "down" and not exact_gelu:
            made.append(scaled_rows_build(dtype, inputs, "silu" if "gate" in products else "gelu", fmt))
    return list(dict.fromkeys(made))


def _tensors(module: Any) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else iter(())


def why_not_hooked() -> str | None:
    """Why no module's work can be done in its place, or None: a hook on every module, present and future, is none of theirs."""
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        if hooks:
            return "another tool's hook is on all modules (register_module_forward_hook or ..._pre_hook)"
    return None


def why_not_all_owned(*modules: Any) -> str | None:
    """The first reason of `why_not_owned`, or None."""
    return next((reason for module in modules if (reason := why_not_owned(module))), None)


def why_not_owned(module: Any) -> str | None:
    """Why a module's work cannot be done in its place, or None: nobody has put a hook or another forward on it."""
    own = module.__dict__  # of hundreds of modules at every picture, so without a loop
    if own.get("_forward_hooks") or own.get("_forward_pre_hooks") or own.get("_hf_hook"):
        return f"another tool's hook is on its {type(module).__name__}"
    return why_not_replace(module) if "forward" in own or OLD in own else None
