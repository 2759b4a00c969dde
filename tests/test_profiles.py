"""The profile file: round trips, and every kind of damage is refused with one clear line."""

from __future__ import annotations

import dataclasses
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparvar_kernels import Cs4a, Csla, Policy, Pooled, Reuse, Rule, Tile
from sparvar_tune import profiles
from sparvar_tune.gpus import GPUS, find_gpu
from sparvar_tune.profiles import ProfileError


def timing(ms: float) -> profiles.Timing:
    return profiles.Timing(ms / 2, ms, ms * 2, 32)


def example() -> profiles.Profile:
    yardstick = profiles.Yardstick("redraw", 34.5, 0.95)
    grids = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16))
    rules = (
        Rule(5, "A", Cs4a(4, 0.1, Tile(8, 8))), Rule(5, "B", Csla((-1, -1, -1, 1, 3, 5, 7), 3, Tile(8, 16), "exact", 4)),
        Rule(6, "A", Pooled(3, 2)), Rule(6, "B", Reuse(4)),
    )  # fmt: skip
    row = profiles.Row(
        5, "cpu", (("score_elements", 4096),), "measured", "sdpa", timing(1.0), timing(3.0), profiles.Speedup(3.0, 2.9, 3.1, 32)
    )
    return profiles.Profile(
        schema=1, created="2026-11-23", preset="near-lossless", state="measured",
        policy=Policy(("ABC", "BBA"), rules), policy_state="measured", policy_source="a test",
        evidence=profiles.Evidence(32, 0.95, 36.0, 35.0, 34.5, 0.97, 0.96, 0.93, 0.99, "ab" * 32, (yardstick,)),
        workload=profiles.Workload("pocketvar", "256", "1.000", grids, 0, 2, 3, 64, "fp32", 1, 1.0, 20.0, "cd" * 32),
        silicon=profiles.Silicon("cpu", "cpu", "A Processor", None, None, None, 2),
        versions=profiles.Versions("0.1.0", "3.11.7", "2.13.0", None), kernel_hash="ef" * 32,
        generation=profiles.Generation("sdpa", timing(3000.0), timing(1500.0), profiles.Speedup(2.0, 1.9, 2.1, 32)),
        rows=(row, dataclasses.replace(row, scale_index=6)), seed=0, trials=12, notes=("a note",),
    )  # fmt: skip


TEXT = profiles.to_json(example())


def test_round_trip(tmp_path):
    path = tmp_path / "cpu" / "pocketvar.json"
    profiles.save(example(), path)
    assert profiles.load(path) == example()
    assert path.read_text() == TEXT
    profiles.save(profiles.load(path), path)
    assert path.read_text() == TEXT
    assert [p.name for p in path.parent.iterdir()] == ["pocketvar.json"]


