"""Metrics, bounds and pairs."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from sparvar_tune.catalog.metrics import METRICS, Metric, always, find_metric
from sparvar_tune.measure.fidelity import (
    Constraint,
    compare_pictures,
    lower_bound,
    mean_of,
    recall_of_mass,
    relative_l2,
    t_quantile,
    worst_class,
    worst_mean,
)
from sparvar_tune.measure.pairs import held_out_pairs, search_pairs, yardstick_pairs
from sparvar_tune.measure.timing import paired_speedup, timing


def test_psnr_by_hand():
    dense = torch.full((1, 3, 192, 192), 0.5)
    f = compare_pictures(dense + 0.1, dense)
    assert f["psnr"] == pytest.approx(20.0, abs=1e-3)
    same = compare_pictures(dense, dense)
    assert same["psnr"] == 100 and same["ssim"] == pytest.approx(1) and same["ms_ssim"] == pytest.approx(1)


def test_metrics_fall_with_damage():
    torch.manual_seed(0)
    dense = torch.rand(1, 3, 200, 180)
    found = [compare_pictures((dense + s * torch.randn_like(dense)).clamp(0, 1), dense) for s in (0.01, 0.05, 0.2)]
    for a, b in itertools.pairwise(found):
        assert all(a[metric.name] > b[metric.name] for metric in always())


def test_broken_pictures_are_refused():
    dense = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="NaN"):
        compare_pictures(dense * math.nan, dense)
    with pytest.raises(ValueError, match="the same"):
        compare_pictures(dense[:, :, :32], dense)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (5, 2.015), (11, 1.796), (31, 1.6955), (120, 1.658)]
)
def test_t_quantile_against_the_table(degrees, value):
    assert t_quantile(0.95, degrees) == pytest.approx(value, abs=2e-3)


def test_lower_bound_by_hand():
    # mean 3, standard deviation sqrt(2.5), t(0.95, 4) = 2.132
    assert lower_bound([1, 2, 3, 4, 5], [0] * 5) == pytest.approx(3 - 2.132 * math.sqrt(2.5 / 5), abs=0.02)
    assert lower_bound([3.0], [0]) == -math.inf
    # a class seen once: not stratified, so the same as before
    assert lower_bound([1, 2, 3, 4, 5], [0, 1, 1, 2, 2]) == lower_bound([1, 2, 3, 4, 5], [0] * 5)
    # means 1 and 11, each with variance 2/3 over three: error sqrt((2/3)/3/4 * 2) = 1/3, t(0.95, 4) = 2.132
    values, classes = [0, 10, 1, 11, 2, 12], [0, 1] * 3
    assert lower_bound(values, classes) == pytest.approx(6 - 2.132 * math.sqrt(1 / 3 / 2), abs=0.01)
    assert lower_bound([5.0, 7.0] * 3, classes) == 6  # classes differ, pictures of a class do not: nothing is left to chance


@pytest.mark.slow
@pytest.mark.parametrize(("n", "num_classes", "spread"), [(12, 1, 0.0), (30, 10, 4.0), (32, 10, 0.0), (12, 10, 4.0)])
def test_lower_bound_covers_as_often_as_it_says(n, num_classes, spread):
    """Classes with their own level and their own spread; twelve pairs of ten classes fall back to the plain, wider bound."""
    g = torch.Generator().manual_seed(0)
    levels = 30 + spread * torch.randn(num_classes, generator=g, dtype=torch.float64)
    within = 0.5 + torch.rand(num_classes, generator=g, dtype=torch.float64)
    classes = [label for label, _ in held_out_pairs(num_classes, n)]
    draws = levels[classes] + within[classes] * torch.randn(4000, n, generator=g, dtype=torch.float64)
    share = sum(lower_bound(d, classes) <= levels.mean() for d in draws.tolist()) / len(draws)
    assert 0.93 < share < (0.97 if n != 12 or num_classes == 1 else 1.01)


def test_constraint_needs_both():
    constraint = Constraint({"ssim": 0.9, "psnr": 30.0})
    assert constraint.shortfall({"psnr": 30.0, "ssim": 0.9}) <= 0
    assert constraint.shortfall({"psnr": 19.0, "ssim": 0.95}) == pytest.approx(11)
    assert constraint.shortfall({"psnr": 35.0, "ssim": 0.5}) == pytest.approx(40)
    assert str(constraint) == "PSNR >= 30 dB and SSIM >= 0.9" and constraint == Constraint({"psnr": 30.0, "ssim": 0.9})


def test_of_a_metric_that_falls_with_closeness_the_bound_is_above(monkeypatch):
    distance = Metric("distance", "Distance", "", "lower", 1e3, 0.0, 1e3, 0.01, 4, lambda a, b: float((a - b).abs().mean()))
    monkeypatch.setitem(METRICS, "distance", distance)
    values, classes = [1.0, 2, 3, 4, 5], [0] * 5
    worst = worst_mean(distance, values, classes)
    assert worst - 3 == pytest.approx(3 - lower_bound(values, classes))
    constraint = Constraint({"distance": 4.0})
    assert constraint.shortfall({"distance": 3.9}) < 0 < constraint.shortfall({"distance": 4.1})
    picture = torch.rand(1, 3, 64, 64)
    assert compare_pictures(picture, picture)["distance"] == 0


def test_the_worst_class_by_hand():
    """Class 1 is 2 dB below the mean of means; its own three values bound it: t(0.95, 2) = 2.920."""
    values, classes = [33.0, 29, 34, 30, 35, 31], [0, 1] * 3
    worst = find_metric("psnr-worst-class")
    assert (mean_of(worst, values, classes), worst_class(worst, values, classes)) == (30, 1)
    assert worst_mean(worst, values, classes) == pytest.approx(30 - 2.920 / math.sqrt(3), abs=2e-3)
    distance = find_metric("lpips_worst_class")
    assert mean_of(distance, values, classes) == 34 and worst_class(distance, values, classes) == 0
    assert worst_mean(distance, values, classes) == pytest.approx(34 + 2.920 / math.sqrt(3), abs=2e-3)
    assert worst_mean(worst, [33.0, 29, 34], [0, 1, 0]) == -math.inf, "a class seen once proves nothing of it"


@pytest.mark.parametrize("apart", [0.0, 8.0])
def test_the_worst_class_is_overrated_in_at_most_five_of_a_hundred(apart):
    """Each class has the whole error probability, and so has their worst; where one is worst by far, no more and no less."""
    g, runs = torch.Generator().manual_seed(1), 2500
    classes = [label for label, _ in held_out_pairs(10, 32)]
    levels = torch.tensor([34.0 - apart, *[34.0] * 9], dtype=torch.float64)
    within = 0.3 + torch.rand(10, generator=g, dtype=torch.float64)
    draws = levels[classes] + within[classes] * torch.randn(runs, 32, generator=g, dtype=torch.float64)
    worst = find_metric("psnr_worst_class")
    share = sum(worst_mean(worst, d, classes) > 34 - apart for d in draws.tolist()) / runs
    assert share <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs) and (apart == 0 or share > 0.035), share


@pytest.mark.parametrize(
    ("bounds", "pairs", "said"),
    [
        ({"psnr_worst_class": 33.0}, 19, "--pairs 20"), ({"psnr_worst_class": 33.0}, 20, None), ({"psnr": 33.0}, 2, None),
        ({"lpips": 0.1}, 32, "--metric-weights lpips=PATH"),
    ],
)  # fmt: skip
def test_bounds_that_nothing_could_certify_are_refused_first(bounds, pairs, said):
    reason = Constraint(bounds).why_not(pairs, 10, ())
    assert reason is None if said is None else said in reason and "\n" not in reason


def test_a_preference_needs_prompts_and_a_library(tmp_path):
    metric = METRICS["image_reward"]
    assert (
        "draws from none" in Constraint({}, (metric,)).why_not(32, 10, ())
        and Constraint({}, (metric,)).why_not(32, 2, ("a cat", "a dog")) is None
        and Constraint({}, (metric,)).why_not(32, 2, (207, 208)) is not None
    )
    with pytest.raises(ValueError, match=r"wants|no such file|no folder"):
        metric.with_weights(tmp_path / "none")
    with pytest.raises(ValueError, match=r"wants transformers|no folder"):
        METRICS["hpsv2"].with_weights(tmp_path / "none")


def test_a_preference_is_the_gain_over_the_dense_picture(tmp_path):
    """A CLIP of random weights, saved as transformers saves them: it stands for HPSv2's, which nobody may download here."""
    transformers = pytest.importorskip("transformers")  # of the extra `preference`, which tests do not install
    words = {word: i for i, word in enumerate(("<|startoftext|>", "<|endoftext|>", "a</w>", "t</w>", "c", "a", "ca", "cat</w>"))}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=small | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 8},
        vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8,
    ))  # fmt: skip
    model.save_pretrained(tmp_path)
    tokens = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=8)
    shape = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**shape), tokens).save_pretrained(tmp_path)
    metric = METRICS["hpsv2"].with_weights(tmp_path)
    dense, other = torch.rand(2, 1, 3, 64, 64).unbind()
    gain = compare_pictures(other, dense, [metric], "a cat")["hpsv2"]
    assert gain == pytest.approx(-compare_pictures(dense, other, [metric], "a cat")["hpsv2"], abs=1e-6) and abs(gain) > 1e-6
    assert compare_pictures(dense, dense, [metric], "a cat")["hpsv2"] == pytest.approx(0, abs=1e-6)


