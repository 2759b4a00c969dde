"""Products of 8-bit numbers: the rule against fp64, models of every kind with it and without, and where it is not done."""

from __future__ import annotations

import dataclasses

import adapter_checks as checks
import block_lookalikes
import eight_bits
import pytest
import tiny
import tiny_emojivar
import torch
import var_hart_lookalikes
from examples import example
from fused_checks import errors, on
from torch import nn

from sparvar_kernels import Policy, SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.adapters.precision import scale_products
from sparvar_tune.bitwise.sampling import draw_noise
from sparvar_tune.catalog.gpus import find_gpu
from sparvar_tune.generation import (
    CacheBudget,
    DropUnconditional,
    Precision,
    PruneTokens,
    SkipScales,
    scaled_product,
    why_not_steps,
)  # fmt: skip
from sparvar_tune.generation.scaled_product import ScaledLinears, ScaledProduct, capability_of, gaining, why_no_gain
from sparvar_tune.pocketvar.model import Generation
from sparvar_tune.policy_search.judge import make_attention, offered, without_slow_steps
from sparvar_tune.policy_search.menu import fixed_points, step_menu
from sparvar_tune.profile.reader import Reader, to_plain
from sparvar_tune.runtime.tuned import Tuned

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4, 6))
STEP, WHOLE = Precision(3, ((1, 2),)), Precision(3, ((1, 2),), "int8")
FORMATS = ("e4m3", "int8")
KINDS = {"infinity": block_lookalikes.Infinity, "hart": var_hart_lookalikes.Hart, "var": var_hart_lookalikes.Var}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("step", "reason"), [
    (Precision(5, ((0, 1),)), "want 0..4"), (Precision(3, ()), "got none"), (Precision(3, ((1, 0),)), "layers 1..0"),
    (Precision(3, ((0, 4),)), "want some of 0..3"), (Precision(3, ((2, 3), (0, 1))), "ascending"),
    (Precision(3, ((0, 1), (1, 2))), "ascending"), (Precision(3, ((0, 1),), "int4"), "fmt: got 'int4', want e4m3 or int8"),
])  # fmt: skip
def test_illegal_steps(step, reason):
    assert reason in step.why_not(SCHEDULE, 4) and Precision(3, ((0, 1), (3, 3))).why_not(SCHEDULE, 4) is None


def test_where_it_holds():
    step = Precision(3, ((0, 1), (3, 3)))
    assert [(s, layer) for s in (None, 2, 3, 4) for layer in range(5) if step.at(s, layer)] == [
        (3, 0), (3, 1), (3, 3), (4, 0), (4, 1), (4, 3)
    ]  # fmt: skip
    assert step.describe() == "products of 8-bit floats from scale 3 on in layers 0 to 1, 3"
    assert WHOLE.describe() == "products of 8-bit integers from scale 3 on in layers 1 to 2"


@pytest.mark.parametrize(("rows", "inputs", "outputs", "dtype"), [
    (5, 48, 32, "float32"), (1, 7, 3, "float32"), (33, 64, 96, "bfloat16"), (4, 20, 5, "float16"),
])  # fmt: skip
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_product_is_the_rules(rows, inputs, outputs, dtype, fmt):
    assert_product(rows, inputs, outputs, getattr(torch, dtype), fmt, "cpu")


@pytest.mark.gpu
def test_the_product_is_the_rules_on_a_gpu():
    for rows, inputs, outputs, dtype in ((5, 48, 32, "float32"), (1, 7, 3, "float32"), (33, 64, 96, "bfloat16"),
                                         (300, 2048, 512, "bfloat16"), (64, 128, 96, "float16")):  # fmt: skip
        for fmt in FORMATS:
            assert_product(rows, inputs, outputs, getattr(torch, dtype), fmt, "cuda")


