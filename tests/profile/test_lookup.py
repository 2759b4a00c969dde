"""Finding the profile for this silicon: exact, then near, then none and why; which sources a profile depends on; names."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from pathlib import Path

import pytest
import torch
from examples import changed, example, fails

import sparvar_tune
from sparvar_kernels import Cs4a, Policy, Reuse, Tile
from sparvar_tune import runtime
from sparvar_tune.adapters import load_adapter
from sparvar_tune.catalog.gpus import GPUS, check_device, distance, find_gpu
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.cli.options import CheckAdapterOptions
from sparvar_tune.profile import identity, store
from sparvar_tune.profile.schema import MachineCode, ProfileError
from sparvar_tune.runtime.demote import deciding
from sparvar_tune.runtime.load import near_counts


def on(gpu, **workload):
    """The example as if tuned on a GPU, for another workload."""
    made = changed("silicon", gpu=gpu, family=GPUS[gpu].family, name=GPUS[gpu].name)
    return dataclasses.replace(made, workload=dataclasses.replace(made.workload, **workload))


H200 = find_gpu("h200")
RELATIVES = tuple(g for g in GPUS.values() if g.family == "hopper" and g.slug != "h200")


def test_lookup_exact_then_family_then_miss(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    found = store.find("pocketvar.json", H200, RELATIVES, (mine, theirs))
    assert isinstance(found, store.Miss)
    for part in ("pocketvar.json", *(str(f / g) for f in (mine, theirs) for g in ("h200", "h100-sxm", "h100-pcie"))):
        assert part in found.reason
    store.save(on("h100-sxm"), theirs / "h100-sxm" / "pocketvar.json")
    found = store.find("pocketvar.json", H200, RELATIVES, (mine, theirs))
    assert isinstance(found, store.Match) and not found.exact and "h100-sxm for h200, hopper, distance 0.52" in found.reason
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    store.save(on("h200"), theirs / "h200" / "pocketvar.json")
    found = store.find("pocketvar.json", H200, RELATIVES, (mine, theirs))
    assert isinstance(found, store.Match) and found.exact and found.path.is_relative_to(theirs)
    store.save(on("h200"), mine / "h200" / "pocketvar.json")
    found = store.find("pocketvar.json", H200, RELATIVES, (mine, theirs))
    assert isinstance(found, store.Match) and found.path.is_relative_to(mine)


def test_what_was_only_predicted_gives_way_to_what_was_measured(tmp_path):
    """A damaged file behind a good one is not looked at; two predicted ones: the first folder's counts."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    measured = on("h200")
    times = {"tuned": None, "dense": None, "speedup": None, "binary": None, "tuned_predicted_ms": 1.0, "dense_predicted_ms": 2.0}
    rows = tuple(dataclasses.replace(row, state="predicted", **times) for row in measured.rows)
    policy_of_mine = dataclasses.replace(measured, state="predicted", rows=rows, generation=None)
    guess = dataclasses.replace(policy_of_mine, policy_state="unverified", evidence=None)

    def found_of(first, second):
        for folder, profile in ((mine, first), (theirs, second)):
            store.save(profile, folder / "h200" / "pocketvar.json")
        return store.find("pocketvar.json", H200, RELATIVES, (mine, theirs))

    found = found_of(guess, measured)
    assert found.path.is_relative_to(theirs) and found.exact and found.profile == measured
    assert f"{mine / 'h200' / 'pocketvar.json'} gives way, as nothing in it was measured" in found.reason
    for first, second in ((policy_of_mine, measured), (guess, guess), (measured, guess)):
        found = found_of(first, second)
        assert found.path.is_relative_to(mine) and "gives way" not in found.reason and found.profile == first
    (theirs / "h200" / "pocketvar.json").write_text("{")
    assert store.find("pocketvar.json", H200, RELATIVES, (mine, theirs)).path.is_relative_to(mine)


