"""A model of one's own: opened from a file, every promise of its adapter tried, tuned, and its profile found again by name."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch
from live_images import TokenClock
from places import ROOT

import sparvar_tune
from sparvar_kernels import SparseAttention
from sparvar_tune.adapters import WholeImages, own_model, weights_sha256
from sparvar_tune.adapters.opening import open_own
from sparvar_tune.adapters.protocol import why_not_adapter
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.cli import parser
from sparvar_tune.profile import store
from sparvar_tune.ways import search_here
from sparvar_tune.ways.check_adapter import check_adapter

EXAMPLE = ROOT / "examples" / "own_model.py"
NAME = f"{EXAMPLE}:open_model"


@pytest.fixture
def mine():
    torch.set_num_threads(1)
    yield open_own(NAME, "cpu")
    sys.modules.pop("own_model", None)


def test_the_example_keeps_every_promise(home, capsys):
    assert parser.main(["check-adapter", NAME]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("ok  ") == 18 and "all 18 checks hold" in out


class Sabotaged:
    """The example with one method or attribute of another kind."""

    def __init__(self, inner: WholeImages, **own) -> None:
        self.inner, self.own = inner, own
        self.kept: list = []

    def __getattr__(self, name):
        own = self.__dict__["own"].get(name)
        return getattr(self.inner, name) if own is None else own if not callable(own) else lambda *a, **k: own(self, *a, **k)


def attending(change):
    """Draws with an attention that `change(attend, q, k, v, layer, scale)` puts before the real one."""

    def finish(self, state, attend, redraw_from=None):
        def other(q, k, v, layer, s):
            return change(attend, q, k, v, layer, s)

        other.skip_scales = attend.skip_scales
        return self.inner.finish(state, other)

    return finish


def keeps_the_state(self, state, attend, redraw_from=None):
    """The second picture from one state is another one."""
    self.kept.append(state)
    return self.inner.finish(state, attend) * (0.5 if any(s is state for s in self.kept[:-1]) else 1.0)


def forgets_to_skip(self, state, attend, redraw_from=None):
    def whole(q, k, v, layer, s):
        return attend(q, k, v, layer, s)

    whole.skip_scales = ()
    return self.inner.finish(state, whole)


def swallows(self, state, attend, redraw_from=None):
    try:
        return self.inner.finish(state, attend)
    except Exception:
        return self.inner.finish(state, self.inner.dense)


def remembers(self, state, attend, redraw_from=None):
    """A sparse image is followed by darker ones."""
    self.kept += [True] * isinstance(attend, SparseAttention) * (attend is not self.inner.dense)
    return self.inner.finish(state, attend) * (0.9 if self.kept and attend is self.inner.dense else 1.0)


def newest_first(attend, q, k, v, layer, s):
    n = q.shape[2]
    return attend(q, torch.cat((k[:, :, -n:], k[:, :, :-n]), 2), torch.cat((v[:, :, -n:], v[:, :, :-n]), 2), layer, s)


SABOTAGE = {
    "the same pair, the same picture": {"finish": lambda self, *a: self.inner.finish(*a) * torch.rand(())},
    "another seed, another picture": {"start": lambda self, pair, until: self.inner.start((pair[0], 0), until)},
    "another class, another picture": {"start": lambda self, pair, until: self.inner.start((0, pair[1]), until)},
    "a state is finished many times": {"finish": keeps_the_state},
    "from every scale the same picture": {"start": lambda self, pair, until: self.inner.start((pair[0], pair[1] + until), until)},
    "attention is called in order": {"finish": attending(lambda attend, q, k, v, layer, s: (
        attend(q, k, v, layer, s), attend(q, k, v, layer, s))[1])},
    "q, k and v fit the schedule": {"finish": attending(newest_first)},
    "dense is attention to every key": {"softmax_scale": 2.0, "model": "scale 2"},
    "no logit is above logit_bound": {"logit_bound": 0.5, "model": "bound 0.5"},
    "dense is the model's own picture": {"untouched": lambda self, pair: torch.rand(1, 3, 16, 16)},
    "what attention answers is drawn": {"finish": lambda self, state, attend, _=None: (
        self.inner.finish(state, attend), self.inner.finish(state, self.inner.dense))[1]},
    "NaN is not hidden": {"finish": attending(lambda attend, q, k, v, layer, s: (
        lambda out: out if out.isfinite().all() else self_dense(q, k, v))(attend(q, k, v, layer, s)))},
    "scales are left out": {"finish": forgets_to_skip},
    "nothing is left behind": {"finish": remembers}, "nothing is left after an error": {"finish": swallows},
}  # fmt: skip


def self_dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_broken_promise_is_seen(mine, name):
    own = dict(SABOTAGE[name])
    if "model" in own:
        field, value = {"scale 2": ("softmax_scale", 2.0), "bound 0.5": ("logit_bound", 0.5)}[own["model"]]
        own["model"] = dataclasses.replace(mine.model, **{field: value})
    checks = check_adapter(Sabotaged(mine, **own))
    reason = next(check.reason for check in checks if check.name == name)
    assert reason and "\n" not in reason


@pytest.mark.parametrize(("own", "said"), [
    ({"model": 3}, "model is a int"), ({"num_classes": 9}, "as many names"), ({"weights_sha256": "ab"}, "64 hex"),
    ({"temperature": "hot"}, "temperature"), ({"device": "tpu"}, "'cpu' or 'cuda'"), ({"dense": 3}, "dense: want a callable"),
    ({"softmax_scale": 2.0}, "differ from its model row"), ({"dense_name": 3}, "dense_name"),
])  # fmt: skip
def test_wrong_attributes_are_one_line(mine, own, said):
    reason = why_not_adapter(Sabotaged(mine, **own))
    assert said in reason and "\n" not in reason


def test_a_row_may_not_take_another_models_name(mine):
    wrong = dataclasses.replace(mine.model, slug="infinity-8b")
    assert "another model" in why_not_adapter(Sabotaged(mine, model=wrong))
    for slug in ("../up", "a--b", "", "A", "x" * 65, "pocketvar", "a/b"):
        with pytest.raises(ValueError, match="model name"):
            own_model(slug, mine.schedule, layers=1, heads=1, head_dim=8, softmax_scale=1.0)
    for field in ({"layers": 0}, {"heads": True}, {"dtype": "fp64x"}, {"head_dim": 1.5}):
        with pytest.raises(ValueError, match=next(iter(field))):
            own_model("x", mine.schedule, **{"layers": 1, "heads": 1, "head_dim": 8, "softmax_scale": 1.0, **field})


FILES = {
    "import nowhere_at_all": "ModuleNotFoundError: No module named 'nowhere_at_all' (theirs.py:1)",
    "def open_model(device):\n    raise KeyError('w')": "KeyError: 'w' (theirs.py:2)",
    "def other(device): ...": "has no function open_model",
    "def open_model(device):\n    return 3": "got a int without model",
    "def open_model(": "SyntaxError",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_opens_nothing_is_one_line(home, tmp_path, capsys, text):
    (tmp_path / "theirs.py").write_text(text + "\n")
    assert parser.main(["--gpu", "cpu", "--model", f"{tmp_path / 'theirs.py'}:open_model", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert FILES[text] in err and err.count("\n") == 1
    sys.modules.pop("theirs", None)


def test_a_file_that_is_not_there(home, capsys):
    assert parser.main(["check-adapter", "nowhere.py:open_model"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_an_installed_packages_model_is_opened_by_its_name(home, monkeypatch, mine):
    from sparvar_tune.adapters import opening

    class Point:
        def load(self):
            return lambda device: mine

    monkeypatch.setattr(opening, "entry_points", lambda group, name: [Point()] if name == "theirs" else [])
    assert open_own("theirs", "cpu") is mine
    assert sparvar_tune.ways.subject.Subject.of("theirs", "cpu").adapter is mine
    with pytest.raises(ValueError, match="nearest"):
        sparvar_tune.ways.subject.Subject.of("pocketva", "cpu")


def test_it_is_tuned_and_found_again_by_name(home, mine, capsys, monkeypatch):
    """Left out is the last scale: by a clock that tokens turn that is surely faster."""
    clock, said = TokenClock(), []
    draw = type(mine).draw

    def counted(self, label, seed, attend):
        clock.now += 1e-3 * self.schedule.starts[len(self.schedule) - len(attend.skip_scales)]
        return draw(self, label, seed, attend)

    monkeypatch.setattr(type(mine), "draw", counted)
    monkeypatch.setattr(search_here, "tune", functools.partial(search_here.tune, clock=clock))
    profile = sparvar_tune.tune(mine, bounds={"psnr": 15}, budget="1s", pairs=20, progress=said.append)
    w = profile.workload
    assert (w.model, w.resolution, w.layers, w.weights_sha256) == ("mine", "16x16", 2, mine.weights_sha256)
    assert profile.policy_state == "measured" and "tuning mine on cpu" in said[0]
    found = store.load(home / "profiles" / "cpu" / "mine--custom.json")
    assert found == profile and store.name_of(found) == "mine--custom.json"
    assert "mine" not in MODELS
    tuned = sparvar_tune.load_profile("mine", path=home / "profiles" / "cpu" / "mine--custom.json")
    picture = mine.finish(mine.start((3, 7), 4), tuned.sparse_attention())
    assert picture.shape == (1, 3, 16, 16)
    (home / "profiles" / "cpu" / "mine--custom.json").rename(home / "profiles" / "cpu" / "mine--paper.json")
    store.save(dataclasses.replace(profile, preset="near-lossless"), home / "profiles" / "cpu" / "mine.json")
    (home / "profiles" / "cpu" / "mine--paper.json").unlink()
    assert sparvar_tune.load_profile("mine").profile is not None
    assert parser.main(["explain", "--gpu", "cpu", "--model", "mine"]) == 0
    assert "exact silicon" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown"):
        sparvar_tune.load_profile("min")


def test_the_hash_of_weights_sees_every_value(mine):
    net = mine.net
    before, w = weights_sha256(net), net.qkv[1].weight
    assert len(before) == 64 and before == weights_sha256({name: t.clone() for name, t in net.state_dict().items()})
    with torch.no_grad():
        old = w[3, 5].item()
        w[3, 5] += 1e-3
        assert weights_sha256(net) != before
        w[3, 5] = old
        assert weights_sha256(net) == before
    with pytest.raises(ValueError, match="without tensors"):
        weights_sha256({})
