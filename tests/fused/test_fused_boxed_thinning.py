"""Steps that leave out tokens, where the models in the box run all blocks as one: their own sampling with the same steps, which
has oracles by hand, is the oracle."""

from __future__ import annotations

import pytest
import torch
from boxed_checks import BOUND, NAMES, Driven, error, logits_of, poison
from fused_checks import compiled

from sparvar_kernels import Cs4a, Pooled, Rule, Tile
from sparvar_tune import adapters, fused
from sparvar_tune.generation import CacheBudget, DropUnconditional, Precision, PruneTokens, SkipScales

LAST = 6  # of both tiny models: 48, 108 and 192 tokens at emojivar's last three grids, 64, 144 and 256 at pocketvar's
PRUNE = PruneTokens(5, (40, 70), 3, 0, 1)  # what parts gave stays over a scale that does not read it
ONE_LAYER = PruneTokens(4, (20, 40, 60), 3, 1, 1)
BUDGET = CacheBudget(4, ((16, 99), (30, 44), (60, 90)), window=4)  # at first one layer keeps all
CASES = {
    "pruned": (PRUNE,), "one layer": (ONE_LAYER,), "not at the last scale": (PruneTokens(4, (20, 40), 3, 0, 1),),
    "pruned, skipped": (PRUNE, SkipScales((LAST,))), "budget": (BUDGET,), "budget, skipped": (BUDGET, SkipScales((LAST,))),
    "half dropped before what is kept": (DropUnconditional(2), PRUNE), "half dropped behind it": (DropUnconditional(4), PRUNE),
    "half dropped late": (DropUnconditional(6), ONE_LAYER), "half dropped, budget": (DropUnconditional(5), BUDGET),
}  # fmt: skip
HALVES = [case for case in CASES if "half" in case]
BOTH = [(name, case) for name in NAMES for case in CASES if name == "emojivar" or case not in HALVES]  # pocketvar has no guidance

ON_GPU = [("pocketvar", "pruned"), ("pocketvar", "budget"), ("emojivar", "one layer"), ("emojivar", "half dropped behind it"),
          ("emojivar", "half dropped, budget")]  # fmt: skip


@pytest.fixture(params=NAMES)
def driven(request) -> Driven:
    return Driven(request.param)


def path_of(driven: Driven, attend, **options) -> fused.boxed.FusedSampling:
    return fused.boxed.sampling(adapters.recognise(driven.model)[1], attend, graphs=options.pop("graphs", True))


def attention(driven: Driven, *steps, sparse: bool = False):
    """sparse: rules up to the first scale that may have none, with a decision two scales before it."""
    end = next(step.from_scale for step in steps if step.thins)
    rules = [Rule(end - 1, "A", Cs4a(end - 3, 0.3, Tile(4, 4))), Rule(end - 1, "B", Pooled(1, 2))] if sparse else []
    return driven.attention(*steps, rules=rules)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("name", "case"), BOTH)
def test_a_thinned_picture_equals_the_models_own(name, case, sparse):
    driven = Driven(name)
    attend = attention(driven, *CASES[case], sparse=sparse)
    own, path = driven.begin(attend=attend, pictures=2), path_of(driven, attend)
    want = logits_of(own)
    for _ in range(2):
        ours = driven.begin(attend=path, pictures=2)
        assert error(logits_of(ours), want) < BOUND and path.reason is None
        assert ours.filled == own.filled and ours.given.keys() == own.given.keys()
        assert float((ours.pictures() - own.pictures()).square().flatten(1).mean(1).max()) <= 1e-6  # 60 dB
        poison(path)
    assert min(own.filled) < driven.model.schedule.starts[own.scale]  # the step does something


