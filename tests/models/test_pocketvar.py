"""The model in the box: sampling is a pure function, training and sampling compute the same thing, the weights load."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

import sparvar_tune
from lab.pocketvar.train import TeacherForcing
from sparvar_tune.bitwise.sampling import rotate, turns_of
from sparvar_tune.bitwise.tokenizer import Quantiser, grow, pool
from sparvar_tune.catalog.models import find_model
from sparvar_tune.live.pocketvar import PocketAdapter
from sparvar_tune.pocketvar.model import CLASSES, WEIGHTS, Generation, PocketConfig, draw_noise, load_pocketvar


def picture(model, label=3, seed=1, temperature=0.7, **options):
    noise = draw_noise(model.schedule, model.config.bits, seed)
    return Generation(model, [label], noise, temperature, **options).run().pictures()


def test_sampling_is_a_pure_function():
    model = make_model()
    first = picture(model)
    torch.rand(100)
    assert torch.equal(first, picture(model))
    assert not torch.equal(first, picture(model, seed=2)) and not torch.equal(first, picture(model, label=4))
    assert torch.equal(picture(model, temperature=0.0, seed=1), picture(model, temperature=0.0, seed=2))


def test_forking_changes_nothing():
    model = make_model()
    noise = draw_noise(model.schedule, model.config.bits, 1)
    parked = Generation(model, [3], noise, 0.7).run(4).parked()
    assert torch.equal(parked.fork().run().pictures(), picture(model))
    assert torch.equal(parked.fork().run().pictures(), picture(model))


def seen_keys(model, held):
    """An attention that holds the keys of the last layer and scale."""

    class Holding:
        skip_scales = ()

        def __call__(self, q, k, v, layer, scale_index):
            held[:] = [k]
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)

    return Holding()


def test_keys_that_somebody_holds_stay_as_they_are():
    model, held = make_model(), []
    picture(model, attend=seen_keys(model, held))
    keys = held.pop()
    before = keys.clone()
    other = picture(model, seed=2)
    assert torch.equal(keys, before) and torch.equal(picture(model, seed=2), other)


def test_pictures_at_one_time_share_no_keys():
    model = make_model()
    runs = [Generation(model, [3], draw_noise(model.schedule, 16, seed), 0.7) for seed in (1, 2, 3)]
    for _ in range(len(model.schedule)):
        for run in runs:
            run.step()
    assert len({run.cache.data_ptr() for run in runs}) == 3
    assert all(torch.equal(run.pictures(), picture(model, seed=seed)) for run, seed in zip(runs, (1, 2, 3), strict=True))


def test_a_batch_is_its_members():
    model = make_model()
    noise = torch.stack([draw_noise(model.schedule, model.config.bits, s) for s in (1, 2)])
    both = Generation(model, [3, 5], noise, 0.7).run().pictures()
    # rounding may turn over a bit whose logit lies at the noise, so not every pixel need be equal
    assert float((both[0] - both[1]).abs().mean()) > 0.05
    for one, alone in zip(both, (picture(model, 3, 1), picture(model, 5, 2)), strict=True):
        assert float((one - alone[0]).abs().mean()) < 0.01


def test_teacher_forcing_equals_sampling():
    """One masked pass over all scales gives the logits that sampling saw scale by scale."""
    model, seen = make_model(), []
    original = model.logits
    model.logits = lambda x, mod: seen.append(original(x, mod)) or seen[-1]
    run, states = Generation(model, [3], draw_noise(model.schedule, 16, 1), 0.7), []
    while run.scale < len(model.schedule):
        run.step()
        states.append(run.fhat)
    with torch.no_grad():
        forced = TeacherForcing(model, False)(states, torch.tensor([3]))
    assert torch.allclose(torch.cat(seen[:-1], 1), forced, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of a model's table
def test_rotation_turns_neighbouring_pairs(dtype):
    x, angles = torch.randn(2, 3, 5, 8)[..., 2:], (torch.randn(5, 3) * 30).to(dtype)
    cos, sin = angles.double().cos(), angles.double().sin()
    want = torch.empty(2, 3, 5, 6, dtype=torch.float64)
    want[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    want[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    assert torch.allclose(rotate(x, turns_of(angles)).double(), want, atol=1e-5)


@pytest.mark.parametrize("place", ["rows", "columns", "odd rows", "bf16"])
def test_rotation_goes_where_it_is_told_to(place):
    """By one pass where the place allows it, with the same bits anywhere."""
    x, turns = torch.randn(1, 2, 5, 8), turns_of(torch.randn(5, 4))
    want, room = rotate(x, turns), torch.full((1, 2, 9, 9), float("nan"))
    into = {
        "rows": torch.full((1, 2, 9, 8), float("nan"))[:, :, 2:7], "columns": torch.empty(1, 2, 8, 5).transpose(2, 3),
        "odd rows": room[:, :, 1:6, 1:], "bf16": torch.empty(1, 2, 5, 8, dtype=torch.bfloat16),
    }[place]  # fmt: skip
    assert rotate(x, turns, into) is into and torch.equal(into, want.to(into.dtype))
    assert int(room.isnan().sum()) == (82 if place == "odd rows" else 162)


def test_resampling_matrices():
    x = torch.randn(2, 3, 12, 20)
    assert torch.allclose(pool(x, (4, 5)), torch.nn.functional.avg_pool2d(x, (3, 4)), atol=1e-6)
    want = torch.nn.functional.interpolate(x, (31, 26), mode="bilinear", align_corners=False)
    assert torch.allclose(grow(x, (31, 26)), want, atol=1e-5)
    assert torch.allclose(pool(torch.ones(1, 1, 64, 64), (6, 7)), torch.ones(1, 1, 6, 7), atol=1e-6)


def test_quantiser_bits_rebuild_its_states():
    quantiser = Quantiser(((1, 1), (2, 2), (4, 4), (8, 8)), 5)
    bits, states, _ = quantiser(torch.randn(2, 5, 8, 8))
    fhat = torch.zeros(2, 5, 8, 8)
    for i, (bit, state) in enumerate(zip(bits, states, strict=True)):
        fhat = quantiser.add(fhat, bit, i)
        assert torch.equal(fhat, state)


def test_shipped_weights():
    assert WEIGHTS.stat().st_size <= 14 * 2**20
    model = load_pocketvar()
    assert model.config == PocketConfig() and model.schedule.num_tokens == 10521
    row = find_model("pocketvar")
    assert (row.layers, row.heads, row.head_dim) == (model.config.depth, model.config.heads, model.config.head_dim)
    assert row.schedule() == model.schedule
    assert 1 < model.logit_bound <= row.logit_bound
    names = {name for name, _, _ in PocketAdapter(row, "cpu").yardsticks()}
    assert len(names) == 2, "yardsticks.json must be of the shipped weights"


def test_a_shipped_picture_is_a_picture():
    """Coarse scales of a real class: colours of the photo, not noise (the flower is orange on dark)."""
    model = load_pocketvar()
    run = Generation(model, [CLASSES.index("flower")], draw_noise(model.schedule, 16, 3), 0.5).run(9)
    pixels = run.pictures()[0]
    assert pixels.shape == (3, 256, 256) and torch.isfinite(pixels).all()
    red, green, blue = pixels[:, 96:160, 96:160].mean((1, 2)).tolist()
    assert red > 0.5 and red > green > blue
    assert pixels[:, :32, :32].mean() < 0.4


def test_damaged_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_pocketvar(tmp_path / "none.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(WEIGHTS.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a pocketvar weight file"):
        load_pocketvar(bad)


def test_a_profile_is_no_attention():
    adapter = PocketAdapter(find_model("pocketvar"), "cpu")
    with pytest.raises(ValueError, match=r"got a Tuned, want what is called with q, k, v.*sparse_attention"):
        adapter.finish(adapter.start((0, 1), 1), sparvar_tune.load_profile("pocketvar", gpu="cpu"))


def test_wrong_requests_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"classes=\[99\]"):
        picture(model, label=99)
    with pytest.raises(ValueError, match="temperature"):
        picture(model, temperature=-1.0)
