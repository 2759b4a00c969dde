"""Steps that leave out tokens on the fused path: the attention path, which has oracles of its own, is the oracle here."""

from __future__ import annotations

import adapter_checks as checks
import block_lookalikes
import pytest
import torch
import var_hart_lookalikes
from fused_checks import BOUND, compiled, errors, on

from sparvar_kernels import Policy, Reuse, Rule
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.catalog.models import find_model
from sparvar_tune.fused.thinning import ThinnedPasses, why_not_thinned
from sparvar_tune.generation import CacheBudget, DropUnconditional, PruneTokens, SkipScales

PRUNE = PruneTokens(4, (20, 30), 3, 1, 2)  # grids 6x6 and 8x8, what was given at 4x4, two of three layers
EVERY = PruneTokens(2, (5, 9, 20, 30), 1, 0, 2)
BUDGET = CacheBudget(3, ((99, 6, 8), (20, 11, 16), (40, 12, 24)), window=4)  # at first one layer keeps all
INFINITY, HART = block_lookalikes.Infinity, var_hart_lookalikes.Hart
CASES = {
    "pruned": (INFINITY, (PRUNE,), {"batch": 2}), "every layer": (INFINITY, (EVERY,), {}),
    "dropped before what is kept": (INFINITY, (DropUnconditional(2), PRUNE), {"batch": 2}),
    "dropped behind it": (INFINITY, (DropUnconditional(5), PRUNE), {"batch": 2}),
    "last scale skipped": (INFINITY, (SkipScales((5,)), PRUNE), {}),
    "no guidance": (INFINITY, (PRUNE,), {"cfg": 1.0}),
    "budget": (INFINITY, (BUDGET,), {"batch": 2}), "budget, dropped": (INFINITY, (DropUnconditional(4), BUDGET), {"batch": 2}),
    "budget, skipped": (INFINITY, (SkipScales((5,)), DropUnconditional(3), BUDGET), {}),
    "hart": (HART, (PruneTokens(3, (20, 30), 2, 1, 2),), {"batch": 2}),
    "hart, every layer": (HART, (PruneTokens(2, (9, 20, 30), 1, 0, 2),), {"batch": 2}),
    "hart, dropped and skipped": (HART, (SkipScales((4,)), DropUnconditional(2), PruneTokens(3, (20,), 2, 0, 1)), {"batch": 2}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def attend_of(driven, *steps, rules=()):
    return checks.attention_of(driven, Policy(("AB",) * len(driven.blocks), rules, steps))[0]


def by_attention(driven, attend, **given):
    with checks.no_warnings(), adapters.apply(driven.model, attend):
        return checks.draw(driven, **given)


def poison(path) -> None:
    """NaN in every buffer that an image has to write before it reads."""
    work = path.fused.work
    for t in (work.x, work.cached, *work.thinning.given.values()):
        t.fill_(float("nan"))


def assert_alike(driven, attend, **given) -> None:
    """Two images in a row, the second from poisoned buffers, are the attention path's, scale by scale; then nothing is left."""
    before, plain = checks.everything(driven), checks.draw(driven, **given)
    want = by_attention(driven, attend, **given)
    with on(driven, attend, graphs=False) as path:
        for _ in range(2):
            ours = checks.draw(driven, **given)
            assert path.why_not_fused is None and path.reason is None
            assert len(ours.logits) == len(want.logits) and max(errors(ours, want)) < BOUND["fp32"]
            poison(path)
    changed = [float((a - b[: a.shape[0]]).norm() / a.norm()) for a, b in zip(want.logits, plain.logits, strict=False)]
    assert max(changed) > 1e-3  # the step does something
    assert checks.same(checks.draw(driven, **given), plain) and checks.everything(driven) == before


@pytest.mark.parametrize("case", CASES)
def test_a_thinned_image_equals_the_attention_path(case):
    kind, steps, given = CASES[case]
    driven = kind()
    assert_alike(driven, attend_of(driven, *steps), **given)


def test_with_sparse_attention_before():
    driven = INFINITY()
    for step in (PRUNE, CacheBudget(4, ((20, 11, 16), (40, 12, 24)), window=4)):
        assert_alike(driven, attend_of(driven, step, rules=(Rule(3, "A", Reuse(2)),)), batch=2)


@pytest.mark.parametrize(("kind", "family"), [(INFINITY, "infinity"), (HART, "hart")])
def test_the_published_form_of_pruning(kind, family):
    driven = kind(layers=4)
    schedule = adapters.recognise(driven.model)[1].schedule or ScaleSchedule(tuple(driven.grids()))
    assert_alike(driven, attend_of(driven, PruneTokens.published(family, schedule, 4)), batch=2)


@pytest.mark.parametrize(("kind", "step"), [(INFINITY, PRUNE), (INFINITY, BUDGET), (HART, PruneTokens(2, (9, 20, 30), 1, 0, 2))])
def test_half_precision_rounds_no_more_than_the_attention_path(kind, step):
    """Also at the first scale that is thinned; a token that is drawn otherwise there makes the later ones another picture."""
    exact = by_attention(kind(), attend_of(kind(), step))
    driven = kind("bf16")
    attend = attend_of(driven, step)
    own = by_attention(driven, attend)
    with on(driven, attend):
        ours = checks.draw(driven)
    first = step.from_scale + (kind is HART)  # its text has logits, too
    assert max(errors(ours, own)[: first + 1]) < BOUND["bf16"] and errors(ours, exact)[0] < 1.5 * errors(own, exact)[0] + 1e-3


def test_an_image_that_cannot_run_as_one_is_thinned_in_the_models_own_blocks():
    driven = HART()
    attend = attend_of(driven, PruneTokens(3, (20,), 2, 0, 1))
    want, rounds = by_attention(driven, attend), by_attention(driven, attend, rounds=2)
    with on(driven, attend) as path:
        with pytest.warns(UserWarning, match="last grid is drawn in 2 rounds"):
            assert checks.same(checks.draw(driven, rounds=2), rounds)
        ours = checks.draw(driven)
        path.fused.enabled = False
        assert checks.same(checks.draw(driven), want)
        with path.paused():
            plain = checks.draw(driven)
    assert max(errors(ours, want)) < BOUND["fp32"] < max(errors(want, plain)) and checks.same(plain, checks.draw(driven))


def test_another_aspect_is_left_alone():
    driven = INFINITY()
    plain = checks.draw(driven, aspect=1.5)
    with on(driven, attend_of(driven, BUDGET)), pytest.warns(UserWarning, match="own blocks run for this image"):
        assert checks.same(checks.draw(driven, aspect=1.5), plain)


def test_what_a_stack_cannot_thin_is_refused_in_one_line(monkeypatch):
    driven = INFINITY()
    before = checks.everything(driven)
    monkeypatch.setattr("sparvar_tune.fused.infinity.InfinityStack.thins", ("prune_tokens",))
    with pytest.raises(ValueError, match="cannot run as one: cache_budget works inside the model's own") as caught:
        on(driven, attend_of(driven, BUDGET))
    assert "\n" not in str(caught.value) and checks.everything(driven) == before
    assert why_not_thinned(Policy(("A",), (), (DropUnconditional(1),)), ()) is None


CPU = torch.device("cpu")


def no_buffer(*_):
    raise AssertionError("lengths need no memory")


def lives(thinning: ThinnedPasses) -> None:
    """In every pass a layer finds its own tokens, whatever the layers before it appended."""
    layout = thinning.layout()
    places, prefix = [None] * max(end for _, end in layout), thinning.schedule.prefix
    for layer, (begin, _) in enumerate(layout):
        places[begin : begin + prefix] = [layer] * prefix
    for s in range(len(thinning.schedule)):
        for layer, (begin, end) in enumerate(layout):
            at, held = begin + thinning.filled[layer][s], begin + thinning.held(layer, s)
            assert held <= end
            places[at:held] = [layer] * (held - at)
            assert set(places[begin:held]) == {layer}, (s, layer)


def test_layers_of_other_lengths_lie_one_behind_the_other():
    small, prefixed = ScaleSchedule.square((1, 2, 3, 4, 6, 8)), ScaleSchedule.square((2, 3, 4, 6, 8), 5)
    for schedule, step in ((small, PRUNE), (small, EVERY), (small, BUDGET), (prefixed, PruneTokens(2, (9, 20, 30), 1, 1, 1))):
        lives(ThinnedPasses(Policy(("A",) * 3, (), (step,)), schedule, 3, 2, CPU, no_buffer))
    model = find_model("infinity-2b")
    schedule, sizes = model.schedule("1M", "1.000"), []
    for steps in ((), (PruneTokens.published("infinity", schedule, 32),), (CacheBudget.published("infinity-2b"),)):
        thinning = ThinnedPasses(Policy(("A",) * 32, (), steps), schedule, 32, 2, CPU, no_buffer)
        lives(thinning)
        sizes.append(max(end for _, end in thinning.layout()))
    dense = 32 * schedule.starts[-2] + schedule.num_queries(12)
    pruned = dense - 25 * (1024 - 615 + 1600 - 800)
    assert sizes == [dense, pruned, 30 * (420 + 2304) + 4100 + 2304 + 6385 + 4096]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["pruned", "dropped before what is kept", "dropped behind it", "budget", "budget, dropped",
                                  "hart", "hart, every layer"])  # fmt: skip
def test_gpu_graphs_are_the_eager_path_bit_for_bit(case, monkeypatch):
    """Captured in the second image and replayed, another batch between; no binary comes late."""
    ahead, late = compiled(monkeypatch)
    kind, steps, _ = CASES[case]
    found, kinds = [], [{}, {}, {}, {"batch": 2}, {"batch": 2}, {"batch": 2}]
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        driven = kind()
        driven.model.rng = torch.Generator("cuda")
        attend = attend_of(driven, *steps)
        for graphs in (False, True):
            with on(driven, attend, graphs=graphs) as path:
                for given in kinds:
                    found.append(checks.draw(driven, **given))
                    work = path.fused.work
                    assert path.why_not_fused is None and bool(work.graphs) == (graphs and work.images > 1), path.why_not_graphs
    half = len(found) // 2
    assert all(checks.same(a, b) for a, b in zip(found[:half], found[half:], strict=True))
    assert ahead and not late, late
