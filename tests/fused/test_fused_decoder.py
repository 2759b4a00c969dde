"""The picture decoder's fused path, on look-alikes of the public decoders: the untouched one is the oracle."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decoder_lookalikes import Held, Plain, Rectified, made
from public_models.stand_ins import put_missing, put_module, quietly
from torch import nn

from sparvar_kernels.path import interleaved
from sparvar_tune.adapters import flash_attn_stand_in
from sparvar_tune.adapters.instance_forward import replace_method
from sparvar_tune.fused import convolution
from sparvar_tune.fused import decoder as fused
from sparvar_tune.fused.decoder import Untouched, attach_decoder, decoder_builds, decoder_of


@pytest.fixture(autouse=True)
def small_pictures_are_enlarged(monkeypatch):
    monkeypatch.setattr(convolution, "LEAST_PIXELS", 0)


def latent(side=16, channels=4, batch=4):  # enough numbers that roundings average out
    return torch.randn(batch, channels, side, side + 1, generator=torch.Generator().manual_seed(3))


def state(decoder):
    """All that an undo has to give back: attributes of each module, weights' memory and values."""
    own = [{k: v for k, v in vars(m).items() if not k.startswith("_")} | {"forward": vars(m).get("forward")}
           for m in decoder.modules()]  # fmt: skip
    return own, [(t.shape, t.stride(), t.dtype, t.clone()) for t in decoder.state_dict().values()]


def assert_same_state(before, after):
    assert before[0] == after[0]
    for a, b in zip(before[1], after[1], strict=True):
        assert a[:3] == b[:3] and torch.equal(a[3], b[3])


