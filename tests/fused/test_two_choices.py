"""Bits drawn through TwoChoices are those that PyTorch's own functions draw, number for number."""

from __future__ import annotations

import copy
import io

import adapter_checks as checks
import block_lookalikes
import pytest
import torch

from sparvar_tune.fused import two_choices as room
from sparvar_tune.fused.two_choices import TwoChoices, two_choices

SHAPE = 2, 300, 64


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setattr(room, "DEVICES", (request.param,))
    monkeypatch.setattr(room, "LEAST", 0)
    return request.param


@pytest.fixture
def used(monkeypatch):
    """How often each function was done otherwise."""
    calls = {"sum": 0, "largest": 0}

    def counted(name, own):
        def run(*args, **kwargs):
            out = own(*args, **kwargs)
            calls[name] += out is not None
            return out

        return run

    names = {room._summed: "sum", room._largest: "largest"}
    for function, own in list(room._OTHERWISE.items()):
        monkeypatch.setitem(room._OTHERWISE, function, counted(names[own], own))
    return calls


def sampled(logits, top_p=0.97, seed=1):
    """Logits [B, L, 64] with guidance to bits, as a vocabulary's are sampled; all that comes of it on the way."""
    mixed = 3.0 * logits[:1] + (1 - 3.0) * logits[1:]
    bits = mixed.mul(1 / 0.9).reshape(1, -1, 2)
    least = bits.topk(2, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
    bits.masked_fill_(bits < least, -torch.inf)
    rising, places = bits.sort(dim=-1, descending=False)
    running = rising.softmax(dim=-1).cumsum_(dim=-1)
    outside = running <= 1 - top_p
    outside[..., -1:] = False
    bits.masked_fill_(outside.scatter(2, places, outside), -torch.inf)
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(bits.softmax(dim=-1).view(-1, 2), 1, replacement=True, generator=generator)
    return [t.as_subclass(torch.Tensor) for t in (least, places, running, outside, bits, drawn)]


def logits_of(kind):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3
    if kind == "ties":
        x = x.round().view(*SHAPE[:2], 32, 2)[..., :1].expand(*SHAPE[:2], 32, 2).reshape(SHAPE).clone()
    if kind == "far apart":
        x *= 1e4
    return x


@pytest.mark.parametrize("kind", ["random", "ties", "far apart"])
@pytest.mark.parametrize("top_p", [0.5, 0.97])
def test_every_number_on_the_way_is_the_same(device, used, kind, top_p):
    x = logits_of(kind).to(device)
    want, kept = sampled(x, top_p), x.clone()
    assert used == {"sum": 0, "largest": 0}
    got = sampled(two_choices(x), top_p)
    assert used == {"sum": 1, "largest": 1}
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(x, kept)


def test_what_is_drawn_is_a_plain_tensor(device):
    x = two_choices(logits_of("random").to(device))
    assert type(x) is TwoChoices and type(x.softmax(-1)) is TwoChoices and type(x < 0) is torch.Tensor
    values, places = x.sort(-1)
    assert type(values) is TwoChoices and type(places) is torch.Tensor
    assert type(torch.multinomial(x.softmax(-1)[0], 1)) is torch.Tensor and isinstance(x.shape, torch.Size)


@pytest.mark.parametrize("way", [
    lambda x: x.view(-1, 4).cumsum_(-1), lambda x: x.view(-1, 2).cumsum_(0), lambda x: x.view(-1, 2).cumsum(-1),
    lambda x: x.view(-1, 2).topk(1, sorted=False)[0], lambda x: x.view(-1, 2).topk(2)[0],
    lambda x: x.view(2, -1).topk(2, 0, sorted=False)[0].sum(0), lambda x: x.view(-1, 2).topk(1, largest=False, sorted=False)[0],
    lambda x: x.double().view(-1, 2).cumsum_(-1), lambda x: x.view(-1, 2).cumsum_(-1, dtype=torch.float32),
    lambda x: x.view(-1, 64).topk(5, sorted=False)[0].sum(-1),
])  # fmt: skip
def test_all_else_is_done_by_pytorch(device, used, way):
    x = torch.randint(-9, 9, SHAPE, generator=torch.Generator().manual_seed(0)).float().to(device)  # sums are exact
    assert torch.equal(way(two_choices(x.clone())).as_subclass(torch.Tensor), way(x)) and used == {"sum": 0, "largest": 0}


@pytest.mark.parametrize("axis", [-1, 2])
def test_both_ways_to_name_the_last_axis(device, used, axis):
    x = logits_of("random").to(device).view(2, -1, 2)
    got, want = two_choices(x.clone()).cumsum_(axis), x.clone().cumsum_(axis)
    assert torch.equal(got.as_subclass(torch.Tensor), want) and used["sum"] == 1
    values, places = two_choices(x).topk(2, axis, sorted=False)
    assert used["largest"] == 1 and torch.equal(values, x.gather(-1, places)) and values.data_ptr() != x.data_ptr()


def test_zeros_infinities_and_no_number(device, used):
    rows = torch.tensor([-0.0, 0.0, 1.0, float("inf"), -float("inf"), float("nan")], device=device)
    x = torch.stack([a.flatten() for a in torch.meshgrid(rows, rows, indexing="ij")], -1)
    got, want = two_choices(x.clone()).cumsum_(-1).as_subclass(torch.Tensor), x.clone().cumsum_(-1)
    assert torch.equal(got.isnan(), want.isnan()) and used["sum"] == 1
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)) and torch.equal(
        got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan()
    )


