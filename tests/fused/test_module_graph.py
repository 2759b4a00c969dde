"""A module as one CUDA graph: when it is captured, what it must not outlive, and on a GPU that it is the eager path."""

from __future__ import annotations

import warnings

import adapter_checks as checks
import block_lookalikes
import pytest
import torch
from decoder_lookalikes import made
from fused_checks import on
from torch import nn

from sparvar_tune.fused import module_graph
from sparvar_tune.fused.decoder import attach_decoder
from sparvar_tune.fused.module_graph import ModuleGraph
from sparvar_tune.fused.watched import Watched, contents, place


def latent(height, width, seed):
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(seed))


class Replayed:
    """Stands for a graph on a CPU: what was captured runs again, on the same tensors."""

    def __init__(self, run):
        self.run, self.replays = run, 0
        run()

    def replay(self):
        self.replays += 1
        self.run()


@pytest.fixture
def graphs(monkeypatch):
    found = []
    monkeypatch.setattr(module_graph, "captured", lambda run, device, pool: found.append(Replayed(run)) or found[-1])
    return found


@pytest.fixture(autouse=True)
def held(monkeypatch, request):
    """What graphs hold, the last of these many bytes; on a GPU it is asked for."""
    bytes_ = [0]
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(module_graph, "held_bytes", lambda pool: bytes_[-1])
    return bytes_


@torch.no_grad()
def test_the_first_is_eager_the_second_captured_and_every_picture_has_its_own_memory(graphs):
    decoder = made()
    path = ModuleGraph(decoder)
    latents = [latent(4, 4, seed) for seed in range(4)]
    out = []
    for i, z in enumerate(latents):
        out.append(path(decoder, z))
        assert (path.why_not is None) == (i > 0) and len(graphs) == (i > 0)
    assert graphs[0].replays == 3
    assert all(torch.equal(got, decoder(z)) for got, z in zip(out, latents, strict=True))


@torch.no_grad()
def test_every_change_of_what_is_watched_is_a_new_state_and_none_comes_back():
    block = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    first, other = block[0], nn.Linear(2, 2)
    watches = Watched([block], contents), Watched([block], place)

    def states():
        return [watch.state() for watch in watches]

    seen = [states()]
    assert states() == seen[0]
    first.weight.add_(1)
    seen.append(states())
    assert seen[1][0] != seen[0][0] and seen[1][1] == seen[0][1], "what is written matters to one of them"
    for change in (
        lambda: setattr(first.weight, "data", first.weight.data.clone()), lambda: block.__setitem__(0, other),
        lambda: block.__setitem__(0, first), lambda: block[1].register_buffer("late", torch.ones(1)),
        lambda: block[1].late.resize_(1 << 16), lambda: delattr(block[1], "late"), lambda: block.append(nn.Identity()),
        lambda: block[2].register_module("deep", other), lambda: setattr(other, "bias", None),
    ):  # fmt: skip
        change()
        seen.append(states())
        assert all(now not in before for now, before in zip(seen[-1], zip(*seen[:-1], strict=True), strict=True)), len(seen)
        assert states() == seen[-1]
    assert [name for name, _ in watches[0].modules] == ["", "0", "1", "2", "2.deep"]


@torch.no_grad()
def test_another_kind_is_captured_anew(graphs):
    """Another shape, autocast, a switch of PyTorch, weights that lie elsewhere; values that change in place are seen."""
    decoder = made()
    path, z = ModuleGraph(decoder), latent(4, 4, 0)

    def draws(z=z):
        before = len(graphs)
        for _ in range(3):
            assert torch.equal(path(decoder, z), decoder(z))
        return len(graphs) - before

    assert draws() == 1 and draws() == 0
    decoder.conv_in.weight.mul_(1.5)
    assert draws() == 0
    decoder.conv_in.weight = nn.Parameter(decoder.conv_in.weight * 0.5)
    assert draws() == 1
    assert draws(latent(4, 6, 0)) == 1
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    try:
        assert draws() == 1
    finally:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


