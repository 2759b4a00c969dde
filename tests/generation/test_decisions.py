"""Pictures that share an attention whose decision scales leave something: none draws by what another one left."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import boxed_checks
import pytest
import torch

from sparvar_kernels import Rule, SparseAttention, Tile
from sparvar_kernels.variants import Cs4a
from sparvar_tune import adapters, fused
from sparvar_tune.bitwise.decisions import decided_by
from sparvar_tune.policy_search.certify import TimedByScale


@pytest.fixture(params=boxed_checks.NAMES)
def driven(request):
    return boxed_checks.Driven(request.param)


@contextlib.contextmanager
def on(driven, attend, path="attention"):
    found = fused.put_on(*adapters.recognise(driven.model), attend, path)
    try:
        yield
    finally:
        found.undo()


def chosen(driven):
    return driven.attention(rules=[Rule(driven.last, "A", Cs4a(driven.last - 2, 0.3, Tile(4, 4)))])


def test_a_picture_whose_decision_was_run_over_is_refused(driven):
    attend, last = chosen(driven), driven.last
    with on(driven, attend):
        alone = [driven.begin(seed).run().fhat for seed in (1, 2)]
        first, second = driven.begin(1).run(last - 1), driven.begin(2).run(last - 1)
        with pytest.raises(ValueError, match="another picture's was run after it"):
            first.run()
        assert torch.equal(second.run().fhat, alone[1])
        early = driven.begin(1).run(last - 2)  # not decided yet: nothing of it is lost
        driven.begin(2).run(last - 3)
        assert torch.equal(early.run().fhat, alone[0])


def test_forks_live_on_the_decision_of_their_picture(driven):
    attend, last = chosen(driven), driven.last
    with on(driven, attend):
        want = driven.begin(1).run().fhat
        parked = driven.begin(1).run(last - 1).parked()
        assert torch.equal(parked.fork().run().fhat, want) and torch.equal(parked.fork().run().fhat, want)


def test_threads_take_turns_and_one_at_most_is_refused(driven):
    attend, seen = chosen(driven), {}
    with on(driven, attend):
        want = {seed: driven.begin(seed).run().fhat for seed in (1, 2)}

        def draw(seed):
            try:
                seen[seed] = driven.begin(seed).run().fhat
            except ValueError as error:
                seen[seed] = str(error)

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in want]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, got in seen.items():
        refused = isinstance(got, str) and got.startswith("scale ")
        assert refused or torch.equal(got, want[seed])


def test_what_decides_is_found_within_what_wraps_it(driven):
    attend = chosen(driven)
    assert decided_by(TimedByScale(attend, None)) is decided_by(attend) is not None
    assert decided_by(driven.attention()) is None or decided_by(driven.attention()).deciding
    assert decided_by(driven.model.attend) is None and decided_by(driven.attention(rules=[])) is None


@pytest.mark.parametrize("path", ["attention", "fused"])
def test_a_model_with_an_attention_on_it_is_not_copied(driven, path):
    attend = chosen(driven)
    with on(driven, attend, path):
        with pytest.raises(ValueError, match="undo it before copying the model"):
            copy.deepcopy(driven.model)
        with pytest.raises(ValueError, match="undo it before saving the model"):
            pickle.dumps(driven.model)
    copy.deepcopy(driven.model)
    assert not isinstance(driven.model.attend, SparseAttention)
