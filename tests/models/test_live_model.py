"""Tuning a live model that somebody else built, from a function that draws with it: the adapter, its refusals, the whole way."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import adapter_checks as checks
import lookalikes
import numpy as np
import pytest
import torch
from live_images import TokenClock, generate_of
from PIL import Image

import sparvar_tune
from sparvar_tune import adapters
from sparvar_tune.adapters.whole_images import as_picture
from sparvar_tune.catalog import models
from sparvar_tune.live import LiveModel
from sparvar_tune.measure.capture import Recorder
from sparvar_tune.policy_search.certify import TimedByScale
from sparvar_tune.policy_search.judge import make_attention
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile import store
from sparvar_tune.ways import search_here
from sparvar_tune.ways.check_adapter import check_adapter

KINDS = {
    "infinity": lookalikes.Infinity, "infinity-bf16": functools.partial(lookalikes.Infinity, "bf16"), "hart": lookalikes.Hart,
    "var-flash-bf16": functools.partial(lookalikes.Var, "bf16", flash=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def infinity():
    return lookalikes.Infinity()


@pytest.mark.slow
def test_a_live_model_keeps_every_promise(infinity):
    found = {check.name: check for check in check_adapter(LiveModel(infinity.model, generate_of(infinity), [0, 1]))}
    assert len(found) == 18 and not {name: check.reason for name, check in found.items() if check.reason}
    assert found["dense is the model's own picture"].note == "bit for bit"


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_apply_and_nothing_is_left(kind):
    driven = KINDS[kind]()
    generate = generate_of(driven)
    adapter = LiveModel(driven.model, generate, [0, 1])
    attributes = [dict(vars(module)) for module in driven.model.modules()]
    assert torch.equal(adapter.finish(adapter.start((1, 5), 3), adapter.dense), as_picture(generate(1, 5)))
    scales = len(adapter.schedule)
    policy = checks.policies(4, scales)["reuse"]
    attend = make_attention(adapter, policy)
    for way in (attend, TimedByScale(attend, lambda work: (work(), 1.0)[1])):
        attend.reset()
        ours = adapter.finish(adapter.start((1, 5), scales - 3), way)
        with adapters.apply(driven.model, make_attention(adapter, policy)):
            assert torch.equal(ours, as_picture(generate(1, 5)))
    assert way.spent_ms.keys() == set(range(scales - 3, scales)), "the decision scale ranks keys, the others live on them"
    assert all(dict(vars(m)) == before for m, before in zip(driven.model.modules(), attributes, strict=True))


def test_a_capture_keeps_one_cache_a_layer(infinity):
    """The public code makes its cache anew at every scale: what is kept of it is the last one."""
    adapter = LiveModel(infinity.model, generate_of(infinity), [0])
    calls = sparvar_tune.capture(adapter, (0, 3), scales=(3, 4, 5))
    schedule = adapter.schedule
    assert calls.keys() == {(layer, s) for layer in range(4) for s in (3, 4, 5)}
    for (layer, s), (q, k, v) in calls.items():
        assert q.shape == (2, 2, schedule.num_queries(s), 16) and k.shape == v.shape == (2, 2, schedule.num_keys(s), 16)
        assert k.data_ptr() == calls[layer, 5][1].data_ptr() and v.data_ptr() == calls[layer, 5][2].data_ptr()
    other = Recorder(adapter.dense, (0,))
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    other.inner, other.scales = (lambda q, k, v, layer, s: q), (0, 1)
    other(q, k, k, 0, 0)
    other(q, torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8), 0, 1)
    assert other.calls[0, 0][1] is k, "keys that changed later are kept as they were"


def test_the_tables_row_is_taken_where_everything_fits(infinity, monkeypatch):
    row = dataclasses.replace(
        models.MODELS["infinity-2b"], slug="tiny-infinity", layers=4, heads=2, head_dim=16, width=32, dtype="fp32",
        resolutions={"small": {"1.500": models.ScaleSchedule(lookalikes.ASPECTS[1.5]), "1.000": models.ScaleSchedule(
            lookalikes.ASPECTS[1.0])}}, default_resolution="small", default_aspect="1.500",
    )  # fmt: skip
    monkeypatch.setitem(models.MODELS, "tiny-infinity", row)
    adapter = LiveModel(infinity.model, generate_of(infinity), [0])
    assert adapter.model is row and adapter.logit_bound == 100
    subject = sparvar_tune.ways.subject.Subject.of(adapter)
    assert (subject.resolution, subject.aspect, subject.gpu.slug) == ("small", "1.000", "cpu")
    assert subject.file_name() == "tiny-infinity--small--1.000.json"
    assert LiveModel(infinity.model, generate_of(infinity), [0], name="mine").model.slug == "mine"
    monkeypatch.setitem(models.MODELS, "tiny-infinity", dataclasses.replace(row, dtype="bf16"))
    assert LiveModel(infinity.model, generate_of(infinity), [0]).model.slug == "infinity-4x2x16-fp32-2"


class Calls:
    """A `generate` that goes wrong in a way of its own; `kind` says which."""

    def __init__(self, driven, kind: str) -> None:
        self.real, self.kind, self.count = generate_of(driven), kind, 0
        self.other = generate_of(lookalikes.Infinity())
        self.aspect = driven

    def __call__(self, prompt, seed):
        self.count += 1
        if self.kind == "another model":
            return self.other(prompt, seed)
        if self.kind == "unseeded":
            return self.real(prompt, self.count)
        if self.kind == "kept pictures":
            self.kept = getattr(self, "kept", None) if self.count > 1 else self.real(prompt, seed)
            return self.kept
        if self.kind == "two images":
            self.real(prompt, seed)
            return self.real(prompt, seed)
        if self.kind == "raises":
            raise KeyError("no such prompt")
        return {"nothing": None, "a word": "x", "minus": self.real(prompt, seed) * 2 - 1, "grey": self.real(prompt, seed)[:, :1],
                "ints": self.real(prompt, seed).long()}[self.kind]  # fmt: skip


@pytest.mark.parametrize(("kind", "said"), [
    ("another model", "without this model"), ("unseeded", "seed every generator"), ("kept pictures", "0 images"),
    ("two images", "2 images"), ("raises", r"KeyError: 'no such prompt' \(test_live_model.py:"), ("nothing", "got a NoneType"),
    ("a word", "got a str"), ("minus", "want 0..1"), ("grey", "one RGB picture"), ("ints", "floats in 0..1 or uint8"),
])  # fmt: skip
def test_a_generate_that_cannot_be_tuned_with_is_one_line(infinity, kind, said):
    before = generate_of(infinity)(0, 1)
    with pytest.raises(ValueError, match=said) as refused:
        LiveModel(infinity.model, Calls(infinity, kind), [0, 1])
    assert "\n" not in str(refused.value)
    assert torch.equal(generate_of(infinity)(0, 1), before)


@pytest.mark.parametrize(("given", "said"), [
    ({"prompts": []}, "at least one"), ({"prompts": "a cat"}, "list"), ({"generate": 3}, "want a function"),
    ({"model": torch.nn.Linear(2, 2)}, "no adapter knows it"),
    ({"name": "a/b"}, "model name"), ({"name": "hart"}, "of the table"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(home, infinity, given, said):
    words = {"model": infinity.model, "generate": generate_of(infinity), "prompts": [0], **given}
    with pytest.raises(ValueError, match=said):
        sparvar_tune.tune(words.pop("model"), **words)
    with pytest.raises(ValueError, match="generate="):
        sparvar_tune.tune(infinity.model)


def test_an_image_of_another_size_is_no_certificate(infinity):
    """The hooks would run the model's own attention there, and every policy would look perfect."""
    generate = generate_of(infinity)

    def other():
        text = torch.randn(4, lookalikes.WIDTH), [4], torch.tensor([0, 4], dtype=torch.int32), 4
        schedule = [(1, h, w) for h, w in lookalikes.ASPECTS[1.5]]
        picture = infinity.model.autoregressive_infer_cfg(
            scale_schedule=schedule, label_B_or_BLT=text, B=1, g_seed=1, cfg_list=[3.0] * 6
        )
        return picture.add(1).mul(0.5).clamp(0, 1)

    adapter = LiveModel(infinity.model, lambda prompt, seed: generate(prompt, seed) if prompt == 0 else other(), [0, 1])
    attend = make_attention(adapter, paper_policy(adapter.schedule, 4, 2))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="the profile is for"):
        warnings.simplefilter("ignore")
        adapter.finish(adapter.start((1, 5), 3), attend)