def assert_product(rows: int, inputs: int, outputs: int, dtype: torch.dtype, fmt: str, device: str) -> None:
    g = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    want = eight_bits.product(x, w, b, fmt)
    for bias in (b, None):
        got = ScaledProduct(w.to(device), fmt)(x.to(device)[None], None if bias is None else bias.to(device))[0]
        far = (got.cpu().double() - (want if bias is not None else want - b.double())).abs().max() / want.abs().max()
        in_fp32 = 2e-6 if device == "cpu" or fmt == "int8" else 2e-4  # tensor cores keep fewer bits of a sum on the way
        assert got.dtype == dtype and float(far) < {torch.float32: in_fp32, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    plain = x.double() @ w.double().T + b.double()
    assert 1e-3 < float((want - plain).norm() / plain.norm()) < 0.1, "the oracle is no plain product, and near one"


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_with_nan_is_nan_and_no_other(fmt):
    x = torch.ones(3, 16)
    x[1, 3] = torch.nan
    out = ScaledProduct(torch.randn(8, 16), fmt)(x)
    assert out.isnan().all(1).tolist() == [False, True, False] and bool(out[::2].isfinite().all())


def oracle_linear(weights, now, step):
    """F.linear that is the oracle's for the weights of layers that the step scales. now(): the scale."""
    plain = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        layer = next((layer for layer, own in weights if own is weight), None)
        if layer is None or not step.at(now(), layer):
            return plain(x, weight, bias)
        return eight_bits.product(x.reshape(-1, x.shape[-1]), weight, bias, step.fmt).view(*x.shape[:-1], -1).to(x.dtype)

    return linear


def with_step(model, *steps):
    policy = Policy(("A" * model.config.heads,) * model.config.depth, (), steps)
    return SparseAttention(policy, model.schedule, softmax_scale=model.softmax_scale, logit_bound=model.logit_bound)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_model_in_the_box_is_the_oracles(monkeypatch, prune, fmt):
    """The same model whose linear is the oracle's; without the step, or in another layer, it is another picture."""
    model, step = tiny.make_model(), Precision(4, ((1, 1),), fmt)
    more = (PruneTokens(5, (60, 90), 4, 1, 1),) if prune else ()

    def drawn(*steps):
        generating = Generation(model, (3, 5), draw_noise(model.schedule, 16, 7), 0.0, with_step(model, *steps, *more))
        found.append(generating)
        logits = []
        generating.take = lambda t: logits.append(t) or type(generating).take(generating, t)
        generating.run()
        return torch.cat(logits, 1)

    found: list[Generation] = []
    got, without, other = drawn(step), drawn(), drawn(Precision(4, ((0, 0),), fmt))
    weights = [(i, getattr(b, n).weight) for i, b in enumerate(model.blocks) for n in ("qkv", "proj", "fc1", "fc2")]
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", oracle_linear(weights, lambda: found[-1].scale, step))
        want = drawn()
    assert_near(got, want, without, other)


def assert_near(got, want, *others):
    """got is nearer to want than a tenth of what the others are: a rounding that went the other way moves a little."""
    far = (got - want).norm()
    assert bool(got.isfinite().all()) and all(float(far) < 0.1 * float((o - want).norm()) for o in others), far


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [(STEP,), (DropUnconditional(4), STEP), (SkipScales((-1,)), STEP), (WHOLE,)])
def test_a_live_model_on_both_paths_is_the_oracles(monkeypatch, kind, steps):
    driven = KINDS[kind]()
    before, last = checks.everything(driven), len(checks.attention_of(driven, Policy(("AA",) * len(driven.blocks)))[1]) - 1
    steps = tuple(SkipScales((last,)) if isinstance(s, SkipScales) else s for s in steps)
    attend = attend_of(driven, *steps)
    plain = attend_of(driven, *steps[:-1])
    with adapters.apply(driven.model, attend):
        ours = checks.draw(driven)
    with on(driven, attend) as path:
        fused = [checks.draw(driven) for _ in range(2)]
        assert path.why_not_fused is None
    with on(driven, plain):
        without = checks.draw(driven)
    assert checks.everything(driven) == before
    counted, linears = [-1], adapters.recognise(driven.model)[0].linears
    weights = [(i, m.weight) for i, b in enumerate(driven.blocks) for m in linears(b)]
    first = adapters.recognise(driven.model)[1].attentions[0]
    schedule = attend.schedule

    def count(module, *_):
        counted[0] = (-1 if schedule.prefix else 0) if module.cached_k is None else counted[0] + 1

    hook = first.register_forward_pre_hook(count)
    with monkeypatch.context() as patched, adapters.apply(driven.model, plain):
        patched.setattr(torch.nn.functional, "linear", oracle_linear(weights, lambda: max(counted[0], 0), steps[-1]))
        want = checks.draw(driven)
    hook.remove()
    for got in (ours, *fused):
        assert max(errors(got, want)) < 0.1 * max(errors(without, want))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_scaled_before_the_first_image(kind):
    """Also those of scales that it does not draw: made while a graph is captured they would be what nobody computes."""
    driven = KINDS[kind]()
    last, linears = len(driven.grids()) - 1, adapters.recognise(driven.model)[0].linears
    step = Precision(last, STEP.layers)
    with on(driven, attend_of(driven, step)) as path, adapters.skip_scales(driven.model, last):
        checks.draw(driven)
        for layer, (block, own) in enumerate(zip(path.fused.stack.blocks, driven.blocks, strict=True)):
            for product in vars(block).values():
                if hasattr(product, "_scaled"):
                    wanted = step.at(last, layer) and any(product.module is m for m in linears(own))
                    assert list(product._scaled) == ["e4m3"] * wanted