@torch.no_grad()
def test_what_is_more_than_launches_is_never_captured(graphs, held):
    decoder, z, seen = made(), latent(4, 4, 0), []
    path = ModuleGraph(decoder)
    for _ in range(2):
        path(decoder, z)
    hook = decoder.up[0].block[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        path(decoder, z)
    assert len(seen) == 3 and "up.0.block.0.conv1: another tool's hook" in path.why_not and graphs[0].replays == 1
    hook.remove()
    held.append(module_graph.MOST_BYTES + 1)
    for _ in range(3):
        assert torch.equal(path(decoder, z), decoder(z))
    assert len(graphs) == 2 and "GiB, want at most" in path.why_not
    held.append(0)
    with torch.enable_grad():
        z.requires_grad_()
        for _ in range(3):
            assert path(decoder, z).requires_grad
    assert len(graphs) == 2 and path.why_not == "a gradient is asked for"


@torch.no_grad()
def test_parts_that_are_new_are_looked_at(graphs):
    decoder, z, seen = made(), latent(4, 4, 0), []
    path = ModuleGraph(decoder)

    def draws():
        before = len(graphs)
        for _ in range(3):
            assert torch.equal(path(decoder, z), decoder(z))
        return len(graphs) - before

    assert draws() == 1
    decoder.up[0].block[1] = made().up[0].block[1]
    assert draws() == 1 and draws() == 0
    decoder.up[0].block[1].conv2.register_forward_hook(lambda *_: seen.append(1))
    assert draws() == 0 and len(seen) == 6 and "up.0.block.1.conv2: another tool's hook" in path.why_not
    decoder.up[0].block[1] = made().up[0].block[1]
    assert draws() == 1 and path.why_not is None
    decoder.more = nn.Linear(2, 2)
    assert draws() == 1
    decoder.more.forward = lambda x: x
    assert draws() == 0 and "more: its forward was set by another tool" in path.why_not
    del decoder.more
    assert draws() == 1
    decoder.norm_out.register_buffer("extra", torch.zeros(2))
    assert draws() == 1 and path.why_not is None


@torch.no_grad()
def test_launches_that_cannot_be_captured_stay_eager(monkeypatch):
    monkeypatch.setattr(module_graph, "captured", lambda run, device, pool: "it waits for the GPU")
    decoder, z = made(), latent(4, 4, 0)
    path = ModuleGraph(decoder)
    assert all(torch.equal(path(decoder, z), decoder(z)) for _ in range(3)) and path.why_not == "it waits for the GPU"


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_replays_are_the_eager_path_bit_for_bit():
    with torch.device("cuda"):
        decoder = made().cuda()
    torch.backends.cudnn.benchmark = False
    latents = [latent(16, 16, seed).cuda() for seed in range(4)]
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            with attach_decoder(decoder, graphs=False):
                want = [decoder(z) for z in latents]
            with attach_decoder(decoder) as path:
                got = [decoder(z) for z in latents]
                assert path.graph.why_not is None and path.reason is None
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Waiting(nn.Linear):
    """A product whose module waits for the GPU, as a quantised one may."""

    def forward(self, x):
        return super().forward(x) * (1.0 if float(x.abs().max()) >= 0 else 0.0)


@pytest.mark.gpu
def test_gpu_blocks_that_cannot_be_captured_run_without_graphs():
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        driven = block_lookalikes.Infinity()
        driven.model.rng = torch.Generator("cuda")
        old = driven.blocks[1].sa.proj
        driven.blocks[1].sa.proj = Waiting(old.in_features, old.out_features)
        with on(driven, graphs=False):
            want = [checks.draw(driven) for _ in range(3)]
        with on(driven) as path, pytest.warns(UserWarning, match="runs without graphs: its launches cannot be captured"):
            got = [checks.draw(driven)]
            assert path.fused.why_not_graphs is None
            got += [checks.draw(driven), checks.draw(driven)]
            assert "cannot be captured" in path.fused.why_not_graphs and path.why_not_fused is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(checks.same(a, b) for a, b in zip(got, want, strict=True))
    torch.randn(3, device="cuda")  # the device's generator is not left as if it were captured
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        driven.blocks[1].sa.proj = old
        with on(driven) as path:
            got = [checks.draw(driven) for _ in range(3)]
            assert path.fused.why_not_graphs is None, "the next capture is a good one"
    torch.cuda.empty_cache()
