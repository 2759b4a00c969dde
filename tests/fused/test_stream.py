"""Products that add themselves to the stream, on a look-alike: the untouched model is the oracle."""

from __future__ import annotations

import collections

import adapter_checks as checks
import block_lookalikes
import pytest
import torch
from fused_checks import BOUND, errors, fold_all, on

from sparvar_kernels.policy import Policy
from sparvar_tune import adapters
from sparvar_tune.fused import stream
from sparvar_tune.fused.product import Product
from sparvar_tune.generation import Precision
from sparvar_tune.tracing import Tracer, traced
from sparvar_tune.tracing.ranges import HostClock


@pytest.fixture
def added(monkeypatch) -> list:
    """Every product is as if the library had been looked at; the passes whose products added themselves, by their shape."""
    passes = []

    class Seen(stream.AddedStream):
        def __init__(self, x, offsets) -> None:
            passes.append(tuple(x.shape[:2]))
            super().__init__(x, offsets)

    fold_all(monkeypatch)
    monkeypatch.setattr(stream, "AddedStream", Seen)
    monkeypatch.setattr(stream, "LEAST_TOKENS", 0)
    for name in ("is_worth_it", "is_found"):
        monkeypatch.setattr(stream, name, lambda form: form.adds)
    return passes


def biased(driven):
    """With biases that nobody can leave out; of two blocks the text has no factor of its own, as in the published models."""
    g = torch.Generator().manual_seed(5)
    for i, block in enumerate(driven.blocks):
        for module in (block.sa.proj, block.ca.proj, block.ffn.fc2):
            module.bias.add_(torch.randn(module.bias.shape, generator=g).to(module.bias))
        if i:
            del block.ca_gamma
            block.ca_gamma = 1
    return driven


def poison(path) -> None:
    for t in (path.fused.work.x, path.fused.work.cached, path.fused.stack.modulation, path.fused.stack.adding.offsets):
        t.fill_(float("nan"))


@pytest.mark.parametrize("given", [{}, {"batch": 2}, {"batch": 2, "aspect": 1.5}, {"cfg": 1.0}], ids=str)
def test_they_equal_the_untouched_model(given, added):
    driven = biased(block_lookalikes.Infinity())
    plain = checks.draw(driven, **given)
    with on(driven) as path:
        checks.draw(driven, **given)
        poison(path)
        added.clear()
        ours = checks.draw(driven, **given)
    assert len(added) == len(driven.grids(**{k: v for k, v in given.items() if k == "aspect"}))
    assert max(errors(ours, plain)) < BOUND["fp32"]
    assert checks.same(checks.draw(driven, **given), plain)


def test_weights_that_do_not_lie_one_behind_the_other(added):
    driven = biased(block_lookalikes.Infinity())
    for module in (driven.blocks[0].ffn.fc2, driven.blocks[1].sa.proj):
        module.weight.data = module.weight.data.t().contiguous().t()
    plain = checks.draw(driven)
    with on(driven):
        ours = checks.draw(driven)
    assert added and max(errors(ours, plain)) < BOUND["fp32"]


def test_they_round_no_more_than_the_model(added):
    exact, driven = checks.draw(biased(block_lookalikes.Infinity())), biased(block_lookalikes.Infinity("bf16"))
    own = checks.draw(driven)
    with on(driven):
        ours = checks.draw(driven)
    assert added and errors(ours, exact)[0] < 1.5 * errors(own, exact)[0] + 1e-3 and errors(ours, own)[0] < BOUND["bf16"]


def test_a_dropped_half_has_its_own_offsets(added):
    driven = biased(block_lookalikes.Infinity())
    scales = len(driven.grids())
    want = checks.draw(driven, batch=2, cfg=[3.0] * (scales - 2) + [1.0, 1.0])
    with on(driven), adapters.drop_unconditional(driven.model, scales - 2):
        ours = checks.draw(driven, batch=2)
    assert {rows for rows, _ in added[:scales]} == {4, 2} and max(errors(ours, want)) < BOUND["fp32"]


@pytest.mark.parametrize("where", ["sa.proj", "ffn.fc2", "ca.proj"])
def test_not_where_a_module_is_no_plain_linear(where, added):
    driven = biased(block_lookalikes.Infinity())
    owner, _, name = where.rpartition(".")
    driven.blocks[1].get_submodule(owner).get_submodule(name).register_forward_hook(lambda module, args, out: out + 1)
    plain = checks.draw(driven)
    with on(driven):
        ours = checks.draw(driven)
    assert not added and max(errors(ours, plain)) < BOUND["fp32"]


def test_not_where_a_product_has_8_bits(added):
    driven = biased(block_lookalikes.Infinity())
    scales = len(driven.grids())
    step = Precision(scales - 2, ((1, 1),), "e4m3")
    attend, schedule = checks.attention_of(driven, Policy(("AB",) * len(driven.blocks), steps=(step,)))
    with on(driven, attend) as path:
        checks.draw(driven)
        assert path.why_not_fused is None
    assert [length for _, length in added] == [schedule.num_queries(s) for s in range(scales - 2)]


def test_they_pay_from_twice_as_many_tokens_as_channels_on():
    assert stream.pays(4096, 2048) and not stream.pays(4095, 2048) and not stream.pays(4096, 3584)


def test_not_where_weights_times_their_gates_cost_what_is_saved(added, monkeypatch):
    driven = biased(block_lookalikes.Infinity())
    tokens = [h * w for h, w in driven.grids()]
    monkeypatch.setattr(stream, "LEAST_TOKENS", tokens[-2] / driven.blocks[0].ffn.fc2.out_features)
    with on(driven):
        checks.draw(driven)
    assert [length for _, length in added] == tokens[-2:]


def test_they_are_named_in_a_trace(added):
    driven = biased(block_lookalikes.Infinity())
    with on(driven):
        plain = checks.draw(driven)
        with traced(Tracer("m", HostClock())) as tracer:
            assert checks.same(checks.draw(driven), plain)
    seen = collections.Counter((s.label.step, s.label.scale, s.label.layer) for s in tracer.spans())
    layers = len(driven.blocks)
    for s in range(len(driven.grids())):  # the MLP's first; three that add themselves, two weights times their gates
        assert seen["products", s, None] == 6 * layers and seen["norm", s, None] == 3 * layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_in_fp16(added, dtype):
    """A weight times a small gate is subnormal there."""
    product = Product(torch.nn.Linear(8, 8).requires_grad_(False), dtype)
    made = stream.Adding(torch.zeros(3, 8), 2, [product])
    assert made.is_worth_it(2, 100) == (dtype != torch.float16)