@pytest.mark.gpu
@pytest.mark.parametrize("step", [STEP, WHOLE])
def test_graphs_are_the_eager_path_bit_for_bit(step):
    """Captured in the second image and replayed; the last scale is first drawn when the others are graphs already."""
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        driven = block_lookalikes.Infinity()
        driven.model.rng = torch.Generator("cuda")
        attend, last = attend_of(driven, step), len(driven.grids()) - 1
        with on(driven, attend, graphs=False):
            want = checks.draw(driven)
        assert not checks.same(checks.draw(driven), want)
        with on(driven, attend, graphs=True) as path:
            with adapters.skip_scales(driven.model, last):
                for _ in range(3):
                    checks.draw(driven)
            for _ in range(3):
                assert checks.same(checks.draw(driven), want)
            assert path.why_not_graphs is None


def attend_of(driven, *steps):
    return checks.attention_of(driven, Policy(("AB",) * len(driven.blocks), (), steps))[0]


def test_what_cannot_be_scaled_is_refused_and_nothing_changes():
    driven = block_lookalikes.Infinity()

    class Lora(nn.Linear):
        pass

    driven.blocks[1].ffn.fc1 = Lora(32, 128)
    before, attend = checks.everything(driven), attend_of(driven, STEP)
    for put_on in (adapters.apply, lambda _model, attend: on(driven, attend)):
        with pytest.raises(ValueError, match="block 1 has a Lora that is no plain Linear"):
            put_on(driven.model, attend)
    assert checks.everything(driven) == before
    with on(driven, attend_of(driven, Precision(3, ((0, 0), (2, 2))))) as path:
        checks.draw(driven)
        assert path.why_not_fused is None, "its layer left out"
    found = adapters.recognise(driven.model)[1]
    with pytest.raises(ValueError, match="no plain Linear"):
        scale_products(dataclasses.replace(found, schedule=attend.schedule), STEP, lambda b: (b.ffn.fc1,), dict)