@pytest.mark.parametrize(("made", "name", "said"), [
    (on("h100-sxm"), "pocketvar.json", "tuned for h100-sxm, but in the folder of h200"),
    (on("cpu"), "pocketvar.json", "tuned for cpu, but in the folder of h200"),
    (on("h200"), "hart.json", "its name is pocketvar.json"),
    (on("h200", resolution="512"), "pocketvar.json", 'pocketvar resolution "512": unknown'),
    (on("h200", aspect="2.000"), "pocketvar.json", 'pocketvar aspect at 256 "2.000": unknown'),
    (dataclasses.replace(on("h200"), preset="paper"), "pocketvar.json", "its name is pocketvar--paper.json"),
    (on("h200", model="pocketva"), "pocketvar.json", 'pocketva resolution "256": unknown'),
    (on("h200", batch=4), "pocketvar.json", "its name is pocketvar--images-4.json"),
    (on("h200"), "pocketvar--images-4.json", "its name is pocketvar.json"),
    (on("h200", model="hart", resolution="1024", batch=3), "hart.json", "want a multiple of 2"),
    (on("h200", resolution="../../x"), "pocketvar.json", 'pocketvar resolution "../../x": unknown'),
], ids=range(11))  # fmt: skip
def test_a_file_in_anothers_place_is_refused(tmp_path, made, name, said):
    """A copied or renamed file must not pass for another GPU, model, resolution, aspect or preset."""
    store.save(made, tmp_path / "h200" / name)
    with pytest.raises(ProfileError, match=re.escape(said)):
        store.find(name, H200, RELATIVES, (tmp_path,))


def test_a_folder_that_cannot_be_looked_into_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fails(PermissionError(13, "Permission denied")))
        with pytest.raises(ProfileError, match="Permission denied"):
            store.find("pocketvar.json", H200, RELATIVES, (tmp_path,))


def test_mismatch_names_every_difference_gravest_first():
    made = example()
    assert store.mismatch(made, gpu=find_gpu("cpu"), versions=made.versions) == []
    rows = tuple(dataclasses.replace(r, binary=MachineCode("3.6.0", "sm_90", "ab" * 32)) for r in made.rows)
    other = dataclasses.replace(made.versions, torch="2.14.0", triton="3.9")
    assert store.mismatch(dataclasses.replace(made, rows=rows), gpu=H200, versions=other) == [
        "tuned for other silicon (cpu, here h200)",
        "timed with Triton 3.6.0, here 3.9: times may have moved; run sparvar-tune verify --write",
        "timed with torch 2.13.0, here 2.14.0",
    ]


@pytest.mark.parametrize(("written", "same"), [
    ("x = 1  # why\n", True), ("x = 1 \n\n\n", True), ('"""Words."""\n\nx = 1\n', True), ("x = 1\r\n", True),
    ("# \f page\nx = 1\n", True), ("# \u2028 line\nx = 1\n", True), ("x = 2\n", False), (" x = 1\n", False),
    ("x = '# 1'\n", False), ("x = 1; '#'\n", False), ("if x:\n    x = 1\n", False),
])  # fmt: skip
def test_words_of_a_source_change_no_hash(written, same):
    assert (identity.code_of(written.encode()) == identity.code_of(b"x = 1\n")) == same


def test_code_keeps_strings_and_loses_docstrings():
    source = '''"""Module."""
def f(a):  # what it does
    """First line.

    More.
    """
    # a thought
    b = """kept # here

    """
    return a[
        0  # first
    ]
'''
    want = 'def f(a):\n    b = """kept # here\n\n    """\n    return a[\n        0\n    ]'
    assert identity.code_of(source.encode()) == want
    assert identity.code_of(source.replace("More.", "Less.").encode()) == want
    assert identity.code_of(source.replace("kept", "").encode()) != want


def test_folders(monkeypatch):
    for name, value in (("SPARVAR_TUNE_HOME", "/a"), ("XDG_DATA_HOME", "/b"), ("HOME", "/c")):
        monkeypatch.setenv(name, value)
    assert store.user_folder() == Path("/a/profiles")
    monkeypatch.delenv("SPARVAR_TUNE_HOME")
    assert store.user_folder() == Path("/b/sparvar-tune/profiles")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert store.user_folder() == Path("/c/.local/share/sparvar-tune/profiles")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # nobody in the list of users
    with pytest.raises(store.NoHome, match="set SPARVAR_TUNE_HOME"):
        store.user_folder()


def test_names():
    default = ("1M", "1.000")
    assert store.profile_name("m", "near-lossless", *default, default) == "m.json"
    assert store.profile_name("m", "paper", "1M", "1.250", default) == "m--1M--1.250--paper.json"
    assert store.profile_name("m", "paper", *default, default, 4) == "m--paper--images-4.json"


def slugs(gpus):
    return [gpu.slug for gpu in gpus]


def test_distance_between_gpus():
    g = {slug: find_gpu(slug) for slug in GPUS}
    for a in g.values():
        assert distance(a, a) == 0 and all(distance(a, b) == distance(b, a) for b in g.values())
    assert distance(g["rtx5090"], g["b200"]) == math.inf  # one family in name, two binaries
    assert distance(g["a100-80"], g["l40s"]) == distance(g["cpu"], g["h200"]) == math.inf
    assert distance(g["h200"], g["h100-sxm"]) == pytest.approx(math.log2(4800 / 3352))
    assert slugs(store.near(g["h200"])) == ["h100-sxm"] and slugs(store.near(g["h100-sxm"])) == ["h200", "h100-pcie"]
    assert store.near(g["cpu"]) == store.near(g["b200"]) == ()


