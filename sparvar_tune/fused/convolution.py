"""A 2-D convolution of the decoder as the fused path calls it: by its weight where it is plain, by the module itself where not.

On a GPU, PyTorch adds the bias of a convolution by cuDNN in a pass of its own: as long as a quarter to a half of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.path.pictures import biased
from sparvar_tune.fused.product import why_not_owned
from sparvar_tune.generation.scaled_product import multiplied_in

SEPARATE = ("cuda",)  # where a bias is a pass of its own
HALF = (torch.bfloat16, torch.float16)
# Of few outputs cuDNN has no fast kernel for channels_last half precision: 160 -> 3 of a picture of 1024 x 1024 takes an H100
# 6.2 ms; 1.6 ms with 4 to 16 outputs, 0.42 ms with 32, 0.44 ms with 64.
LEAST_OUTPUTS = 32


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