@pytest.mark.parametrize("step", [PRUNE, BUDGET], ids=lambda step: step.kind)
def test_thinned_states_go_on_in_any_order(driven, step):
    """Two pictures in turns, parked and forked at every scale through the same buffers: each is what it is alone."""
    path = path_of(driven, attention(driven, step))
    want = [driven.begin(seed, path).run().fhat for seed in (1, 2)]
    assert not torch.equal(*want)
    runs = [driven.begin(seed, path) for seed in (1, 2)]
    for s in range(LAST + 1):
        runs = [run if s % 2 else run.fork() for run in runs]
        for run in runs:
            run.step()
    assert all(torch.equal(run.fhat, fhat) for run, fhat in zip(runs, want, strict=True))
    for s in range(3, LAST + 1):
        parked = driven.begin(1, path).run(s).parked()
        assert parked.cache.shape[-2] == max(parked.filled) and bool(parked.given) == (step is PRUNE and s > 3)
        driven.begin(2, path).run(LAST)
        poison(path)
        assert torch.equal(parked.fork().run().fhat, want[0])
    assert path.reason is None


@pytest.mark.parametrize("step", [PRUNE, BUDGET], ids=lambda step: step.kind)
def test_thinned_states_change_the_path(driven, step):
    """The model's own way, this path, one that had no picture yet."""
    attend = attention(driven, step)
    path, want = path_of(driven, attend), driven.begin(attend=attend).run()
    for s in (4, 6):
        other = path_of(driven, attend)
        for first, then in ((path, attend), (attend, path), (attend, other), (path, other)):
            run = driven.begin(attend=first).run(s).fork(then).run()
            assert torch.allclose(run.fhat, want.fhat, atol=1e-4) and run.filled == want.filled
        assert path.reason is other.reason is None


def test_a_step_that_is_known_too_late_is_refused(driven):
    """As in the model's own sampling, and without harm to the picture; what another step was given is nothing to it."""
    attend = attention(driven, PRUNE)
    path, begun = path_of(driven, attend), driven.begin(attend=driven.model.attend).run(5)
    driven.begin(2, path).run()
    other = driven.begin(attend=path_of(driven, attention(driven, PruneTokens(5, (40,), 2, 0, 1)))).run(5)
    one = driven.begin(attend=path_of(driven, attention(driven, ONE_LAYER.__class__(5, (40,), 3, 1, 1)))).run(5)
    for state, ways in ((begun, (path, attend)), (other, (path, attend)), (one, (path, attend))):
        for way in ways:
            late = state.fork(way)
            with pytest.raises(ValueError, match="prune_tokens: scale 3 was drawn before the step was known; begin before it"):
                late.step()
            late.fork(driven.model.attend).run()
    last = path_of(driven, attention(driven, PruneTokens(6, (40,), 3, 0, 1)))
    late = driven.begin().run(6).fork(last)
    with pytest.raises(ValueError, match="begin before it"):
        late.step()
    assert torch.allclose(late.fork(driven.model.attend).run().fhat, driven.begin().run().fhat, atol=1e-4)


@pytest.mark.parametrize("own", [False, True], ids=["as one", "own"])
@pytest.mark.parametrize(
    ("step", "scale", "lost"), [(PRUNE, 3, False), (PRUNE, 5, False), (PRUNE, 6, True), (BUDGET, 2, False), (BUDGET, 3, True)]
)
def test_an_exception_in_a_thinned_picture(driven, step, scale, lost, own, monkeypatch):
    """At the scale whose parts are kept, at a pruned one, at the last, whose keys lie over others where all blocks run as one,
    before the first cut and at it: what is drawn again is the same, and what was cut already is refused."""
    attend = attention(driven, step)
    way = attend if own else path_of(driven, attend)
    lost, want = lost and not (own and scale == LAST), driven.begin(attend=way).run()
    kind, name = (type(driven.model), "mlp_part") if own else (fused.boxed.OnePass, "attend")
    inner = getattr(kind, name)

    def fails(self, block, *args):
        if block is driven.model.blocks[1] or block == 1:
            raise ZeroDivisionError
        return inner(self, block, *args)

    run = driven.begin(attend=way).run(scale)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, fails)
        with pytest.raises(ZeroDivisionError):
            run.step()
    if lost:
        for other in (None, attend, driven.model.attend):
            with pytest.raises(ValueError, match="begin it anew"):
                run.fork(other).step()
    else:
        driven.begin(2, way).run()
        assert torch.equal(run.run().fhat, want.fhat) and run.filled == want.filled
    assert torch.equal(driven.begin(attend=way).run().fhat, want.fhat)


