"""The network of HART's denoiser, an MLP whose residual blocks are modulated row by row, in fewer passes.

    y                   time_embed(t) + cond_embed(c)
    a residual block    x + gate * mlp(layer_norm(x) * (1 + scale) + shift), the three of adaLN_modulation(y)
    the last layer      linear(layer_norm(x) * (1 + scale) + shift)

PyTorch normalises and modulates in fp32 under autocast, a pass each, and every block has its own SiLU(y). Here a block's sum, the
next norm and its modulation are one pass, SiLU(y) is made once a step, and the condition's part of y once a picture.

Rounding: x is rounded to the products' dtype once a block and not twice (gate * h, the sum), 1 + scale not at all; a norm's
output once, as before. The time's part of y is made of one row for all: the same product with another order of its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.path import residual_norm
from sparvar_kernels.path.door import FLOATS
from sparvar_tune.adapters.structure import is_plain
from sparvar_tune.catalog.names import first_line
from sparvar_tune.fused.product import why_not_owned
from sparvar_tune.fused.watched import Watched, place

MOST_ROWS = (1 << 16) - 1  # programs along a GPU's second axis
ROWS = 64  # of the check
# How far both ways may lie apart. Of the public 6 blocks with random weights roundings make 0.0006 in fp16 and 0.005 in bf16. A
# part left out of one of 3 blocks makes 0.15 and more, GELU for SiLU in it 0.046. fp32 products may use TF32, as coarse as fp16.
APART = {torch.float32: 0.005, torch.bfloat16: 0.02, torch.float16: 0.005}


class DenoiserNetwork:
    """See the module docstring. reason: why the model's own code runs, None where it does not."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.reason = why_not_network(net)
        self._parts, self._replaced = Watched([net], place), list[nn.Module]()
        self._state: Hashable = None
        self._condition: tuple[Tensor, Tensor] | None = None

    def why_not(self, own: Callable[..., Tensor], x: Tensor, t: Tensor, c: Tensor) -> str | None:
        """Why own(x, t, c) of a step is not to be replaced, or None.

        Where weights lie in new places, as at the first call, modules are looked at and both ways compared, of a few rows.
        """
        state = self._parts.state()
        if state != self._state:
            self._state, self.reason = state, why_not_network(self.net)
            if self.reason is None:
                self._replaced = list(_replaced(self.net))
                self.reason = self._why_not_alike(own, x[:ROWS], t[:ROWS], c[:ROWS])
        if self.reason:
            return self.reason
        if x.ndim != 2 or not 1 <= len(x) <= MOST_ROWS:
            return f"it is given {tuple(x.shape)}, want 1 to {MOST_ROWS} rows"
        return next((reason for module in self._replaced if (reason := why_not_owned(module))), None)

    def condition(self, c: Tensor) -> Tensor:
        """cond_embed(c) [rows, C], kept until `forget` is called."""
        if self._condition is None or self._condition[0] is not c:
            self._condition = c, self.net.cond_embed(c)
        return self._condition[1]

    def forget(self) -> None:
        """A condition may be changed from now on."""
        self._condition = None

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """[rows, out] of x [rows, in], t [rows] or, of all rows, [1], and `condition(c)`."""
        net, final = self.net, self.net.final_layer
        x = net.input_proj(x).unsqueeze(1)
        y = F.silu(net.time_embed(t) + condition)
        update: Tensor | None = None
        gate: Tensor | None = None
        for block in net.res_blocks:
            shift, scale, own_gate = block.adaLN_modulation[1](y).chunk(3, -1)
            up, _, down = block.mlp
            h = down(F.silu(up(_normed(block.in_ln, x, update, gate, scale, shift))))
            update, gate = h.unsqueeze(1), own_gate
        shift, scale = final.adaLN_modulation[1](y).chunk(2, -1)
        out: Tensor = final.linear(_normed(final.norm_final, x, update, gate, scale, shift))
        return out

    def _why_not_alike(self, own: Callable[..., Tensor], x: Tensor, t: Tensor, c: Tensor) -> str | None:
        try:
            want, got = own(x, t, c), self(x, t, self.net.cond_embed(c))
        except Exception as error:
            return first_line(error)
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"its own code makes {tuple(want.shape)} {want.dtype}, the known order {tuple(got.shape)} {got.dtype}"
        apart = float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-12))
        return None if apart <= APART[want.dtype] else f"its own code makes something else of its modules ({apart:.2g} apart)"


