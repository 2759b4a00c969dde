"""Loading and applying profiles: exact, family, dense with the reason; demotion; a live model and single calls."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import tiny
import torch
from made_profiles import GRIDS, profile

import sparvar_tune
from sparvar_kernels import AttentionProblem, Policy, Pooled, Rule
from sparvar_kernels.backends.dense import dense_attention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import runtime
from sparvar_tune.pocketvar.model import DENSE, Generation, draw_noise
from sparvar_tune.profile import machine, schema, store


def stored(tmp_path, made, gpu="cpu"):
    store.save(made, tmp_path / gpu / "pocketvar.json")
    return runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))


def test_exact_silicon(tmp_path):
    tuned = stored(tmp_path, profile())
    assert tuned.profile == profile() and not tuned.demoted and "exact silicon" in tuned.reasons[0]
    assert "3.00x measured" in tuned.explain() and "policy has no rule" not in tuned.explain()


def test_no_profile_is_dense_with_the_reason(tmp_path):
    tuned = runtime.load_profile("pocketvar", gpu="cpu", folders=(tmp_path,))
    assert tuned.profile is None and "no pocketvar.json for cpu" in tuned.explain() and "everything runs dense" in tuned.explain()
    problem = AttentionProblem(ScaleSchedule(GRIDS), 6, 1, 2, 32)
    q, k, v = problem.make_inputs(0)
    assert torch.equal(tuned.attention(problem)(q, k, v, layer=0), dense_attention(q, k, v, problem))
    model = tiny.make_model()
    with sparvar_tune.apply(model, tuned) as applied:
        assert model.attend is DENSE and "no pocketvar.json" in applied.reasons[0]
    with pytest.raises(ValueError, match="no adapter knows it"):
        sparvar_tune.apply(object(), tuned)


def test_no_folder_to_look_in_is_said():
    tuned = runtime.load_profile("pocketvar", gpu="cpu", folders=(), record_miss=False)
    assert tuned.profile is None and "looked in no folder, as none was given" in tuned.explain()


def test_family_is_used_and_said(tmp_path):
    h100 = profile(silicon=dataclasses.replace(profile().silicon, gpu="h100-sxm", family="hopper"))
    store.save(h100, tmp_path / "h100-sxm" / "pocketvar.json")
    tuned = runtime.load_profile("pocketvar", gpu="h200", folders=(tmp_path,))
    assert tuned.profile is not None and "same family (h100-sxm for h200" in tuned.reasons[0]


def test_another_meaning_means_dense_for_the_scales_that_use_it(tmp_path):
    for name, scales in (("cpu", {5, 6}), ("pooled", {5, 6}), ("reuse", {6}), ("cs4a", set()), ("triton", set())):
        older = tuple((n, 99 if n == name else was) for n, was in profile().meaning)
        tuned = stored(tmp_path, profile(meaning=older))
        assert set(tuned.demoted) == scales and {r.scale_index for r in tuned.policy().rules} == {5, 6} - scales
        assert (f"{name} 99" in tuned.explain()) == bool(scales)


def test_other_sources_and_another_triton_keep_every_row(tmp_path):
    code = schema.MachineCode("2.0", "sm_90", "ab" * 32)
    rows = tuple(dataclasses.replace(row, binary=code) for row in profile().rows)
    versions = dataclasses.replace(machine.versions(), triton="9.9")
    tuned = stored(tmp_path, profile(kernel_hash="00" * 32, rows=rows, versions=versions))
    assert not tuned.demoted and "timed with Triton 2.0" in tuned.explain()


def test_an_uncertain_gain_means_dense(tmp_path):
    rows = profile().rows
    weak = dataclasses.replace(rows[0], speedup=schema.Speedup(1.02, 0.97, 1.07, 32))
    tuned = stored(tmp_path, profile(rows=(weak, rows[1])))
    assert set(tuned.demoted) == {5} and {r.scale_index for r in tuned.policy().rules} == {6}
    assert "0.97x" in tuned.explain()


def test_a_decision_scale_is_not_blamed_for_ranking(tmp_path):
    """Its time holds what later scales live on; making its other heads dense would only cost more."""
    made = profile()
    policy = dataclasses.replace(made.policy, rules=(Rule(4, "B", Pooled(3, 2)), *made.policy.rules))
    slow = dataclasses.replace(made.rows[0], scale_index=4, speedup=schema.Speedup(0.85, 0.84, 0.86, 32))
    tuned = stored(tmp_path, dataclasses.replace(made, policy=policy, rows=(slow, *made.rows)))
    assert not tuned.demoted and tuned.policy() == policy


@pytest.mark.parametrize(("gain", "dense"), [(1.2, {4, 6}), (3.0, set())])
def test_a_decision_scale_must_pay(tmp_path, gain, dense):
    """Scale 4 costs 0.43 ms for the keys that scale 6 lives on, which saves 0.17 or 0.67; scale 5 lives on nothing."""
    made = profile()
    policy = dataclasses.replace(made.policy, rules=(Rule(4, "B", Pooled(3, 2)), *made.policy.rules))
    times = schema.Timing(1.0, 1.0, 1.0, 32)
    one = dataclasses.replace(made.rows[0], dense=times, tuned=times)
    speedups = {4: schema.Speedup(0.7, 0.7, 0.7, 32), 5: schema.Speedup(2.0, 2.0, 2.0, 32), 6: schema.Speedup(4.0, gain, 4.0, 32)}
    rows = tuple(dataclasses.replace(one, scale_index=s, speedup=speedup) for s, speedup in speedups.items())
    tuned = stored(tmp_path, dataclasses.replace(made, policy=policy, rows=rows))
    assert set(tuned.demoted) == dense
    assert ("together do not certainly gain" in tuned.explain()) == bool(dense)


def test_predicted_profiles_warn_once(tmp_path):
    config = (("block_m", 64), ("block_n", 64), ("maxnreg", 0), ("num_stages", 3), ("num_warps", 4))
    row = schema.Row(5, "triton", config, "predicted", "fa2",
                       tuned_predicted_ms=1.0, dense_predicted_ms=2.0)  # fmt: skip
    made = profile(state="predicted", policy_state="unverified", evidence=None, generation=None,
                   rows=(row, dataclasses.replace(row, scale_index=6)))  # fmt: skip
    with pytest.warns(UserWarning, match="unverified") as caught:
        tuned = stored(tmp_path, made)
    assert len(caught) == 1 and "predicted" in tuned.explain()


@pytest.mark.filterwarnings("ignore:.*predicted")
def test_what_is_predicted_to_lose_runs_dense(tmp_path):
    config = (("block_m", 64), ("block_n", 64), ("maxnreg", 0), ("num_stages", 3), ("num_warps", 4))
    rows = tuple(
        schema.Row(s, "triton", config, "predicted", "fa2", tuned_predicted_ms=ms, dense_predicted_ms=2.0)
        for s, ms in ((5, 2.1), (6, 1.0))
    )
    made = profile(state="predicted", policy_state="unverified", evidence=None, generation=None, rows=rows)
    tuned = stored(tmp_path, made)
    assert set(tuned.demoted) == {5} and "predicted to be no faster (2.1 ms against 2 dense)" in tuned.explain()


def test_another_processor_is_named(tmp_path):
    tuned = stored(tmp_path, profile(silicon=dataclasses.replace(profile().silicon, name="Abacus", threads=64)))
    assert any("measured on Abacus, 64 threads" in reason for reason in tuned.reasons)


def test_apply_and_undo(tmp_path):
    model, tuned = tiny.make_model(), stored(tmp_path, profile())
    noise = draw_noise(model.schedule, 16, 1)
    dense = Generation(model, [3], noise, 0.7).run().fhat
    applied = sparvar_tune.apply(model, tuned)
    first, second = (Generation(model, [3], noise, 0.7).run().fhat for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, dense)
    applied.undo()
    assert model.attend is DENSE and torch.equal(Generation(model, [3], noise, 0.7).run().fhat, dense)


def test_a_misfit_is_refused(tmp_path):
    tuned = stored(tmp_path, profile(policy=Policy(("ABB",) * 2, profile().policy.rules),
                                     workload=dataclasses.replace(profile().workload, heads=3)))  # fmt: skip
    with pytest.raises(ValueError, match="does not fit the model"):
        sparvar_tune.apply(tiny.make_model(), tuned)
    with pytest.raises(ValueError, match="no adapter knows it"):
        sparvar_tune.apply(object(), stored(tmp_path, profile()))


class Proxy:
    """Answers for attributes that it does not have, as clients of remote models do."""

    def __getattr__(self, name):
        raise RuntimeError(f"not connected,\nasked for {name}")


class Lost(Proxy, torch.nn.Module):
    def __init__(self):
        pass


@pytest.mark.parametrize("model", [Proxy(), Lost()], ids=["object", "module"])
def test_a_model_whose_attributes_raise_is_refused_as_an_unknown_one(tmp_path, model):
    with pytest.raises(ValueError, match=r"no adapter .*hart: looking at it raised RuntimeError: not connected, asked") as no:
        sparvar_tune.apply(model, stored(tmp_path, profile()))
    assert "\n" not in str(no.value)


def test_single_calls(tmp_path):
    """attention(problem) runs the policy for the profile's shape and dense for any other."""
    tuned, schedule = stored(tmp_path, profile()), ScaleSchedule(GRIDS)
    for s in (4, 5, 6):
        problem = AttentionProblem(schedule, s, 1, 2, 32)
        q, k, v = problem.make_inputs(s)
        out = tuned.attention(problem)(q, k, v, layer=1)
        assert torch.allclose(out, dense_attention(q, k, v, problem), atol=1e-6) == (s != 6)
    other = dataclasses.replace(problem, softmax_scale=0.5)
    assert torch.equal(tuned.attention(other)(q, k, v, layer=1), dense_attention(q, k, v, other))
    assert "softmax_scale is 0.5" in tuned.explain(other)