PIXELS = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("found", [
    Image.fromarray(PIXELS.numpy()), Image.fromarray(PIXELS.numpy()).convert("RGBA"), PIXELS.numpy(), PIXELS.numpy()[None],
    PIXELS, PIXELS[None], PIXELS.permute(2, 0, 1), PIXELS.permute(2, 0, 1)[None], PIXELS.permute(2, 0, 1).double() / 255,
    (PIXELS.permute(2, 0, 1).float() / 255)[None],
], ids=range(10))  # fmt: skip
def test_a_picture_of_any_kind_is_the_same_picture(found):
    picture = as_picture(found)
    assert picture.dtype == torch.float32 and picture.shape == (1, 3, 5, 7)
    assert torch.equal((picture[0] * 255).round().byte(), PIXELS.permute(2, 0, 1))


@pytest.mark.parametrize("found", [
    np.zeros((5, 7, 3)), np.zeros((5, 7), np.uint8), torch.zeros(2, 3, 5, 7), torch.full((3, 5, 7), float("nan")),
    torch.zeros(3, 5, 7, dtype=torch.int32), torch.zeros(3, 0, 7), [1, 2],
], ids=range(7))  # fmt: skip
def test_what_is_no_picture_is_refused(found):
    with pytest.raises(ValueError, match="picture: got") as refused:
        as_picture(found)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_whole_way_from_python(home, infinity, monkeypatch):
    """Options, search, certificate, profile, apply; the last scale left out is what is surely faster by tokens."""
    clock = TokenClock()
    clock.watch(infinity.model.head)
    monkeypatch.setattr(search_here, "tune", functools.partial(search_here.tune, clock=clock))
    generate, said = generate_of(infinity), []
    profile = sparvar_tune.tune(
        infinity.model, generate=generate, prompts=[0, 1, 2, 3], bounds={"psnr": 5}, budget="1s", pairs=8, progress=said.append
    )
    w = profile.workload
    assert (w.model, w.batch, w.grids) == ("infinity-4x2x16-fp32-2", 2, lookalikes.ASPECTS[1.0])
    assert profile.policy.skip_scales == (5,) and profile.policy_state == "measured" and profile.evidence.n == 8
    assert profile.generation.speedup.low > 1.9, "130 tokens without the last scale's 64"
    path = home / "profiles" / "cpu" / "infinity-4x2x16-fp32-2--custom.json"
    assert store.load(path) == profile
    tuned = sparvar_tune.load_profile("infinity-4x2x16-fp32-2", path=path)
    dense = generate(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its weights are those of the certificate
        with sparvar_tune.apply(infinity.model, tuned):
            picture = generate(2, 9)
    with adapters.skip_scales(infinity.model, 5):
        assert torch.equal(picture, generate(2, 9)) and not torch.equal(picture, dense)
    assert torch.equal(generate(2, 9), dense)
    with torch.no_grad():
        infinity.model.head.weight[0, 0] += 1
    with pytest.warns(UserWarning, match="other weights"), sparvar_tune.apply(infinity.model, tuned):
        pass
