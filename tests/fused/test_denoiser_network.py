"""The network of HART's denoiser in fewer passes: a look-alike of its modules, called as they are, is the oracle."""

from __future__ import annotations

import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from denoiser_lookalikes import Denoiser, Diffusion, Embedding, sampled
from torch import nn

from sparvar_tune.fused import denoiser_network
from sparvar_tune.fused.denoiser import put_on_denoiser
from sparvar_tune.fused.denoiser_network import DenoiserNetwork, network_builds, why_not_network

WIDTH = 32
PARTS = {"shift": 0.0, "scale": 0.0, "gate": 1.0}  # and what stands for one that is left out


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_ln = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))
        self.without, self.activation = "", F.silu

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        shift, scale, gate = (
            PARTS[n] if n == self.without else t for n, t in (("shift", shift), ("scale", scale), ("gate", gate))
        )
        h = self.mlp[0](self.in_ln(x) * (1 + scale) + shift)
        return gate * self.mlp[2](self.activation(h)) + (0 if self.without == "sum" else x)


class Final(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, 8)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.without = ""

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + (0 if self.without == "scale" else scale)) + shift)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_proj, self.time_embed, self.cond_embed = nn.Linear(4, WIDTH), Embedding(), nn.Linear(8, WIDTH)
        self.time_embed.mlp = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.res_blocks, self.final_layer, self.calls = nn.ModuleList(Block() for _ in range(3)), Final(), 0

    def forward(self, x, t, c):
        self.calls += 1
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


def made():
    torch.manual_seed(0)
    net = Network().eval().requires_grad_(False)
    for name, t in net.named_parameters():
        t.add_(torch.randn_like(t) * (0.3 if "bias" in name or "ln" in name else 0.1))
    return net