def paths_of(value, path=()):
    yield path
    if isinstance(value, dict):
        for k, v in value.items():
            yield from paths_of(v, (*path, k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from paths_of(v, (*path, i))


FIELDS = [p for p in paths_of(json.loads(TEXT)) if p]


def put(path, change):
    data = json.loads(TEXT)
    at = data
    for step in path[:-1]:
        at = at[step]
    change(at, path[-1])
    return json.dumps(data)


@pytest.mark.parametrize("path", FIELDS, ids=lambda p: ".".join(map(str, p)))
def test_every_field_is_needed_and_typed(path):
    """Deleting a field, or giving it another type, is refused; list items may go only where the whole stays sound."""

    def drop(at, key):
        del at[key]

    in_list = isinstance(path[-1], int)
    for wrong in (drop, *(lambda at, key, v=v: at.__setitem__(key, v) for v in ({"x": 1}, True, "\x00", [[[]]]))):
        text = put(path, wrong)
        try:
            loaded = profiles.from_json(text, "f")
        except ProfileError as error:
            assert str(error).startswith("f: ") and "\n" not in str(error)
        else:  # a shorter list of notes or windows may still be a sound profile; it must then say what the text says
            config_or_list = in_list or "config" in path or isinstance(json.loads(text), dict)
            assert config_or_list and json.loads(profiles.to_json(loaded)) == json.loads(text)


@pytest.mark.parametrize(("path", "value", "said"), [
    (("rows", 0, "tuned", "p50_ms"), -1.0, "want 0 < p20"), (("rows", 0, "tuned", "p50_ms"), 1e999, "Infinity"),
    (("rows", 0, "kernel"), "cuda", "want one of cpu, triton"), (("rows", 0, "config"), {"score_elements": 0}, "2**30"),
    (("rows", 0, "config"), {"os.system": 1}, "want exactly"), (("rows", 0, "speedup", "low"), 9.0, "low <= median"),
    (("rows", 0, "scale_index"), 4, "want [5, 6]"), (("schema",), 2, "upgrade"), (("schema",), 0, "want 1"),
    (("policy", "rules", 0, "variant", "kind"), "magic", "kind"), (("policy", "heads"), ["ABC"], "class letters"),
    (("policy", "rules", 0, "variant", "tile"), "8x", "tile"), (("policy", "rules", 0, "variant", "top_k"), 2.0, "top_k"),
    (("evidence", "psnr_lower_db"), 30.0, "do not reach"), (("evidence",), None, "exactly when"),
    (("generation",), None, "exactly when"), (("workload", "grids"), [[0, 1]], "grids"),
    (("state",), "predicted", "exactly when"),
    (("workload", "heads"), 4, "class letters"), (("preset",), "best", "preset"),
    (("workload", "extra"), 1, "workload.extra: unknown"),
    (("notes", 0), "x" * 501, "notes[0]"), (("rows", 0, "tuned", "n"), 0, "want >= 1"), (("seed",), 1 << 70, "seed"),
])  # fmt: skip
def test_wrong_values_are_named(path, value, said):
    with pytest.raises(ProfileError) as caught:
        profiles.from_json(put(path, lambda at, key: at.__setitem__(key, value)), "f.json")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(0, len(TEXT) - 2, 37))
def test_cut_files_are_refused(cut):
    with pytest.raises(ProfileError):
        profiles.from_json(TEXT[:cut], "f")


def test_random_byte_flips_never_crash():
    rng, raw = random.Random(0), TEXT.encode()
    for _ in range(1500):
        broken = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            broken[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            loaded = profiles.from_json(broken.decode("utf-8"), "f")
        except (ProfileError, UnicodeDecodeError):
            continue
        assert loaded.why_not() is None and profiles.from_json(profiles.to_json(loaded), "f") == loaded


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@given(st.sampled_from(FIELDS), json_values)
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere_is_refused_or_kept(path, value):
    text = put(path, lambda at, key: at.__setitem__(key, value))
    try:
        loaded = profiles.from_json(text, "f")
    except ProfileError:
        return
    again = json.loads(profiles.to_json(loaded))
    for step in path:
        again = again[step]
    assert again == pytest.approx(value, rel=1e-5) if isinstance(value, float) else again == value


def test_unreadable_files(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ProfileError, match="No such file"):
        profiles.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ProfileError, match="not UTF-8"):
        profiles.load(path)
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ProfileError, match="over 1048576 bytes"):
        profiles.load(path)
    for text, said in (
        ("[" * 100_000, "nested"),
        ('{"schema": 1, "schema": 1}', "twice"),
        ('{"a": NaN}', "NaN"),
        ("[]", "want an object"),
    ):
        path.write_text(text)
        with pytest.raises(ProfileError, match=said):
            profiles.load(path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "p.json"
    profiles.save(example(), path)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ProfileError, match="No space left on device"):
        profiles.save(dataclasses.replace(example(), seed=1), path)
    monkeypatch.undo()
    assert profiles.load(path) == example() and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be written"):
        profiles.save(example(), tmp_path / "file" / "p.json")


def test_unsound_profiles_are_not_written(tmp_path):
    with pytest.raises(ProfileError, match="not written"):
        profiles.save(dataclasses.replace(example(), evidence=None), tmp_path / "p.json")
    assert not (tmp_path / "p.json").exists()


def test_lookup_exact_then_family_then_miss(tmp_path):
    relatives = tuple(g for g in GPUS.values() if g.family == "hopper" and g.slug != "h200")
    h200 = find_gpu("h200")
    found = profiles.find("m.json", h200, relatives, (tmp_path,))
    assert isinstance(found, profiles.Miss) and "h200" in found.reason and str(tmp_path) in found.reason
    profiles.save(example(), tmp_path / "h100-sxm" / "m.json")
    found = profiles.find("m.json", h200, relatives, (tmp_path,))
    assert isinstance(found, profiles.Match) and not found.exact and "h100-sxm for h200" in found.reason
    profiles.save(example(), tmp_path / "h200" / "m.json")
    found = profiles.find("m.json", h200, relatives, (tmp_path,))
    assert isinstance(found, profiles.Match) and found.exact


def test_names():
    default = ("1M", "1.000")
    assert profiles.profile_name("m", "near-lossless", *default, default) == "m.json"
    assert profiles.profile_name("m", "paper", "1M", "1.250", default) == "m--1M--1.250--paper.json"
