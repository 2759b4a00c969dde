"""Convolutions of the decoder by their weight alone, against the module itself and a sum over the kernel's places in fp64."""

from __future__ import annotations

import pytest
import torch
from decoder_lookalikes import HeldConv
from torch import nn

from sparvar_tune.fused import convolution
from sparvar_tune.fused.convolution import enlarged, enlarges, few_outputs, is_enlarging, phase_weights, plain_conv


def picture(dtype=torch.float32, channels=6):
    x = torch.randn(2, channels, 5, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def by_places(conv, x):
    """The convolution of stride 1 as a sum over its kernel's places, fp64."""
    pad = conv.padding[0]
    height, width = (n + 2 * pad for n in x.shape[2:])
    around = torch.zeros(*x.shape[:2], height, width, dtype=torch.float64)
    around[:, :, pad : height - pad, pad : width - pad] = x.double()
    out = torch.zeros(len(x), conv.out_channels, height - conv.kernel_size[0] + 1, width - conv.kernel_size[1] + 1).double()
    for i in range(conv.kernel_size[0]):
        for j in range(conv.kernel_size[1]):
            out += torch.einsum("bchw,oc->bohw", around[:, :, i : i + out.shape[2], j : j + out.shape[3]],
                                conv.weight[:, :, i, j].double())  # fmt: skip
    return out if conv.bias is None else out + conv.bias.double()[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_few_outputs_are_those_of_the_module(held, bias, monkeypatch):
    torch.manual_seed(0)
    module = (HeldConv if held else nn.Conv2d)(6, 3, 3, padding=1, bias=bias)
    want, widths = by_places(plain_conv(module), picture()), []
    own = convolution._called
    monkeypatch.setattr(convolution, "_called", lambda conv, x, w: widths.append((len(w), w.stride())) or own(conv, x, w))
    for slow in (False, True):
        monkeypatch.setattr(convolution, "_is_slow", lambda conv, x, slow=slow: slow)
        got = few_outputs(module, picture())
        assert got.is_contiguous() and got.shape == (2, 3, 5, 7) and torch.allclose(got.double(), want, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            half, plain = few_outputs(module, picture()), module(picture())
        assert half.dtype == torch.bfloat16 and float((half.double() - want).abs().max()) < 0.03
        assert slow or torch.equal(half, plain)
    assert [n for n, _ in widths] == [convolution.LEAST_OUTPUTS] * 2


@torch.no_grad()
def test_a_convolution_that_is_more_than_its_weight_is_called(monkeypatch):
    monkeypatch.setattr(convolution, "_is_slow", lambda conv, x: True)
    seen = []
    hooked, beside = nn.Conv2d(6, 3, 3, padding=1), HeldConv(6, 3, 1)
    reflected = nn.Conv2d(6, 3, 3, padding=1, padding_mode="reflect")
    hooked.register_forward_hook(lambda *_: seen.append(1))
    beside.more = nn.Conv2d(6, 3, 1)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 3, 1))
    for module in (hooked, reflected, beside, normed, nn.Sequential(nn.Conv2d(6, 3, 1))):
        assert plain_conv(module) is None
        assert torch.equal(few_outputs(module, picture()), module(picture()).contiguous())
    assert len(seen) == 2 and plain_conv(HeldConv(6, 3, 1)) is not None


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_few_outputs_differ_by_the_order_of_sums(dtype):
    module, x = nn.Conv2d(160, 3, 3, padding=1), picture(dtype, 160)
    want = by_places(module, x)
    module, x = module.to("cuda", memory_format=torch.channels_last), x.cuda()
    assert convolution._is_slow(module, x)
    with torch.autocast("cuda", dtype):
        got, own = (f.cpu().double() for f in (few_outputs(module, x), module(x)))
    least = torch.finfo(dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= 1.5 * float((own - want).abs().max()) + least


def twice(x):
    """Every pixel four times."""
    out = torch.full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = x
    return out


@torch.no_grad()
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_enlarged_picture_is_the_convolution_of_every_pixel_four_times(held, bias, channels_last):
    torch.manual_seed(0)
    module, x = (HeldConv if held else nn.Conv2d)(6, 5, 3, padding=1, bias=bias), picture()
    conv = plain_conv(module)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    else:
        x = x.contiguous()
    want = by_places(conv, twice(x.double()))
    got = enlarged(module, x)
    assert is_enlarging(module) and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(got.double(), want, rtol=0, atol=2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half, own = enlarged(module, x), module(twice(x))
    assert half.dtype == torch.bfloat16
    assert (half.double() - want).norm() <= 1.1 * (own.double() - want).norm(), "further off than the module itself"


def test_every_weight_falls_on_the_pixels_it_sees():
    """One at a time: 9 places, each in four phases once."""
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(2, 3, 3, 3)
            weight[1, 2, i, j] = 1
            phases = phase_weights(weight).view(2, 2, 2, 3, 2, 2)
            for a in (0, 1):
                for b in (0, 1):
                    want = torch.zeros(2, 3, 2, 2)
                    want[1, 2, (a + i + 1) // 2 - a, (b + j + 1) // 2 - b] = 1
                    assert torch.equal(phases[a, b], want), (i, j, a, b)


@pytest.mark.parametrize("change", [
    {"kernel_size": 5, "padding": 2}, {"padding": 0}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2},
    {"padding_mode": "reflect"}, {"padding": "same"},
])  # fmt: skip
def test_another_convolution_is_not_enlarged(change):
    assert not is_enlarging(nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **change}))


def test_a_hooked_convolution_is_not_enlarged():
    for module in (HeldConv(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)):
        assert is_enlarging(module) and enlarges(module, 32, 32) and not enlarges(module, 31, 33)
        module.register_forward_hook(lambda *_: None)
        assert not is_enlarging(module) and not enlarges(module, 64, 64)
    own = nn.Conv2d(6, 6, 3, padding=1)
    own.weight = nn.Parameter(own.weight.detach().as_subclass(type("Own", (torch.Tensor,), {})))
    assert type(own.weight) is not nn.Parameter and not is_enlarging(own)
    assert not is_enlarging(None) and not is_enlarging(nn.Linear(3, 3))


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_enlarged(dtype):
    torch.manual_seed(0)
    module = nn.Conv2d(64, 48, 3, padding=1).cuda()
    x = torch.randn(2, 64, 33, 40, device="cuda").contiguous(memory_format=torch.channels_last)
    want = by_places(module.cpu(), twice(x.cpu().double()))
    module.cuda()
    with torch.autocast("cuda", dtype):
        got, own = enlarged(module, x), module(twice(x.cpu()).cuda())
    away, public = ((y.cpu().double() - want).norm() / want.norm() for y in (got, own))
    assert got.dtype == dtype and away <= 1.1 * public
