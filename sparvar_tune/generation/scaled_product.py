"""A product of 8-bit numbers (`precision.py` has the rule): where the device multiplies them, and emulated elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparvar_kernels.path import ScaledRows, scaled_product, scaled_rows
from sparvar_kernels.path.scaled_product import SIDE, Then, multiplies_int8
from sparvar_kernels.path.scaled_rows import FORMATS
from sparvar_kernels.policy import Policy
from sparvar_tune.generation.precision import WORDS, Precision

# Hopper is faster where it may sum in fewer bits than the rule's fp32; `lab/whole_image --fast-sums` measures that.
FAST_SUMS = False


def precision_of(policy: Policy | None) -> Precision | None:
    """The step of a policy that has it."""
    return next((step for step in policy.steps if isinstance(step, Precision)), None) if policy is not None else None


def why_no_gain(fmt: str, capability: tuple[int, int] | None) -> str | None:
    """Why a machine draws no faster for a `Precision` of this format, or None. capability: of the GPU, None on a CPU."""
    least = FORMATS[fmt].capability
    if fmt == "int8" and multiplies_int8() if capability is None else capability >= least:
        return None
    what = "a CPU" if capability is None else f"a GPU of compute capability {'.'.join(map(str, capability))}"
    what = "this CPU" if fmt == "int8" and capability is None else what
    does = "one with AVX-512 VNNI does" if what == "this CPU" else f"a GPU of {least[0]}.{least[1]} or more does"
    return f"{what} multiplies no {WORDS[fmt]} ({does}); emulated it would be slower than without"


def gaining(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """The formats that a machine draws faster for, the one that errs less on most rows first."""
    return tuple(fmt for fmt in ("int8", "e4m3") if why_no_gain(fmt, capability) is None)


def capability_of(device: torch.device | str) -> tuple[int, int] | None:
    """What `why_no_gain` asks."""
    return torch.cuda.get_device_capability(device) if torch.device(device).type == "cuda" else None


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype that products and convolutions of x are made in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ScaledProduct:
    """y = x W^T + b of scaled rows of format `fmt`. weight [N, K] in the dtype of the products, which b and y have too."""

    def __init__(self, weight: Tensor, fmt: str) -> None:
        self.weight, self.dtype, self.fmt = scaled_rows(weight.detach().contiguous(), fmt=fmt), weight.dtype, fmt  # scales [N, 1]
        multiplies = fmt == "e4m3" and why_no_gain(fmt, capability_of(weight.device)) is None
        # bf16 is the one dtype that every torch gives after row-wise scales
        self.by_library = multiplies and self.dtype == torch.bfloat16 and not any(side % SIDE for side in weight.shape)

    def __call__(self, x: Tensor | ScaledRows, bias: Tensor | None = None, then: Then = "none") -> Tensor:
        """[..., N] of x [..., K]; bias [N]. then: of `scaled_product`."""
        x = x if isinstance(x, ScaledRows) else scaled_rows(x.contiguous(), fmt=self.fmt)
        if not self.by_library or then != "none":
            return scaled_product(x, self.weight, bias, self.dtype, then)
        rows, scales, columns = x.rows.flatten(0, -2), x.scales.flatten(0, -2), self.weight.rows.t()
        out = torch._scaled_mm(
            rows, columns, scales, self.weight.scales.t(), bias, out_dtype=self.dtype, use_fast_accum=FAST_SUMS
        )
        return out.view(*x.rows.shape[:-1], -1)


# Linear -> its scaled weights, as long as somebody holds them: several who use one model need no copies of their own
_KNOWN: WeakKeyDictionary[nn.Linear, WeakValueDictionary[Any, ScaledProduct]] = WeakKeyDictionary()


def scaled_weights(linear: nn.Linear, dtype: torch.dtype, fmt: str) -> ScaledProduct:
    """The product by a Linear's weights as they are now, made once for all who hold it."""
    weight = linear.weight
    state = dtype, fmt, weight.data_ptr(), -1 if weight.is_inference() else weight._version
    known = _KNOWN.setdefault(linear, WeakValueDictionary())
    found = known.get(state)
    if found is None:
        found = known[state] = ScaledProduct(weight.detach().to(dtype), fmt)
    return found


class ScaledLinears(TorchFunctionMode):
    """While it is on, F.linear by the own weight of one of these Linears is a scaled product, whoever calls it.

    The public models multiply by `mat_qkv.weight` without calling `mat_qkv`, so no forward could be replaced for it.
    """

    def __init__(self, linears: Sequence[nn.Linear], fmt: str) -> None:
        super().__init__()
        self.linears, self.fmt = tuple(linears), fmt
        self._held: dict[tuple[int, torch.dtype], ScaledProduct] = {}
        self.multiplied = set[int]()  # places in `linears` since `used` last began

    def __torch_function__(self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        x, weight, bias = (*args, *(kwargs[n] for n in ("input", "weight", "bias") if n in kwargs), None)[:3]
        place = next((i for i, linear in enumerate(self.linears) if linear.weight is weight), None)
        if place is None:
            return func(*args, **kwargs)
        self.multiplied.add(place)
        dtype = multiplied_in(x)
        product = self._held[place, dtype] = scaled_weights(self.linears[place], dtype, self.fmt)
        return product(x.to(dtype), None if bias is None else bias.detach().to(dtype))

    @contextmanager
    def used(self, *places: int) -> Iterator[None]:
        """On for a while in which the Linears at these places are multiplied by. Raises ValueError where one was not."""
        self.multiplied.clear()
        with self:
            yield
        missed = [i for i in places if i not in self.multiplied]
        if missed:
            shape = tuple(self.linears[missed[0]].weight.shape)
            raise ValueError(f"precision: the model's code has another way to multiply by {shape} than torch's linear, which "
                             "alone can be scaled; load it without fused MLPs")  # fmt: skip


_OF_BLOCK: WeakKeyDictionary[Any, dict[str, ScaledLinears]] = WeakKeyDictionary()  # by format


def scaled_block(attend: Any, scale_index: int | None, layer: int, block: Any, *names: str) -> AbstractContextManager[Any]:
    """What a block of a model in the box is run in at a scale: its Linears `names` scaled where the policy says so."""
    step = precision_of(getattr(attend, "policy", None))
    if step is None or not step.at(scale_index, layer):
        return nullcontext()
    known = _OF_BLOCK.setdefault(block, {})
    if step.fmt not in known:
        known[step.fmt] = ScaledLinears([getattr(block, name) for name in names], step.fmt)
    return known[step.fmt]
