"""The models in the box with all blocks as one: their own way is the oracle, at random weights and tiny sizes; undone, nothing is
left. Pictures of the shipped weights, and graphs, at the end."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import tiny
import tiny_emojivar
import torch
from boxed_checks import BOUND, NAMES, Driven, error, logits_of, poison
from gathered_checks import needs_triton
from torch import nn

import sparvar_tune
from sparvar_kernels import Cs4a, Rule, Tile
from sparvar_tune import adapters, fused
from sparvar_tune.adapters import load_adapter
from sparvar_tune.catalog.models import find_model
from sparvar_tune.emojivar.model import draw_noise
from sparvar_tune.generation import CacheBudget, DropUnconditional, PruneTokens, SkipScales
from sparvar_tune.measure.fidelity import compare_pictures
from sparvar_tune.measure.timing import Stopwatch
from sparvar_tune.policy_search.certify import TimedByScale
from sparvar_tune.policy_search.judge import first_touched


@pytest.fixture(params=NAMES)
def driven(request) -> Driven:
    return Driven(request.param)


@pytest.mark.parametrize("given", [{}, {"pictures": 2}, {"guidance": 0.0}], ids=str)
def test_dense_equals_the_models_own_way(driven, given):
    plain, before = logits_of(driven.begin(**given)), driven.everything()
    with driven.on() as path:
        driven.begin(2, **given).run()
        poison(path.fused)
        run = driven.begin(**given)
        assert 0 < error(logits_of(run), plain) < BOUND
        assert run.cache.shape[-2] == 0 and path.fused.work.cached.isfinite().all()  # it was drawn there
        assert path.why_not_fused is None and path.why_not_graphs == "the model is on no GPU"
    assert driven.everything() == before
    assert error(logits_of(driven.begin(**given)), plain) == 0


@pytest.mark.parametrize("steps", ["rules", "skip", "half", "half early", "both"])
def test_sparse_equals_the_attention_path(driven, steps):
    """Also a half dropped before and behind the decision that its rules live on."""
    last, half = driven.last, DropUnconditional
    made = {"rules": [], "skip": [SkipScales((last,))], "half": [half(last)], "half early": [half(last - 2)]}
    made["both"] = [SkipScales((last,)), half(last - 1)]
    if driven.name == "pocketvar" and steps not in ("rules", "skip"):
        pytest.skip("it has no guidance")
    rules = [Rule(last - 1, "A", Cs4a(last - 2, 0.3, Tile(4, 4)))] if steps == "both" else None
    attend = driven.attention(*made[steps], rules=rules)
    want = logits_of(driven.begin(attend=attend))
    plain = logits_of(driven.begin())
    assert len(want) < len(plain) or error(want, plain) > 1e-4  # the policy does something
    with driven.on(attend) as path:
        for _ in range(2):
            driven.begin(2).run()
        poison(path.fused)
        assert error(logits_of(driven.begin()), want) < BOUND and path.why_not_fused is None


def test_states_go_on_in_any_order(driven):
    """Two pictures in turns, parked and forked, through the same buffers: each is what it is alone."""
    attend, scales = driven.attention(rules=[]), driven.last + 1
    with driven.on(attend):
        want = [driven.begin(seed).run().fhat for seed in (1, 2)]
        runs = [driven.begin(seed) for seed in (1, 2)]
        for s in range(scales):
            runs = [run if s % 2 else run.fork() for run in runs]
            for run in runs:
                run.step()
        assert all(torch.equal(run.fhat, fhat) for run, fhat in zip(runs, want, strict=True))
        assert not torch.equal(*want)
        parked = driven.begin(1).run(3).parked()
        assert parked.cache.shape[-2] == driven.model.schedule.starts[3]
        for _ in range(2):
            driven.begin(2).run(2)
            assert torch.equal(parked.fork().run().fhat, want[0])
    own = parked.fork(driven.model.attend)
    own.run()  # what was begun as one goes on by the model's own blocks
    assert own.cache.shape[-2] > 0 and torch.allclose(own.fhat, want[0], atol=1e-4)
    begun = driven.begin(1).run(3)
    path = fused.boxed.sampling(adapters.recognise(driven.model)[1])
    assert torch.allclose(begun.fork(path).run().fhat, want[0], atol=1e-4) and path.reason is None


def test_a_decision_of_another_picture_is_refused(driven):
    last = driven.last
    attend = driven.attention(rules=[Rule(last, "A", Cs4a(last - 2, 0.3, Tile(4, 4)))])
    with driven.on(attend):
        first, second = (driven.begin(seed).run(last) for seed in (1, 2))
        with pytest.raises(ValueError, match="another picture's was run after it"):
            first.step()
        second.step()
        assert torch.equal(second.fhat, driven.begin(2).run().fhat)


def test_a_cut_state_goes_its_own_way_where_caches_are_whole(driven):
    last, c = driven.last, driven.model.config
    cut = CacheBudget(last - 1, ((20,) * c.depth, (30,) * c.depth), window=4)
    state = driven.begin(attend=driven.attention(cut, rules=[])).run(last - 1)
    want, path = state.fork(driven.model.attend).run(), fused.boxed.sampling(adapters.recognise(driven.model)[1])
    with pytest.warns(UserWarning, match="own blocks run for this image: earlier scales of it left other keys"):
        ours = state.fork(path).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        state.fork(path).run()
    assert path.reason and torch.equal(ours.fhat, want.fhat) and not torch.equal(ours.fhat, driven.begin().run().fhat)


def test_paused_training_and_autocast_are_the_models_own_way(driven):
    attend = driven.attention()
    plain, sparse = (driven.begin(attend=a).run().fhat for a in (None, attend))
    with driven.on(attend) as path:
        with path.paused():
            assert torch.equal(driven.begin().run().fhat, plain) and path.why_not_fused is None
        driven.model.train()
        with pytest.warns(UserWarning, match="in training mode"):
            assert torch.equal(driven.begin().run().fhat, sparse)
        driven.model.eval()
        driven.begin().run()
        assert path.why_not_fused is None
    with driven.on() as path, torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        driven.begin().run()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        with driven.on() as path, pytest.warns(UserWarning, match="hook is on all modules"):
            driven.begin().run()
    finally:
        hook.remove()


def test_an_exception_leaves_nothing_behind(driven, monkeypatch):
    want = driven.begin().run().fhat
    with driven.on() as path:
        run = driven.begin().run(driven.last - 1)
        own, calls = fused.boxed.OnePass.attend, []

        def fails(self, layer, q):
            calls.append(layer)
            if layer == 1:
                raise ZeroDivisionError
            return own(self, layer, q)

        monkeypatch.setattr(fused.boxed.OnePass, "attend", fails)
        with pytest.raises(ZeroDivisionError):
            run.step()
        monkeypatch.setattr(fused.boxed.OnePass, "attend", own)
        run.step()  # what is lost of a scale is drawn again
        monkeypatch.setattr(fused.boxed.OnePass, "attend", fails)
        with pytest.raises(ZeroDivisionError):
            run.step()
        monkeypatch.setattr(fused.boxed.OnePass, "attend", own)
        for again in (run.step, run.fork(driven.model.attend).step, run.fork(path.fused.own).step):
            with pytest.raises(ValueError, match="an error broke off its last scale; begin it anew"):
                again()
        assert torch.allclose(driven.begin().run().fhat, want, atol=1e-4)


def test_weights_that_change_are_seen(driven):
    block = driven.model.blocks[1]
    plain = logits_of(driven.begin())
    with driven.on():
        driven.begin().run()
        block.fc2.weight.mul_(1.5)
        block.qkv.bias.add_(0.1)
        driven.model.head.weight = nn.Parameter(driven.model.head.weight * 1.5, requires_grad=False)
        if driven.name == "pocketvar":
            block.modulation.add_(0.2)
        changed = logits_of(driven.begin())
    want = logits_of(driven.begin())
    assert error(changed[:1], want[:1]) < BOUND < error(want[:1], plain[:1])


def test_a_product_that_is_no_linear_is_called(driven):
    from fused_checks import Adds

    block = driven.model.blocks[1]
    plain = logits_of(driven.begin())
    block.fc1 = Adds(block.fc1).requires_grad_(False)
    want = logits_of(driven.begin())
    with driven.on():
        assert error(logits_of(driven.begin())[:1], want[:1]) < BOUND < error(want[:1], plain[:1])
    block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 1: another tool's hook"), driven.on():
        pass


def test_a_class_that_does_it_another_way_is_refused(driven):
    class Mine(type(driven.model)):
        def mlp_part(self, *args):
            return 2 * super().mlp_part(*args)

    driven.model.__class__ = Mine
    with pytest.raises(ValueError, match="Mine has a mlp_part of its own"), driven.on():
        pass


def test_half_precision_rounds_no_more_than_the_model(driven):
    exact = logits_of(driven.begin())[:1]
    driven.model.to(torch.bfloat16)
    own = logits_of(driven.begin())[:1]
    with driven.on() as path:
        ours = logits_of(driven.begin())[:1]
        assert path.fused.work.cached.dtype == torch.bfloat16 and path.why_not_fused is None
    assert error(ours, exact) < 2 * error(own, exact) + 1e-3


def test_apply_and_undo(driven, monkeypatch):
    """`auto` is the attention alone on a CPU; "fused" is on, with and without a profile; undone in any order, nothing is left."""
    tuned = sparvar_tune.load_profile(driven.name, gpu="cpu", folders=[])
    before = driven.begin().run().fhat
    with sparvar_tune.apply(driven.model, tuned) as applied:
        assert applied.why_not_fused == "nothing is applied"
    own = driven.model.attend
    applied = sparvar_tune.apply(driven.model, tuned, path="fused")
    other = adapters.apply(driven.model, driven.attention())
    applied.undo()
    assert driven.model.attend is other.attend
    other.undo()
    assert driven.model.attend is own and torch.equal(driven.begin().run().fhat, before)
    with driven.on(driven.attention()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters.protocol.Parts, "on_gpu", True)
        family, parts = adapters.recognise(driven.model)
        auto = fused.put_on(family, parts, driven.attention(), "attention")
        assert auto.fused is None
        auto.undo()


def test_tuning_draws_on_it(driven, monkeypatch):
    """On a GPU; here an adapter is told to. What looks at each call gets the attention path, and the same picture."""
    (tiny if driven.name == "pocketvar" else tiny_emojivar).install(monkeypatch.setattr)
    monkeypatch.setattr(tiny, "DELAY_S", 0.0)
    adapter, last = load_adapter(find_model(driven.name), "cpu"), driven.last
    rules = [Rule(last, "A", Cs4a(last - 2, 0.3, Tile(4, 4)))]
    steps = [DropUnconditional(last - 1)] if driven.name == "emojivar" else []
    thin = [CacheBudget(last, ((60,) * driven.model.config.depth,), window=4), PruneTokens(last, (60,), last - 1, 0, 1)]
    ways = [adapter.dense, driven.attention(rules=rules), driven.attention(*steps, rules=rules)]
    ways += [driven.attention(step, rules=[]) for step in thin]
    state = adapter.start((3, 1), first_touched(adapter))
    want = [adapter.finish(state, way) for way in ways]
    assert not adapter.picture_path and not any(adapter.prepare(way) for way in ways)
    adapter.as_one = True
    for _ in range(2):
        state = adapter.start((3, 1), first_touched(adapter))
        for way, picture in zip(ways, want, strict=True):
            assert adapter.prepare(way) and adapter._paths[way].is_ready(state)
            assert torch.allclose(adapter.finish(state, way), picture, atol=1e-4)
            timed = TimedByScale(way, Stopwatch("cpu"))
            assert torch.allclose(adapter.finish(state, timed), picture, atol=1e-4)
            thinned = {last} if way in ways[3:] else set()  # there blocks attend on their own
            assert set(timed.spent_ms) == {last - 2, last - 1, last} - thinned and adapter._paths[way].reason is None
    assert len(adapter._paths) == len(ways)
    del ways, way, timed
    assert len(adapter._paths) == 1  # with a policy its graphs go


def shipped(name: str, device: str, pairs) -> list[float]:
    """PSNR of the fused path's pictures against the model's own way, the weights and temperature that are shipped."""
    adapter, found = load_adapter(find_model(name), device), []
    path = fused.boxed.sampling(adapters.recognise(adapter.live)[1])
    for pair in pairs:
        noise = draw_noise(adapter.schedule, adapter.live.config.bits, pair[1])
        own = adapter.begin([pair], noise).run().pictures()
        state = adapter.begin([pair], noise).fork(path)
        for _ in range(3 if device == "cuda" else 1):  # eager, captured, replayed
            ours = state.fork().run().pictures()
            found.append(compare_pictures(ours, own)["psnr"])
        assert path.reason is None
    if device == "cuda":
        assert path.why_not_graphs is None and path.work.graphs
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pair"), [("pocketvar", (7, 2)), ("emojivar", (3, 5))])
def test_shipped_pictures(name, pair):
    assert min(shipped(name, "cpu", [pair])) >= 45


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("early", [False, True])
def test_graphs_draw_what_launches_draw(name, early):
    """With a decision, and a half dropped behind or before what lives on it; whole pictures, and states finished in turns."""
    driven = Driven(name, "cuda")
    last, steps = driven.last, []
    if name == "emojivar":
        steps = [DropUnconditional(last - 1 if early else last)]
    rules = [Rule(s, "A", Cs4a(last - 2, 0.3, Tile(4, 4))) for s in (last - 1, last)]
    attend = driven.attention(*steps, rules=rules)
    with driven.on(attend, graphs=False) as path:
        want = [driven.begin(seed).run().fhat for seed in (1, 2)]
        assert "graphs are off" in path.why_not_graphs
    plain = driven.begin(1).run().fhat
    parked = [driven.begin(seed).run(2).parked() for seed in (1, 2)]
    with driven.on(attend) as path:
        for _ in range(4):
            got = [driven.begin(seed).run().fhat for seed in (1, 2)]
            assert all(map(torch.equal, got, want))
        assert path.why_not_graphs is None and path.why_not_fused is None
        assert len(path.fused.work.graphs) == last + 1 + (name == "emojivar")
        for _ in range(2):
            assert all(torch.equal(state.fork(path.fused).run().fhat, fhat) for state, fhat in zip(parked, want, strict=True))
    assert torch.equal(driven.begin(1).run().fhat, plain) and not torch.equal(plain, want[0])


@needs_triton
@pytest.mark.parametrize("fmt", ["e4m3", "int8"])
@pytest.mark.parametrize("exact_gelu", [True, False])
def test_products_of_8_bit_rows_are_foreseen(exact_gelu, fmt):
    """Where the library multiplies none of them, in fp32, and with GELU behind a product or in front of the next."""
    from sparvar_kernels.path.triton.scaled_product import scaled_product_build
    from sparvar_kernels.path.triton.scaled_rows import scaled_rows_build
    from sparvar_tune.fused.product import Product, scaled_builds

    made = {"proj": nn.Linear(32, 48, bias=False), "up": nn.Linear(32, 64), "down": nn.Linear(64, 32), "odd": nn.Linear(32, 7)}
    block = SimpleNamespace(**{name: Product(linear, torch.float32) for name, linear in made.items()}, width=32)
    got = scaled_builds([block, block], torch.float32, exact_gelu, fmt)
    products = [(32, 48, False, False), (32, 64, True, exact_gelu), (64, 32, True, False)]
    want = [
        *(scaled_product_build(torch.float32, *p, fmt) for p in products),
        *(scaled_rows_build(torch.float32, n, fmt=fmt) for n in (32, 64)),
    ]
    want += [] if exact_gelu else [scaled_rows_build(torch.float32, 64, "gelu", fmt)]
    assert set(got) == set(want) and len(got) == len(want)
    by_library = [
        b for b in scaled_builds([block], torch.bfloat16, exact_gelu, fmt) if b.kernel.endswith("scaled_product_kernel")
    ]
    assert [dict(b.constants)["GELU"] for b in by_library] == ([1] * exact_gelu if fmt == "e4m3" else [0, int(exact_gelu), 0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_shipped_pictures_on_a_gpu(name):
    """With fp32 weights and products, as the model is loaded; a GPU's TF32 is off by default."""
    assert not torch.backends.cuda.matmul.allow_tf32
    found = shipped(name, "cuda", [(0, 1), (3, 5), (7, 2)])
    print(f"{name}: PSNR {min(found):.1f}..{max(found):.1f} dB")
    assert min(found) >= 45


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_shipped_pictures_in_half_precision(name):
    """Rounding turns over bits whose logit lies at the noise, and later scales go on from there. So the pictures of bf16 weights
    are others on any path: ours are as near the fp32 ones as the model's own are, not near its own."""
    exact, half = (load_adapter(find_model(name), "cuda") for _ in range(2))
    half.live.to(torch.bfloat16)
    path, found = fused.boxed.sampling(adapters.recognise(half.live)[1]), {"own": [], "ours": [], "ours to own": []}
    for pair in [(label, seed) for seed in (1, 2) for label in range(4)]:
        noise = draw_noise(exact.schedule, exact.live.config.bits, pair[1])
        ways = ((exact, exact.dense), (half, half.dense), (half, path))
        want, own, ours = (adapter.begin([pair], noise, way).run().pictures() for adapter, way in ways)
        for kind, a, b in (("own", own, want), ("ours", ours, want), ("ours to own", ours, own)):
            found[kind].append(compare_pictures(a, b)["psnr"])
    assert path.reason is None and path.why_not_graphs is None
    means = {kind: sum(x) / len(x) for kind, x in found.items()}
    print(f"{name} in bf16:", {kind: f"{min(x):.1f}..{max(x):.1f}, mean {means[kind]:.1f} dB" for kind, x in found.items()})
    assert means["ours"] > means["own"] - 4