def given(rows=100, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return torch.randn(rows, 4, generator=g).to(dtype), torch.full((rows,), 500), torch.randn(rows, 8, generator=g).to(dtype)


def apart(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def ours(net, x, t, c):
    network = DenoiserNetwork(net)
    assert network.why_not(net, x, t, c) is None
    return network(x, t[:1], network.condition(c))


@torch.no_grad()
def test_is_the_modules_own_within_rounding():
    net = made()
    want = net(*given())
    assert apart(ours(net, *given()), want) < 2e-6
    for dtype, most in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", dtype):
            own, got = net(*given()), ours(net, *given())
        assert got.dtype == own.dtype == dtype and apart(got, own) < most
        assert apart(got, want) <= 1.1 * apart(own, want), "further from fp32 than the modules"
        half = made().to(dtype)
        half.time_embed.timestep_embedding = lambda t, dim, d=dtype: Embedding().timestep_embedding(t, dim).to(d)
        own, got = half(*given(dtype=dtype)), ours(half, *given(dtype=dtype))
        assert got.dtype == own.dtype == dtype and apart(got, own) < most


def _another(change):
    net = made()
    change(net)
    return net


UNLIKE = {
    **{f"no {part}": lambda n, part=part: setattr(n.res_blocks[1], "without", part) for part in (*PARTS, "sum")},
    "no scale at the end": lambda n: setattr(n.final_layer, "without", "scale"),
    "GELU": lambda n: setattr(n.res_blocks[0], "activation", F.gelu),
}


@torch.no_grad()
@pytest.mark.parametrize("what", UNLIKE)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_network_that_makes_something_else_of_the_same_modules_is_left_alone(what, dtype):
    net = _another(UNLIKE[what])
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        network = DenoiserNetwork(net)
        assert "something else of its modules" in network.why_not(net, *given())
        assert network.why_not(net, *given()) == network.reason


@torch.no_grad()
@pytest.mark.parametrize(("change", "reason"), [
    (lambda n: setattr(n.res_blocks[1], "in_ln", nn.RMSNorm(WIDTH)), r"res_blocks\.1\.in_ln is RMSNorm"),
    (lambda n: setattr(n.res_blocks[0].mlp, "1", nn.GELU()), r"res_blocks\.0\.mlp"),
    (lambda n: setattr(n.final_layer, "adaLN_modulation", n.res_blocks[0].adaLN_modulation), "final_layer.*another number"),
    (lambda n: setattr(n.final_layer, "adaLN_modulation", nn.Identity()), r"final_layer\.adaLN_modulation is not"),
    (lambda n: setattr(n, "input_proj", nn.Identity()), "input_proj"), (lambda n: n.double(), "weights"),
    (lambda n: setattr(n, "res_blocks", nn.ModuleList()), "no residual block"),
])  # fmt: skip
def test_other_modules_are_left_alone(change, reason):
    found = why_not_network(_another(change))
    assert found and "\n" not in found and re.search(reason, found), found


@torch.no_grad()
def test_what_cannot_be_replaced_any_more_is_called():
    net = made()
    network = DenoiserNetwork(net)
    assert network.why_not(net, *given()) is None
    hook = net.res_blocks[1].in_ln.register_forward_hook(lambda *_: None)
    assert "another tool's hook is on its LayerNorm" in network.why_not(net, *given())
    hook.remove()
    assert network.why_not(net, *given()) is None
    net.res_blocks[2], calls = Block().requires_grad_(False), net.calls
    assert network.why_not(net, *given()) is None and net.calls == calls + 1
    net.res_blocks[2].without = "gate"
    net.res_blocks[2].mlp[0] = nn.Linear(WIDTH, WIDTH)
    assert "something else" in network.why_not(net, *given())
    net.res_blocks[2] = made().res_blocks[2]
    assert "want 1 to" in network.why_not(net, *given(denoiser_network.MOST_ROWS + 1))
    assert "no Linear input_proj" in DenoiserNetwork(nn.Linear(2, 2)).reason and why_not_network(Denoiser())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_picture_is_drawn_with_it_and_its_condition_made_once(dtype, monkeypatch):
    diffusion, net, drawing = Diffusion(), made(), [True]
    model = SimpleNamespace(diffloss=SimpleNamespace(net=net, gen_diffusion=diffusion))
    before, seen, times = [dict(vars(m)) for m in net.modules()], [], []
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        want, state = sampled(diffusion, net)
        with put_on_denoiser(model, lambda: drawing[0], True):
            sampled(diffusion, net)  # with the check
            hooks = [net.cond_embed.register_forward_hook(lambda *_: seen.append(1)),
                     net.time_embed.mlp[0].register_forward_hook(lambda m, x, y: times.append(len(x[0])))]  # fmt: skip
            net.calls = 0
            got, own = sampled(diffusion, net)
            assert net.calls == 0 and seen == [1] and times == [1] * 4
            assert torch.equal(state, own) and apart(got, want) < (1e-5 if dtype is None else 0.05)
            x, t, c = given(6)
            net.forward(x, t, c)  # by somebody else
            assert net.calls == 1
            before_bias = net.cond_embed.bias.clone()
            net.cond_embed.bias.add_(1)  # between pictures: seen by the next
            assert apart(sampled(diffusion, net)[0], got) > 0.01 and net.calls == 1
            net.cond_embed.bias.copy_(before_bias)
            drawing[0] = False
            assert torch.equal(sampled(diffusion, net)[0], want) and net.calls > 1
            for hook in hooks:
                hook.remove()
    net.calls = 0
    assert [dict(vars(m)) for m in net.modules()] == before


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@torch.no_grad()
def test_foresees_what_a_step_launches(monkeypatch):
    from sparvar_kernels.path.triton.residual_norm import residual_norm_build

    net, launched, own = made(), [], denoiser_network.residual_norm

    def recorded(x, update, gate, *, norm, eps, out_dtype, **operands):
        types = {n: t.dtype for n, t in (("update", update), ("gate", gate), *operands.items()) if t is not None}
        launched.append(residual_norm_build(x.dtype, out_dtype, x.shape[-1], norm, True, types))
        return own(x, update, gate, norm=norm, eps=eps, out_dtype=out_dtype, **operands)

    monkeypatch.setattr(denoiser_network, "residual_norm", recorded)
    with torch.autocast("cpu", torch.float16):
        ours(net, *given())
    assert set(network_builds(net, torch.float16)) == set(launched) and len(set(launched)) == 3
    assert network_builds(Denoiser(), torch.float16) == network_builds(None, torch.float16) == []


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_steps_are_replayed():
    diffusion, net = Diffusion(), made().cuda()
    model = SimpleNamespace(diffloss=SimpleNamespace(net=net, gen_diffusion=diffusion))
    with torch.autocast("cuda", torch.float16):
        want = sampled(diffusion, net, "cuda")[0]
        with put_on_denoiser(model, lambda: True, True):
            got = [sampled(diffusion, net, "cuda")[0] for _ in range(3)]
            net.calls = 0
            got.append(sampled(diffusion, net, "cuda")[0])
            assert net.calls == 0
    assert all(torch.equal(a, got[0]) for a in got) and apart(got[0], want) < 0.02