@pytest.mark.parametrize(("has", "wants", "said"), [
    (["h200"], "h100-pcie", "h200 has one but is too far: 2.35x in memory bandwidth (distance 1.24, at most 1 serves)"),
    (["a100-80", "rtx5090"], "b200", "rtx5090 has one but is too far: compute capability 12.0, here 10.0"),
    (["rtx4090", "a100-80"], "l40s", "rtx4090 has one but is too far: 2.19x in bf16 rate"), (["cpu"], "l40s", None),
])  # fmt: skip
def test_a_miss_names_the_nearest_that_is_too_far(tmp_path, has, wants, said):
    for slug in has:
        store.save(on(slug), tmp_path / slug / "pocketvar.json")
    gpu = find_gpu(wants)
    found = store.find("pocketvar.json", gpu, store.near(gpu), (tmp_path,))
    assert isinstance(found, store.Miss) and (said in found.reason if said else "too far" not in found.reason)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"model": None}, 'model "None": unknown'), ({"model": 3}, 'model "3": unknown'), ({"gpu": None}, 'gpu "None": unknown'),
        ({"preset": "papr"}, 'preset "papr": unknown; nearest: paper'),
        ({"resolution": 256}, '"256"'), ({"aspect": 1.0}, '"1.0"'),
        ({"images": "2"}, "images: got '2', want a whole number, 1..256"),
        ({"images": 1.5}, "images: got 1.5, want a whole number, 1..256"),
        ({"path": 3}, "path: got 3, want a path"), ({"folders": 5}, "folders: got 5, want a path"),
        ({"folders": [5]}, "folders: got 5, want a path"),
        ({"model": ["hart"]}, r"model \"\['hart'\]\": unknown"), ({"gpu": {}}, 'gpu "{}": unknown'),
        ({"resolution": ""}, 'resolution "": unknown'), ({"aspect": []}, r'aspect at 256 "\[\]": unknown'),
        ({"path": ""}, "path: got '', want a path"), ({"folders": ""}, "folders: got '', want a path"),
        ({"preset": "pa\nper"}, r'preset "pa\\nper": unknown'), ({"device": "banana"}, "device: got 'banana', want \"cpu\""),
        ({"device": True}, "device: got True"), ({"device": b"cpu"}, "device: got b'cpu'"), ({"device": "meta"}, "got 'meta'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_argument_is_one_line_and_never_dense_in_silence(home, wrong, says):
    with pytest.raises(ValueError, match=says):
        runtime.load_profile(**{"model": "pocketvar", "gpu": "cpu", **wrong})


@pytest.mark.parametrize(("count", "device", "said"), [
    (0, "cuda", "device: got cuda, but torch sees no CUDA GPU here"), (0, 0, "device: got cuda:0, but torch sees no"),
    (2, "cuda:99", "device: got cuda:99, but torch sees 2 CUDA GPUs here"), (2, 2, "got cuda:2"), (2, -1, "got -1"),
])  # fmt: skip
def test_a_device_that_is_not_here_is_one_line_wherever_it_is_asked_for(home, monkeypatch, count, device, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    asked = [
        lambda: runtime.load_profile("pocketvar", gpu="cpu", device=device),
        lambda: sparvar_tune.capture("pocketvar", scales=[0], device=device),
        lambda: load_adapter(MODELS["pocketvar"], device), lambda: CheckAdapterOptions("mine.py:make", device),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(ValueError) as refused:
            ask()
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_device_that_is_here_is_taken(home, monkeypatch):
    assert runtime.load_profile("pocketvar", device="cpu").gpu.slug == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(check_device(d)) for d in ("cpu", "cuda", "cuda:1", 1, torch.device("cuda", 0))] == [
        "cpu", "cuda", "cuda:1", "cuda:1", "cuda:0"
    ]  # fmt: skip


def test_of_two_counts_as_near_the_smaller_serves():
    assert near_counts(2)[:4] == [2, 3, 1, 4]


def test_nothing_is_decided_for_scales_that_run_dense():
    policy = Policy.uniform(1, 1, {8: Cs4a(6, 0.2, Tile(4, 4)), 7: Reuse(6)})
    assert deciding(policy) == deciding(policy, {8}) == {6} and deciding(policy, {7, 8}) == set()