def apart(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


KINDS = [(Plain, "nin_shortcut", True), (Plain, "conv_shortcut", False), (Held, "nin_shortcut", True)]


@pytest.mark.parametrize(("kind", "shortcut", "attention"), KINDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_draws_what_the_untouched_decoder_draws_and_undoes_exactly(kind, shortcut, attention, channels_last, monkeypatch):
    decoder, z = made(kind, shortcut, attention), latent()
    want, before, noise = decoder(z), state(decoder), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        half = decoder(z)
    calls = []
    own = fused.group_norm_silu
    monkeypatch.setattr(fused, "group_norm_silu", lambda *a, **k: calls.append(k["out_dtype"]) or own(*a, **k))
    path = attach_decoder(decoder, channels_last)
    calls.clear()
    got = decoder(z)
    norms = sum(isinstance(m, nn.GroupNorm) for m in decoder.modules())
    assert calls == [torch.float32] * norms and path.reason is None
    assert got.is_contiguous() and apart(got, want) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        now = decoder(z)
    assert set(calls[norms:]) == {torch.bfloat16} and now.dtype == half.dtype
    assert apart(now, want) <= apart(half, want), "further from fp32 than the untouched decoder"
    laid = [m.weight.is_contiguous(memory_format=torch.channels_last) for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert all(laid) if channels_last else not all(laid)
    path.undo()
    assert_same_state(before, state(decoder))
    assert torch.equal(decoder(z), want) and torch.equal(noise, torch.get_rng_state())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kind", [Plain, Held])
@pytest.mark.parametrize("separate", [(), ("cpu",)])
def test_foresees_what_a_picture_launches(kind, separate, monkeypatch):
    from sparvar_kernels.path.triton.biased_sum import biased_sum_build
    from sparvar_kernels.path.triton.group_norm import Cut, group_norm_builds
    from sparvar_kernels.path.triton.interleaved import interleaved_build

    launched, sums, larger = set(), set(), set()

    def cut(x):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return Cut(len(x), x.shape[1], x.shape[2] * x.shape[3], last=True)

    def recorded(x, groups, weight, bias, eps, *, silu, out_dtype, add):
        types = weight.dtype, bias.dtype, silu, cut(x).aligned, None if add is None else add.dtype
        launched.update(group_norm_builds(cut(x), groups, x.dtype, out_dtype, *types))
        return x.to(out_dtype)

    def recorded_picture(phases, bias):
        type_ = None if bias is None else bias.dtype
        larger.add(interleaved_build(cut(out := interleaved(phases, bias)), phases.dtype, type_, cut(out).aligned))
        return out

    def recorded_sum(x, update, *biases):
        types = (None if bias is None else bias.dtype for bias in biases)
        sums.add(biased_sum_build(cut(x), x.dtype, *types, cut(update).aligned))
        return x + update

    monkeypatch.setattr(convolution, "SEPARATE", separate)
    decoder, z = made(kind), latent()
    with attach_decoder(decoder), torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(fused, "group_norm_silu", recorded)
        monkeypatch.setattr(fused, "biased_sum", recorded_sum)
        monkeypatch.setattr(convolution, "interleaved", recorded_picture)
        decoder(z)
        assert set(decoder_builds(decoder, tuple(z.shape), torch.bfloat16)) == launched | sums | larger
        assert len(larger) == 1
        assert len(launched) >= 6 and len(sums) == (3 if separate else 0)


@pytest.mark.parametrize("kind", [Plain, Held])
def test_biases_go_into_the_pass_behind_their_convolution(kind, monkeypatch):
    """Each once: left out or added twice, the picture is another."""
    decoder, z = made(kind), latent()
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.bias.add_(torch.randn_like(module.bias))
    decoder.up[0].block[1].conv1.register_forward_hook(lambda *_: None)  # adds its own
    want = decoder(z)
    with torch.autocast("cpu", torch.bfloat16):
        half = decoder(z)
    monkeypatch.setattr(convolution, "SEPARATE", ("cpu",))
    added, sums = [], []
    norm, total = fused.group_norm_silu, fused.biased_sum
    monkeypatch.setattr(fused, "group_norm_silu", lambda *a, **k: added.append(k["add"]) or norm(*a, **k))
    monkeypatch.setattr(fused, "biased_sum", lambda *a: sums.append(a[2:]) or total(*a))
    with attach_decoder(decoder):
        added.clear(), sums.clear()
        assert apart(decoder(z), want) < 1e-5
        assert sum(bias is not None for bias in added) == 5 and len(sums) == 6
        assert sum(bias is not None for pair in sums for bias in pair) == 7
        with torch.autocast("cpu", torch.bfloat16):
            assert apart(decoder(z), want) <= 1.2 * apart(half, want)  # two roundings more than of a CPU's convolution
        for lost in ("add", "x_bias", "bias"):
            with monkeypatch.context() as m:
                m.setattr(
                    fused, "group_norm_silu", lambda *a, lost=lost, **k: norm(*a, **k | ({"add": None} if lost == "add" else {}))
                )
                m.setattr(fused, "biased_sum", lambda x, h, x_bias, bias, lost=lost: total(
                    x, h, None if lost == "x_bias" else x_bias, None if lost == "bias" else bias))  # fmt: skip
                assert apart(decoder(z), want) > 0.01, lost


def test_upsampling_is_replaced_where_it_is_by_nearest_pixels(monkeypatch):
    """Not where it interpolates otherwise, does more, or is hooked later."""
    calls = []
    monkeypatch.setattr(convolution, "interleaved", lambda *a: calls.append(1) or interleaved(*a))

    def smooth(module):
        module.__class__ = type("Smooth", (nn.Module,), {
            "forward": lambda self, x: self.conv(F.interpolate(x, scale_factor=2, mode="bilinear"))})  # fmt: skip

    changes = {
        "known": (lambda m: None, True), "smooth": (smooth, False), "more": (lambda m: setattr(m, "pxsl", nn.Identity()), False),
    }  # fmt: skip
    for name, (change, known) in changes.items():
        decoder, z = made(), latent()
        change(decoder.up[1].upsample)
        want = decoder(z)
        with attach_decoder(decoder):
            calls.clear()
            assert apart(decoder(z), want) < 1e-5 and len(calls) == known, name
            decoder.up[1].upsample.register_forward_hook(lambda m, x, out: out * 2)
            hooked = decoder(z)
            assert len(calls) == known and apart(hooked, want) > 0.01, name


class Gained(nn.Module):
    """A convolution within a module that does more, by nothing that it holds as a parameter."""

    def __init__(self, conv, does):
        super().__init__()
        self.conv, self.does = conv, does

    def forward(self, x):
        return self.does(self.conv, x)


@pytest.mark.parametrize("does", [
    lambda conv, x: conv(x) * 1.25, lambda conv, x: F.silu(conv(x)), lambda conv, x: conv(F.pad(x, (1, 1, 1, 1), "replicate"))[
        :, :, 1:-1, 1:-1],
])  # fmt: skip
def test_what_a_module_does_around_the_convolution_is_seen_before_any_picture_is_large(does, monkeypatch):
    """The small latent of the check is too small to be enlarged, and the picture is not."""
    monkeypatch.setattr(convolution, "LEAST_PIXELS", 32 * 32)
    decoder, z = made(), latent(32, batch=1)
    decoder.up[1].upsample.conv = Gained(decoder.up[1].upsample.conv, does)
    want = decoder(z)
    with attach_decoder(decoder):
        assert apart(decoder(z), want) < 1e-5


def test_an_upsampling_that_becomes_another_is_called_as_it_is():
    decoder, x = made(), torch.randn(1, 16, 4, 4)
    module = decoder.up[1].upsample
    with attach_decoder(decoder) as path:
        assert apart(path._upsampled(module, x), module(x)) < 1e-5
        module.__class__ = type("Smooth", (type(module),), {
            "forward": lambda self, x: self.conv(F.interpolate(x, scale_factor=2, mode="bilinear"))})  # fmt: skip
        assert torch.equal(path._upsampled(module, x), module(x))


def test_upsampling_of_a_small_picture_is_the_models_own(monkeypatch):
    """cuDNN would plan one shape more, at every first picture, for nothing."""
    calls, decoder = [], made()
    monkeypatch.setattr(convolution, "interleaved", lambda *a: calls.append(1) or interleaved(*a))
    monkeypatch.setattr(convolution, "LEAST_PIXELS", 16 * 17)
    with attach_decoder(decoder):
        for side, enlarged in ((16, 1), (15, 0)):
            calls.clear()
            z = latent(side)
            decoder(z)
            assert len(calls) == enlarged


def test_parts_of_a_sum_of_two_memory_formats(monkeypatch):
    monkeypatch.setattr(convolution, "SEPARATE", ("cpu",))
    block = made().up[1].block[0]
    x = torch.randn(2, 16, 4, 5)
    want = block(x)
    block.conv2.to(memory_format=torch.channels_last)
    monkeypatch.setattr(fused, "biased_sum", None)
    assert torch.allclose(fused._residual(block, x), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_of_half_the_width(dtype):
    decoder, z = made(), latent()
    want = decoder(z)
    decoder.to(dtype)
    half = decoder(z.to(dtype))
    with attach_decoder(decoder):
        got = decoder(z.to(dtype))
    assert got.dtype == dtype and apart(got, want) <= apart(half, want)


def test_weights_loaded_meanwhile_stay_after_undo():
    decoder, other = made(), made()
    other.conv_in.weight.mul_(2)
    path = attach_decoder(decoder)
    decoder.load_state_dict(other.state_dict())
    path.undo()
    assert torch.equal(decoder(latent()), other(latent()))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        decoder = made()
        want, before = decoder(latent()), state(decoder)
    path = attach_decoder(decoder)
    with torch.inference_mode():
        assert apart(decoder(latent()), want) < 1e-5
    path.undo()
    with torch.inference_mode():
        assert_same_state(before, state(decoder))


def test_attached_in_inference_mode_the_weights_can_learn_afterwards():
    decoder = made()
    before = state(decoder)
    with torch.inference_mode():
        path = attach_decoder(decoder)
        decoder(latent())
    decoder.requires_grad_(True)
    decoder(latent()).sum().backward()
    path.undo()
    decoder.zero_grad()
    decoder(latent()).sum().backward()
    assert_same_state(before, state(decoder))
    assert decoder.conv_in.weight.grad.stride() == decoder.conv_in.weight.stride()


def test_writes_an_fp32_picture_as_autocast_reads_it():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused._normed(nn.GroupNorm(2, 4), torch.randn(1, 4, 3, 3).transpose(2, 3)).dtype == torch.bfloat16


def test_where_a_gradient_is_asked_for_the_own_code_runs():
    decoder = made()
    z = latent().requires_grad_()
    decoder(z).sum().backward()
    want, z.grad = z.grad, None
    with attach_decoder(decoder, channels_last=False) as path:
        decoder(z).sum().backward()
        assert torch.equal(z.grad, want) and "gradient" in path.reason
        with torch.no_grad():
            decoder(z)
        assert path.reason is None


def _hooked():
    decoder = made()
    decoder.up[0].block[1].register_forward_hook(lambda *a: None)
    return decoder


def _hooked_norm():
    decoder = made(Held)
    decoder.mid.block_2.norm1.norm.register_forward_hook(lambda *a: None)
    return decoder


def _changed(change):
    decoder = made()
    change(decoder)
    return decoder


REFUSED = {
    "another function between the modules": (lambda: made(Rectified), "another picture"),
    "a part of one": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), "it has no conv_in"),
    "a hook": (_hooked, r"up\.0\.block\.1: another tool's hook"),
    "a hook within a norm": (_hooked_norm, r"mid\.block_2: another tool's hook is on its GroupNorm"),
    "another norm": (lambda: _changed(lambda d: setattr(d.mid.block_1, "norm2", nn.BatchNorm2d(16))), "BatchNorm2d"),
    "another norm at the end": (lambda: _changed(lambda d: setattr(d, "norm_out", nn.Identity())), "norm_out: its norm"),
    "convolution in three dimensions": (lambda: _changed(lambda d: setattr(d, "conv_in", nn.Conv3d(4, 16, 3))), "Conv3d"),
    "no convolution": (lambda: _changed(lambda d: setattr(d.mid.block_2, "conv2", nn.Identity())), "conv2"),
    "training": (lambda: _changed(lambda d: d.train()), "training mode"),
    "fp64": (lambda: _changed(lambda d: d.double()), "float64"),
    "another order": (lambda: _changed(lambda d: setattr(d, "up", d.up[::-1])), "decoding a small latent"),
    "not finite": (lambda: _changed(lambda d: d.conv_out.bias.fill_(float("inf"))), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refuses_what_it_does_not_know_and_changes_nothing(why):
    make, reason = REFUSED[why]
    decoder = make()
    before = state(decoder)
    with pytest.raises(ValueError, match=reason) as caught:
        attach_decoder(decoder)
    assert "\n" not in str(caught.value)
    assert_same_state(before, state(decoder))


def test_an_attention_with_a_hook_is_called_as_it_is():
    decoder, z, seen = made(), latent(), []
    replace_method(decoder.mid.attn_1.norm, "forward", lambda inner, x: seen.append(1) or inner(x))
    decoder.mid.attn_1.norm.register_forward_hook(lambda *a: seen.append(2))
    want = decoder(z)
    seen.clear()
    with attach_decoder(decoder):
        seen.clear()
        assert apart(decoder(z), want) < 1e-5 and seen == [1, 2]


def test_finds_the_decoder_that_a_call_draws_with():
    one, two = made(), made()
    model = SimpleNamespace(vae_proxy=(SimpleNamespace(decoder=one),))
    assert decoder_of(model, {}) is one and decoder_of(model, {"vae": None}) is one
    assert decoder_of(model, {"vae": SimpleNamespace(decoder=two)}) is two
    assert decoder_of(SimpleNamespace(), {}) is None and decoder_of(SimpleNamespace(), {"vae": object()}) is None


def test_a_copy_of_an_attached_decoder_is_refused():
    with attach_decoder(decoder := made()), pytest.raises(ValueError, match="undo it before copying"):
        copy.deepcopy(decoder)


PUBLIC = {"infinity": "SPARVAR_INFINITY", "var": "SPARVAR_VAR", "hart": "SPARVAR_HART"}


def public_decoder(family):
    """The public code's own decoder at a quarter of its width, from a checkout."""
    checkout = os.environ.get(PUBLIC[family])
    if not checkout:
        pytest.skip(f"{PUBLIC[family]} names no checkout")
    sys.path.insert(0, checkout)
    torch.manual_seed(0)
    if family != "infinity":
        basic_vae = importlib.import_module("models.basic_vae" if family == "var" else "hart.modules.networks.basic_vae")
        return basic_vae.Decoder(ch=32, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=8).eval().requires_grad_(False)
    put_missing()
    for name, names in (("imageio", {}), ("torchvision", {"transforms": None}), ("safetensors.torch", {"load_file": None})):
        if find_spec(name.split(".")[0]) is None:
            put_module(name.split(".")[0])
            put_module(name, **names)
    with quietly(), flash_attn_stand_in():
        from infinity.models.bsq_vae.flux_vqgan import Decoder as Public

    cnn = dict(
        cnn_type="2d", conv_in_out_2d="no", res_conv_2d="no", cnn_attention="no", cnn_norm_axis="spatial", conv_inner_2d="no"
    )
    return Public(32, [1, 2, 4], 2, 8, patch_size=4, cnn_param=cnn).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("family", PUBLIC)
def test_the_public_decoder(family):
    decoder, z = public_decoder(family), latent(6, 8, 1)
    want, before = decoder(z), state(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        half = decoder(z)
    with attach_decoder(decoder) as path:
        assert apart(decoder(z), want) < 1e-5 and path.reason is None
        with torch.autocast("cpu", torch.bfloat16):
            assert apart(decoder(z), want) <= apart(half, want)
    assert_same_state(before, state(decoder))
    assert torch.equal(decoder(z), want)
    with attach_decoder(decoder.bfloat16()):  # at the public depth roundings must not pass for another decoder
        assert decoder(z.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_picture_drawn_aside_is_the_same(device):
    decoder, threads = made().to(device), []
    handle = decoder.conv_in.register_forward_pre_hook(lambda *_: threads.append(threading.current_thread()))
    with torch.inference_mode():
        here, aside = Untouched(decoder), Untouched(decoder, aside=True)
        aside.wait()
    handle.remove()
    assert torch.equal(aside.want, here.want) and aside.want.is_inference()
    assert threads[0] is threading.current_thread() and threads[1] is not threads[0]
    with aside.attach():
        pass


@pytest.mark.parametrize("aside", [False, True])
def test_what_is_wrong_with_its_own_picture_is_said_when_that_is_needed(aside):
    decoder = made()
    decoder.conv_out.forward = raising = lambda *_: 1 / 0
    untouched = Untouched(decoder, aside=aside)
    with pytest.raises(ValueError, match="decoding a small latent: division"):
        untouched.attach()
    assert decoder.conv_out.forward is raising and "forward" not in vars(decoder)


def test_the_block_path_leaves_it_alone_until_its_first_call():
    """Its kernels are compiled while the blocks draw; the first picture of all is decoded on the fused path, and once."""
    import adapter_checks as checks
    import block_lookalikes

    from sparvar_tune import adapters
    from sparvar_tune.fused import put_on

    driven, z = block_lookalikes.Infinity(), latent()
    driven.model.quantiser.decoder = decoder = made()
    want, before = decoder(z), checks.everything(driven)
    with put_on(*adapters.recognise(driven.model), None, "fused") as path:
        engine, own = path.fused, decoder.conv_in
        engine._begin_decoder(decoder)
        assert engine.decoder is None and engine.why_not_decoder is None
        layout = own.weight.stride()
        with torch.no_grad():
            got = decoder(z)
        assert engine.decoder.decoder is decoder and engine.decoder.reason is None and own.weight.stride() != layout
        assert apart(got, want) < 1e-5
        engine._put_on_decoder(None)
        engine._begin_decoder(decoder)
        engine._put_on_decoder(None)  # switched off before it was called
        assert engine.decoder is None and "forward" not in vars(decoder) and torch.equal(decoder(z), want)
    assert checks.everything(driven) == before


def test_the_block_path_puts_it_on_with_the_first_image_and_takes_it_off():
    """Off while the path is switched off, back on with it, and gone when it is undone."""
    import adapter_checks as checks
    import block_lookalikes

    from sparvar_tune import adapters
    from sparvar_tune.fused import put_on

    driven = block_lookalikes.Infinity()
    driven.model.quantiser.decoder = decoder = made()
    before = checks.everything(driven)
    with put_on(*adapters.recognise(driven.model), None, "fused") as path:
        assert path.fused.decoder is None and "no image" in path.fused.why_not_decoder
        checks.draw(driven)
        assert path.fused.decoder.decoder is decoder and path.fused.why_not_decoder is None and "forward" in vars(decoder)
        path.fused.enabled = False
        assert "forward" not in vars(decoder)
        path.fused.enabled = True
        assert "forward" in vars(decoder)
        driven.model.quantiser.decoder = nn.Linear(1, 1)
        checks.draw(driven)
        assert "forward" not in vars(decoder) and "it has no conv_in" in path.fused.why_not_decoder
        driven.model.quantiser.decoder = decoder
        checks.draw(driven)
        assert "forward" in vars(decoder)
        hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
        with pytest.warns(UserWarning, match="hook is on all modules"):
            checks.draw(driven)
        hook.remove()
        assert "forward" not in vars(decoder) and "hook is on all modules" in path.fused.why_not_decoder
    assert checks.everything(driven) == before