def test_with_places_to_write_to_it_is_pytorchs(device, used):
    x = logits_of("random").to(device).view(2, -1, 2)
    values, places = torch.empty_like(x), torch.empty_like(x, dtype=torch.long)
    torch.topk(two_choices(x), 2, sorted=False, out=(values, places))
    assert torch.equal(values, x.gather(-1, places)) and used["largest"] == 0
    assert torch.equal(two_choices(x).sum().cumsum_(0).as_subclass(torch.Tensor), x.sum()) and used["sum"] == 0


def test_every_way_to_call_and_to_use_what_comes_back(device, used):
    x = logits_of("random").to(device).view(2, -1, 2)
    for found in (torch.topk(input=two_choices(x), k=2, sorted=False), two_choices(x.transpose(0, 1)).topk(2, sorted=False)):
        assert found.indices.view(-1).add_(1).min() == 1 and found.values.is_contiguous()
    assert used["largest"] == 1  # by the keyword it is PyTorch's own
    with pytest.raises(RuntimeError, match="single memory location"):
        two_choices(torch.ones(3, 1, device=device)).expand(3, 2).cumsum_(-1)
    for wrong in (lambda t: t.topk(2, foo=1), lambda t: t.cumsum_(), lambda t: t.topk(), lambda t: t.sum().cumsum_(2)):
        said = []
        for t in (x.clone(), two_choices(x.clone())):
            with pytest.raises((TypeError, IndexError)) as caught:
                wrong(t)
            said.append(str(caught.value).splitlines()[0])
        assert said[0] == said[1]
    assert f"{two_choices(x).max():.3f}" == f"{x.max():.3f}"


def test_copied_and_saved_it_is_a_plain_tensor(device):
    x = logits_of("random").to(device)
    saved = io.BytesIO()
    torch.save(two_choices(x), saved)
    saved.seek(0)
    for found in (copy.deepcopy(two_choices(x)), torch.load(saved, weights_only=True)):
        assert type(found) is torch.Tensor and torch.equal(found, x) and found.data_ptr() != x.data_ptr()


def test_nothing_that_would_not_gain_is_taken(monkeypatch):
    x = torch.zeros(1 << 15)
    assert two_choices(x) is x  # on a CPU
    monkeypatch.setattr(room, "DEVICES", ("cpu",))
    assert type(two_choices(x)) is TwoChoices
    for other in (x[: room.LEAST - 1], x.double(), x.clone().requires_grad_(), torch.nn.Parameter(x, False)):
        assert two_choices(other) is other


def test_a_picture_on_the_path_draws_the_same_and_undo_takes_it_off(monkeypatch):
    from sparvar_tune import adapters
    from sparvar_tune.fused import put_on

    monkeypatch.setattr(room, "DEVICES", ("cpu",))
    driven, seen = block_lookalikes.Infinity(), []
    driven.model.use_bit_label = True
    before = checks.everything(driven)

    def drawn(least):
        monkeypatch.setattr(room, "LEAST", least)
        with put_on(*adapters.recognise(driven.model), None, "fused"):
            own = driven.model.get_logits
            vars(driven.model)["get_logits"] = watched = lambda *a: seen.append(type(out := own(*a))) or out
            try:
                return checks.draw(driven)
            finally:
                assert vars(driven.model)["get_logits"] is watched
                vars(driven.model)["get_logits"] = own

    want, plain = drawn(1 << 30), set(seen)
    seen.clear()
    got = drawn(0)
    assert plain == {torch.Tensor} and set(seen) == {TwoChoices}
    assert checks.same(got, want)
    del seen[:]
    checks.draw(driven)
    assert not seen and checks.everything(driven) == before