def test_a_product_that_goes_another_way_is_an_error():
    linear = nn.Linear(4, 4)
    scaled = ScaledLinears([linear], "e4m3")
    with scaled.used(0):
        out = linear(torch.ones(1, 4))
    assert not torch.equal(out, linear(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="another way"), scaled.used(0):
        torch.ones(1, 4) @ linear.weight.t()
    with torch.no_grad():
        linear.weight.mul_(2)
    with scaled.used(0):
        again = linear(torch.ones(1, 4))
    assert not torch.equal(again, out), "changed weights are scaled anew"


def test_steps_that_do_not_go_together():
    budget = CacheBudget(3, ((9,) * 4, (9,) * 4), window=4)
    assert "another precision" in why_not_steps((STEP, budget), ("precision", "cache_budget"), "it")


def test_it_is_offered_and_done_only_where_it_gains(monkeypatch):
    for has, here in ((True, ("int8",)), (False, ())):
        monkeypatch.setattr(scaled_product, "multiplies_int8", lambda: has)  # noqa: B023
        assert gaining(capability_of("cpu")) == here
    assert "a CPU multiplies no 8-bit floats (a GPU of 8.9" in why_no_gain("e4m3", None)
    assert "this CPU multiplies no 8-bit integers (one with AVX-512 VNNI does)" in why_no_gain("int8", None)
    assert [gaining(c) for c in ((7, 5), (8, 6), (8, 9), (9, 0))] == [(), ("int8",), ("int8", "e4m3"), ("int8", "e4m3")]
    menu = step_menu(SCHEDULE, ("precision", "skip_scales", "drop_unconditional"), 4, ("int8", "e4m3"))
    ours = {name: option for name, option in menu.items() if any(isinstance(s, Precision) for s in option.steps)}
    assert list(ours)[:4] == [f"{fmt} products from {s}" for fmt in ("int8", "e4m3") for s in (4, 2)]
    assert ours["e4m3 products from 2"].after == ("e4m3 products from 4",)
    assert {step.fmt for step in ours["e4m3 products from 2"].steps} == {"e4m3"}
    assert "drop half from 3, int8 products from 2" in ours and "int8 products from 2, drop last scale" in ours
    assert not any("products" in name for name in step_menu(SCHEDULE, ("skip_scales",), 4, ("int8",)))
    assert not any("products" in name for name in step_menu(SCHEDULE, ("precision",), 4))
    for option in menu.values():
        assert Policy(("A",) * 4, (), option.steps).why_not(SCHEDULE, 4, 1) is None
    model = tiny_emojivar.make_model()

    class Driven:
        steps, device, schedule = ("precision", "skip_scales"), "cpu", model.schedule

    assert list(offered(Driven())) == ["skip_scales"]
    monkeypatch.setattr(scaled_product, "multiplies_int8", lambda: True)
    assert list(offered(Driven())) == ["precision", "skip_scales"]
    assert why_not_steps((STEP,), adapters.emojivar.STEPS, "it") is None


@pytest.mark.parametrize(("fmt", "where"), [("e4m3", {"h100"}), ("int8", {"a100", "h100", "cpu"}), ("int8", {"a100", "h100"})])
def test_a_profile_with_it_goes_without_where_it_would_be_slower(monkeypatch, fmt, where):
    monkeypatch.setattr(scaled_product, "multiplies_int8", lambda: "cpu" in where)
    profile = example()
    layers = len(profile.policy.heads)
    step = Precision(len(profile.workload.schedule) - 1, ((0, layers - 1),), fmt)
    with_it = dataclasses.replace(profile, policy=dataclasses.replace(profile.policy, steps=(step,)))
    for gpu in ("cpu", "a100", "h100"):
        tuned = Tuned(find_gpu(gpu), with_it, None, ())
        assert (step in tuned.policy().steps) == (gpu in where)
        assert gpu in where or "multiplies no 8-bit" in tuned.refused_steps()["precision"]


def test_files_from_before_there_were_two_formats_keep_every_byte():
    profile, steps = example(), [{"kind": "precision", "from_scale": 2, "layers": [[0, 1]]}]
    policy = dataclasses.replace(profile.policy, steps=(Precision(2, ((0, 1),)),))
    assert to_plain(policy)["steps"] == steps
    read = Reader().read(type(profile), {**to_plain(profile), "policy": {**to_plain(policy)}}, "", whole=False)
    assert read.policy.steps == policy.steps
    whole = dataclasses.replace(policy, steps=(Precision(2, ((0, 1),), "int8"),))
    assert to_plain(whole)["steps"] == [{**steps[0], "fmt": "int8"}]
    read = Reader().read(type(profile), {**to_plain(profile), "policy": to_plain(whole)}, "", whole=False)
    assert read.policy.steps == whole.steps


def test_an_adapter_does_it():
    from sparvar_tune.catalog.models import find_model

    tiny_model = tiny.make_model()
    assert tiny_model.config.depth == 2
    adapter = type("A", (), {"steps": ("precision",), "schedule": tiny_model.schedule, "softmax_scale": 1.0, "logit_bound": None,
                             "model": find_model("pocketvar")})()  # fmt: skip
    policy = Policy(("AA",) * 2, (), (Precision(5, ((0, 1),)),))
    assert make_attention(adapter, policy).policy is policy


def test_a_shipped_policy_is_begun_with_without_products_that_would_be_emulated(monkeypatch):
    class Driven:
        device, steps = "cpu", ("precision", "skip_scales")

    policy = Policy(("A",) * 4, (), (SkipScales((4,)), WHOLE))
    monkeypatch.setattr(scaled_product, "multiplies_int8", lambda: True)
    assert without_slow_steps(policy, Driven()) == policy
    monkeypatch.setattr(scaled_product, "multiplies_int8", lambda: False)
    assert without_slow_steps(policy, Driven()).steps == policy.steps[:1]
    monkeypatch.setattr(scaled_product, "multiplies_int8", lambda: True)
    monkeypatch.setattr(Driven, "steps", ("skip_scales",))
    assert without_slow_steps(policy, Driven()).steps == policy.steps[:1], "it cannot do them"


def test_a_search_begins_with_shipped_policies_and_8_bit_products_together():
    shipped = Policy(("A",) * 4)
    found = fixed_points(SCHEDULE, 4, 1, {"shipped x": shipped}, ("precision",), ("int8", "e4m3"))
    for s in (2, 3):
        (step,) = found[f"shipped x, int8 products from {s}"].steps
        assert step == Precision(s, ((0, 3),), "int8") and found["shipped x"] is shipped
    with_it = {"shipped x": dataclasses.replace(shipped, steps=(STEP,))}
    for can, formats, policies in (((), ("int8",), {"shipped x": shipped}), (("precision",), (), {"shipped x": shipped}),
                                   (("precision",), ("int8",), with_it)):  # fmt: skip
        assert not any("shipped x," in name for name in fixed_points(SCHEDULE, 4, 1, policies, can, formats))