def test_attention_metrics_by_hand():
    assert relative_l2(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.log(3), 0.0], [0.0, 5.0]])
    assert recall_of_mass(q, k, 1.0, torch.tensor([0])) == pytest.approx(0.75)


def test_pairs_never_meet():
    sets = [set(f(10, 500)) for f in (search_pairs, held_out_pairs, yardstick_pairs)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    seeds = [{seed for _, seed in s} for s in sets]
    assert not seeds[0] & seeds[1] and not seeds[1] & seeds[2]
    assert {label for label, _ in held_out_pairs(10, 10)} == set(range(10))


def test_timing_and_speedup_by_hand():
    t = timing([float(n) for n in range(1, 12)])
    assert (t.p20_ms, t.p50_ms, t.p80_ms, t.n) == (3.0, 6.0, 9.0, 11)
    s = paired_speedup([20.0, 22.0, 24.0, 26.0], [10.0, 11.0, 12.0, 13.0])
    assert (s.median, s.low, s.high, s.n) == (2.0, 2.0, 2.0, 4)
    wide = paired_speedup([10.0, 20.0, 30.0, 40.0], [10.0] * 4)
    assert wide.low < wide.median == 2.5 < wide.high


def lpips_weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    made = {}
    for n, (i, (out, into, side)) in enumerate(sizes.items()):
        made[f"features.{i}.weight"] = torch.randn(out, into, side, side, generator=g) / (into * side * side) ** 0.5
        made[f"features.{i}.bias"] = torch.zeros(out)
        made[f"lin{n}.weight"] = torch.rand(1, out, 1, 1, generator=g)
    return made


def test_lpips_with_the_users_weights(tmp_path):
    """Random weights: zero for equal pictures, symmetric, grows with the damage; a short file is refused by name."""
    path = tmp_path / "alex.safetensors"
    save_file(lpips_weights(), path)
    lpips, picture = METRICS["lpips"].with_weights(path).compare, torch.rand(1, 3, 128, 128)
    small, large = ((picture + s * torch.randn_like(picture)).clamp(0, 1) for s in (0.02, 0.3))
    assert lpips(picture, picture) == 0
    assert lpips(picture, small) == pytest.approx(lpips(small, picture)) and 0 < lpips(picture, small) < lpips(picture, large)
    save_file({k: v for k, v in lpips_weights().items() if k != "lin3.weight"}, path)
    with pytest.raises(ValueError, match=r"lin3\.weight is missing"):
        METRICS["lpips"].with_weights(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        METRICS["lpips"].with_weights(path)