def network_builds(net: Any, dtype: torch.dtype) -> list[Any]:
    """Binaries (`backends.triton.binary.Build`) that a step launches, its products in `dtype`; none of an unknown network."""
    from sparvar_kernels.path.triton.residual_norm import residual_norm_build

    if why_not_network(net):
        return []
    modulated, added = {"scale": dtype, "shift": dtype}, {"update": dtype, "gate": dtype}
    norms = [(block.in_ln, added if i else {}) for i, block in enumerate(net.res_blocks)]
    found: dict[Any, None] = {}
    for norm, sums in (*norms, (net.final_layer.norm_final, added)):
        affine = {name: t.dtype for name in ("weight", "bias") if (t := getattr(norm, name)) is not None}
        found[residual_norm_build(dtype, dtype, norm.normalized_shape[0], "layer", True, modulated | sums | affine)] = None
    return list(found)


def why_not_network(net: Any) -> str | None:
    """Why a network is not the known one, as far as its modules tell, or None."""
    linear = getattr(net, "input_proj", None)
    if (
        not isinstance(linear, nn.Linear)
        or not is_plain(linear)
        or not isinstance(getattr(net, "res_blocks", None), nn.ModuleList)
    ):
        return "it has no Linear input_proj and no list res_blocks"
    width, final = linear.out_features, getattr(net, "final_layer", None)
    wants = [(block, "in_ln", 3) for block in net.res_blocks] + [(final, "norm_final", 2)]
    for i, (part, norm, many) in enumerate(wants):
        name = f"res_blocks.{i}" if part is not final else "final_layer"
        found = getattr(part, norm, None)
        if type(found) is not nn.LayerNorm or tuple(found.normalized_shape) != (width,):
            return f"{name}.{norm} is {found}, want a LayerNorm of {width}"
        if not _is_sequence(getattr(part, "adaLN_modulation", None), nn.SiLU, nn.Linear):
            return f"{name}.adaLN_modulation is not SiLU and Linear"
        if getattr(part.adaLN_modulation[1], "out_features", None) != many * width:
            return f"{name}.adaLN_modulation makes another number than {many * width}"
        if norm == "in_ln" and not _is_sequence(getattr(part, "mlp", None), nn.Linear, nn.SiLU, nn.Linear):
            return f"{name}.mlp is not Linear, SiLU, Linear"
    if not isinstance(getattr(final, "linear", None), nn.Linear) or not len(net.res_blocks):
        return "it has no residual block, or no Linear at its end"
    if any(t.dtype not in FLOATS for t in net.parameters()):
        return f"its weights are not all of {', '.join(map(str, FLOATS))}"
    return None


def _is_sequence(module: Any, *kinds: type[nn.Module]) -> bool:
    """Of exactly these modules; a Linear may be one of another class, since it is called."""
    if type(module) is not nn.Sequential or len(module) != len(kinds):
        return False
    return all(isinstance(m, kind) if kind is nn.Linear else type(m) is kind for m, kind in zip(module, kinds, strict=True))


def _replaced(net: Any) -> Iterator[nn.Module]:
    """The modules that are not called."""
    for block in net.res_blocks:
        yield from (block, block.in_ln, block.mlp, block.mlp[1], block.adaLN_modulation, block.adaLN_modulation[0])
    final = net.final_layer
    yield from (final, final.norm_final, final.adaLN_modulation, final.adaLN_modulation[0])


def _normed(norm: Any, x: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """x [rows, 1, C] += gate * update, in place; its norm, modulated, [rows, C] in the dtype of x."""
    affine = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    return residual_norm(x, update, gate, norm="layer", scale=scale, shift=shift, **affine, out_dtype=x.dtype).squeeze(1)