def test_half_precision_rounds_no_more_than_the_model(driven):
    """Up to the first scale that is thinned: a bit that is drawn otherwise makes the later ones another picture. What parts gave
    stays fp32 where a picture is parked, and its own way goes on with it."""
    exact = logits_of(driven.begin(attend=attention(driven, ONE_LAYER)))[:1]
    driven.model.to(torch.bfloat16)
    attend = attention(driven, ONE_LAYER)
    path, own = path_of(driven, attend), logits_of(driven.begin(attend=attend))[:1]
    whole, parked = driven.begin(attend=path), driven.begin(attend=path).run(4).parked()
    ours = logits_of(whole)[:1]
    assert error(ours, exact) < 2 * error(own, exact) + 1e-3 and path.reason is None
    assert parked.cache.dtype == torch.bfloat16 and {out.dtype for out in parked.given.values()} == {torch.float32}
    assert torch.equal(parked.fork().run().fhat, whole.fhat)
    assert parked.fork(attend).run().fhat.isfinite().all()


@pytest.mark.parametrize("fmt", ["e4m3", "int8"])
def test_with_products_of_8_bits(driven, fmt):
    """At the first scale that has them, which is pruned, maybe without a half. A number that is rounded otherwise is far
    less of an error than none."""
    half = [DropUnconditional(5)] if driven.name == "emojivar" else []
    attend = attention(driven, PRUNE, Precision(5, ((0, 1),), fmt), *half)
    path, want = path_of(driven, attend), logits_of(driven.begin(attend=attend))
    ours, plain = (logits_of(driven.begin(attend=way)) for way in (path, attention(driven, PRUNE, *half)))
    assert path.reason is None and error(ours[:5], want[:5]) < BOUND
    assert error(ours[5:6], want[5:6]) < error(plain[5:6], want[5:6]) / 5


def test_paths_share_one_cache(driven):
    """Many ways are held at once where ways are compared: a thinned one lies in the cache of a dense one."""
    dense, thinned = path_of(driven, driven.attention(rules=[])), [path_of(driven, attention(driven, s)) for s in (PRUNE, BUDGET)]
    want = [driven.begin(attend=path).run().fhat for path in (dense, *thinned)]
    caches = [path.work.cached for path in (dense, *thinned)]
    assert len({cache.data_ptr() for cache in caches}) == 1 and len({cache.shape for cache in caches}) == 3
    assert all(torch.equal(driven.begin(attend=p).run().fhat, fhat) for p, fhat in zip((dense, *thinned), want, strict=True))


def test_what_its_blocks_cannot_thin_is_refused_in_one_line(driven, monkeypatch):
    monkeypatch.setattr(fused.boxed_blocks.BoxedBlocks, "thins", ("prune_tokens",))
    with pytest.raises(ValueError, match="cannot run as one: cache_budget works inside the model's own"):
        path_of(driven, attention(driven, BUDGET))


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("name", "case"), ON_GPU)
def test_gpu_graphs_draw_what_launches_draw(name, case, sparse, monkeypatch):
    """Whole pictures, and states parked at every scale from what is kept or cut on; no binary comes late."""
    ahead, late = compiled(monkeypatch)
    driven = Driven(name, "cuda")
    attend = attention(driven, *CASES[case], sparse=sparse)
    eager, path = path_of(driven, attend, graphs=False), path_of(driven, attend)
    want = [driven.begin(seed, eager).run() for seed in (1, 2)]
    for _ in range(4):
        got = [driven.begin(seed, path).run() for seed in (1, 2)]
        assert all(torch.equal(a.fhat, b.fhat) and a.filled == b.filled for a, b in zip(got, want, strict=True))
    scales = LAST + 1 - len(attend.skip_scales)
    assert path.why_not_graphs is path.reason is None and len(path.work.graphs) == scales + (name == "emojivar")
    if not sparse:  # the decision of one picture would be lost by the other
        for s in range(3, scales):
            parked = [driven.begin(seed, way).run(s).parked() for way in (path, eager) for seed in (1, 2)]
            poison(path)
            assert all(torch.equal(p.fork(path).run().fhat, want[i % 2].fhat) for i, p in enumerate(parked))
    assert ahead and not late, late