def test_unknown_names():
    with pytest.raises(ValueError, match="nearest"), warnings.catch_warnings():
        runtime.load_profile("pocketva")


def test_compiling_before_the_model_is_there(monkeypatch):
    """For the GPU that is named and no other, and of what a first picture will ask for."""
    asked = []
    monkeypatch.setattr("sparvar_tune.fused.Foreseen", lambda *given: asked.append(given))
    monkeypatch.setattr("sparvar_tune.fused.read_triton", lambda: None)
    tuned, of_a_cpu = runtime.load_profile("infinity-2b", gpu="h100-sxm"), runtime.load_profile("pocketvar", gpu="cpu")
    tuned.compile("cpu")
    tuned.compile()  # there is no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    of_a_cpu.compile()
    assert asked == []
    tuned.compile()
    tuned.compile("cuda:1")
    (of, made, *form, device), (*_, other) = asked
    assert of is made and of.policy == tuned.policy() and form == [16, 128, torch.bfloat16]
    assert (device, other) == (torch.device("cuda:3"), torch.device("cuda:1"))
    for wrong in ("gpu", 1.5, None):
        with pytest.raises(ValueError, match=r"device: got .*, want a GPU's name"):
            tuned.compile(wrong)


@pytest.mark.gpu
def test_what_was_compiled_before_is_found_by_the_first_picture():
    from sparvar_kernels.backends.triton import binary
    from sparvar_tune.fused.compile_ahead import Ahead
    from sparvar_tune.fused.workspace import attention_builds

    tuned, device = runtime.load_profile("infinity-2b"), torch.device("cuda", 0)
    attend, w = tuned.sparse_attention(), tuned.profile.workload
    tuned.compile(device)
    problems = [AttentionProblem(w.schedule, s, 2, w.heads, w.head_dim, w.dtype) for s in range(len(w.schedule))]
    wanted = [b for of_scale in attention_builds(attend, problems, torch.bfloat16, device).values() for b in of_scale]
    Ahead(wanted, device).wait()  # for what is being made
    with binary.only_made():
        assert wanted and all(binary.launcher(build, device) for build in wanted)
