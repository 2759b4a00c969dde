"""A 2-D convolution of the decoder as the fused path calls it: by its weight where it is plain, by the module itself where not.

On a GPU, PyTorch adds the bias of a convolution by cuDNN in a pass of its own: as long as a quarter to a half of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.path import interleaved
from sparvar_kernels.path.interleaved import PHASES
from sparvar_kernels.path.pictures import biased
from sparvar_tune.fused.product import why_not_owned
from sparvar_tune.generation.scaled_product import multiplied_in

SEPARATE = ("cuda",)  # where a bias is a pass of its own
HALF = (torch.bfloat16, torch.float16)
# Of few outputs cuDNN has no fast kernel for channels_last half precision: 160 -> 3 of a picture of 1024 x 1024 takes an H100
# 6.2 ms; 1.6 ms with 4 to 16 outputs, 0.42 ms with 32, 0.44 ms with 64.
LEAST_OUTPUTS = 32
LEAST_PIXELS = 32 * 32  # that are enlarged: of fewer, an H200 gains less than a first picture's plans of cuDNN take


def conv_of(module: Any) -> nn.Conv2d | None:
    """The 2-D convolution that a module is or, as Infinity's `Conv`, holds."""
    inner = getattr(module, "conv", module)
    return inner if isinstance(inner, nn.Conv2d) else None


def plain_conv(module: Any) -> nn.Conv2d | None:
    """The convolution that is all that a module does, or None: it may hold nothing else, and nobody hooked either."""
    conv = conv_of(module)
    if conv is None or type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
        return None
    holders = [module] if module is conv else [module, conv]
    alone = module is conv or (list(module._modules.values()) == [conv] and not module._parameters)
    return conv if alone and all(why_not_owned(m) is None for m in holders) else None


def bias_apart(module: Any) -> Tensor | None:
    """The bias that `bare` leaves to the pass behind the convolution, or None where the module adds its own or has none."""
    conv = plain_conv(module)
    return None if conv is None or conv.weight.device.type not in SEPARATE else conv.bias


def bare(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """module(x) without the bias beside it, which is still to be added."""
    bias, conv = bias_apart(module), conv_of(module)
    if bias is None or conv is None:
        return module(x), None
    return _called(conv, x, conv.weight), bias


def is_enlarging(module: Any) -> bool:
    """Whether `enlarged` can do what a convolution does behind nearest interpolation by 2: 3 x 3, plain, with a border of 1."""
    conv = plain_conv(module)
    if conv is None or type(conv.weight) is not nn.Parameter:
        return False
    form = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return form == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def enlarges(module: Any, height: int, width: int) -> bool:
    """Whether `enlarged` is to be called for a picture of these sides."""
    return height * width >= LEAST_PIXELS and is_enlarging(module)


def enlarged(module: Any, x: Tensor) -> Tensor:
    """module(nearest interpolation of x by 2), channels_last, at 4/9 of its work; `is_enlarging` must hold.

    An output pixel sees 2 x 2 pixels of x, some by more than one weight. So its even and odd rows and columns are four
    convolutions of x by sums of weights, which are made by one of four times the outputs. A sum is rounded where its weights
    were each.
    """
    conv = conv_of(module)
    assert conv is not None
    weight = phase_weights(conv.weight).to(multiplied_in(x), memory_format=torch.channels_last)
    apart = bias_apart(module)
    own = None if conv.bias is None or apart is not None else conv.bias.repeat(PHASES)
    return interleaved(F.conv2d(x, weight, own, padding=1).contiguous(memory_format=torch.channels_last), apart)


def phase_weights(weight: Tensor) -> Tensor:
    """[4 O, I, 2, 2] fp32 of [O, I, 3, 3]: sums of the weights that fall on the same pixel, by rows and columns even and odd."""
    weight = weight.to(torch.float32, copy=True)  # views of a parameter made in inference mode are refused outside it
    for axis in (3, 2):
        first, middle, last = weight.split(1, axis)
        # an even pixel lies in the second half of one that only its first weight sees beside it, an odd one in the first half
        even, odd = torch.cat([first, middle + last], axis), torch.cat([first + middle, last], axis)
        weight = torch.cat([even, odd])
    return weight


def few_outputs(module: Any, x: Tensor) -> Tensor:
    """module(x) [B, O, H, W], contiguous, of few outputs O.

    Where a GPU would be slow at it, weights of zero make LEAST_OUTPUTS of them; a sum of another kernel may be in another order.
    """
    conv = plain_conv(module)
    if conv is None or not _is_slow(conv, x):
        out: Tensor = module(x)
        return out.contiguous()
    wide = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, LEAST_OUTPUTS - conv.out_channels))
    return biased(_called(conv, x, wide)[:, : conv.out_channels].contiguous(), conv.bias)


def _is_slow(conv: nn.Conv2d, x: Tensor) -> bool:
    few = conv.groups == 1 and conv.out_channels < LEAST_OUTPUTS
    return few and x.is_cuda and multiplied_in(x) in HALF and x.is_contiguous(memory_format=torch.channels_last)


def _called(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution by `weight` and without a bias; autocast casts both as it casts the module's."""
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
