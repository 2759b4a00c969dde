"""How far our block is from the public one, per layer and scale: the update of the residual stream, same inputs.

The yardstick is the public block's own error: both are held against the same block in fp32 (same weights, every product in full
precision), and the public one against itself with its bf16 sums taken in another order. Ours with products of 8-bit floats stands
beside.

A GPU sums a product of bf16 in fp32 and rounds once, so that the order of its channels tells nothing (`permuted`, 1e-6). What two
right bf16 programs differ by is where they round: a split product, as cuBLAS or two GPUs would make it, adds two sums of half the
channels in bf16, and the stream takes in a part by its two halves (`orders`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters, fused
from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.fused.workspace import OnePass, Workspace
from sparvar_tune.generation import Precision


def compare(driven: Any, layers: tuple[int, ...], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One picture of the public code; beside each named block ours, its fp32 form and its permuted one see the same inputs."""
    _, parts = adapters.recognise(driven.model)
    undos, rows, beside = Undos(), [], {}
    for layer in layers:
        block = parts.blocks[layer]
        beside[layer] = (
            _Alone(parts, layer), _Alone(parts, layer, scaled=True), _full(block), _permuted(block), _halved(block)
        )  # fmt: skip

        def both(inner: Any, *args: Any, layer: int = layer, **given: Any) -> Tensor:
            ours, scaled, full, permuted, halved = beside[layer]
            x = given["x"].float()
            public = inner(**{**given, "x": given["x"].clone()}).float()
            with torch.autocast("cuda", enabled=False):
                exact = full(**{**given, "x": x.clone(), "ca_kv": (given["ca_kv"][0].float(), *given["ca_kv"][1:])}).float()
            other = permuted(**{**given, "x": given["x"].clone()}).float()
            with products_in_halves():
                split = halved(**{**given, "x": given["x"].clone()}).float()
            got, rough = ours(given), scaled(given)

            def error(a: Tensor, b: Tensor) -> float:
                return float((a - b).norm() / (exact - x).norm())

            rows.append({
                "layer": layer, "scale": int(given["scale_ind"]), "ours_public": error(got, public),
                "orders": error(split, public), "permuted": error(other, public), "ours_fp32": error(got, exact),
                "public_fp32": error(public, exact), "scaled_fp32": error(rough, exact),
            })  # fmt: skip
            return public

        undos.add(replace_method(block, "forward", both))
    with undos:
        for _, _, *public_ones in beside.values():
            for one in public_ones:
                one.sa.kv_caching(True)
        driven.draw()
    worst = max(rows, key=lambda r: r["ours_public"] / r["orders"])
    say(f"layers: ours against public {worst['ours_public']:.2e} where two orders differ by {worst['orders']:.2e}, at worst")
    rough = [row["scaled_fp32"] for row in rows]
    say(f"layers: with products of 8-bit floats {min(rough):.2e} to {max(rough):.2e} from fp32")
    return rows


@contextmanager
def products_in_halves() -> Iterator[None]:
    """While it lasts, a product with weights adds the sums of both halves of its channels."""
    whole = F.linear

    def split(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        half = weight.shape[1] // 2
        return whole(input[..., :half], weight[:, :half], bias) + whole(input[..., half:], weight[:, half:])

    F.linear = split
    try:
        yield
    finally:
        F.linear = whole


class _Halves:
    """What a block adds to its stream, which takes it in by two halves."""

    def __init__(self, part: Tensor) -> None:
        self.half = part / 2

    def __radd__(self, x: Tensor) -> Tensor:
        return x + self.half + self.half


class _Halving(nn.Module):
    def forward(self, part: Tensor) -> _Halves:
        return _Halves(part)


class _Own:
    """In the model's place: paths of one model share buffers."""


class _Alone:
    """Our stack of one block, with a cache of its own."""

    def __init__(self, parts: Any, layer: int, scaled: bool = False) -> None:
        self.parts = replace(parts, model=_Own(), blocks=(parts.blocks[layer],), attentions=(parts.attentions[layer],))
        self.stack = fused.stack_of(self.parts)
        self.path = fused.FusedPath(self.parts, self.stack, None, graphs=False)
        self.precision = Precision(0, ((0, 0),)) if scaled else None  # at every scale
        self.start = 0
        self.work: Workspace | None = None

    def __call__(self, given: dict[str, Any]) -> Tensor:
        x = given["x"]
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            if self.work is None:
                schedule = self.stack.schedule(given)
                assert isinstance(schedule, ScaleSchedule)
                self.stack.prepare(given, x.shape[0], torch.bfloat16, schedule)
                self.work = Workspace(self.parts, x, torch.float32, torch.bfloat16, schedule, self.path)
                self.work.precision = self.precision
                self.stack.begin(given)
                self.stack.derive()
            stream = self.work.stream(x)
            stream.copy_(x)
            self.work.know_products(self.stack, *x.shape[:2])
            self.stack.run(stream, OnePass(self.work, self.start, stream))
            self.start += x.shape[1]
        return stream.clone()


def _full(block: Any) -> Any:
    """The public block in fp32; its fused norm keeps fp32 anyway."""
    return _copy(block).float()


def _copy(block: Any) -> Any:
    """A copy without what is set on the instance from outside."""
    saved = {name: vars(block).pop(name) for name in ("forward",) if name in vars(block)}
    try:
        return copy.deepcopy(block)
    finally:
        vars(block).update(saved)


def _halved(block: Any) -> Any:
    """The public block whose stream takes in what attention and the MLP add by two halves; for `products_in_halves`."""
    made = _copy(block)
    made.drop_path = _Halving()
    return made


def _permuted(block: Any) -> Any:
    """The public block with the inner channels of its MLP in another order: the same function, other sums."""
    made = _copy(block)
    order = torch.randperm(made.ffn.fc1.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(
        made.ffn.fc1.weight.device
    )
    made.ffn.fc1.weight.data = made.ffn.fc1.weight.data[order]
    made.ffn.fc1.bias.data = made.ffn.fc1.bias.data[order]
    made.ffn.fc2.weight.data = made.ffn.fc2.weight.data[:, order].contiguous()
    values = made.sa.head_dim * made.sa.num_heads
    return _permute_values(made, values)


def _permute_values(made: Any, width: int) -> Any:
    """Channels of V within each head, and the columns of the projection that reads them."""
    sa, dim = made.sa, made.sa.head_dim
    order = torch.cat([
        h * dim + torch.randperm(dim, generator=torch.Generator().manual_seed(h)) for h in range(sa.num_heads)
    ]).to(sa.proj.weight.device)  # fmt: skip
    sa.mat_qkv.weight.data[2 * width :] = sa.mat_qkv.weight.data[2 * width :][order]
    sa.v_bias.data = sa.v_bias.data[order]
    sa.proj.weight.data = sa.proj.weight.data[:, order].contiguous()
    return made
