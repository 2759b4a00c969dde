"""The profile file: round trips, and every kind of damage is refused with one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import random
import re
import tempfile
from pathlib import Path

import pytest
from examples import HUGE, changed, example, fails, paths_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparvar_kernels import Cs4a, Csla, Policy, Pooled, Reuse, Rule, SparseAttention, Tile
from sparvar_tune.profile import reader, schema, store
from sparvar_tune.profile.schema import ProfileError

TEXT = schema.to_json(example())


def test_round_trip(tmp_path):
    path = tmp_path / "cpu" / "pocketvar.json"
    store.save(example(), path)
    assert store.load(path) == example()
    assert path.read_text() == TEXT
    store.save(store.load(path), path)
    assert path.read_text() == TEXT
    assert [p.name for p in path.parent.iterdir()] == ["pocketvar.json"]


FIELDS = [p for p in paths_of(json.loads(TEXT)) if p and p != ("checksum",)]


def put(path, change):
    """TEXT with one change that is sealed, as by `show --seal`, so that the check of its field is what refuses it."""
    data = json.loads(TEXT)
    at = data
    for step in path[:-1]:
        at = at[step]
    change(at, path[-1])
    return sealed(data)


def sealed(data):
    with contextlib.suppress(ValueError):  # NaN has no seal
        data["checksum"] = reader.checksum(data)
    return json.dumps(data)


def values(text):
    return {name: value for name, value in json.loads(text).items() if name != "checksum"}


WRONG = ({"x": 1}, True, "\x00", [[[]]], None, "x", -1, -1.5, HUGE, 1e300, float("nan"), float("inf"))


@pytest.mark.parametrize("path", FIELDS, ids=lambda p: ".".join(map(str, p)))
def test_every_field_is_needed_and_typed(path):
    """Without a field, with one too many, or with another value: refused in one line, or it means what the text says."""

    def drop(at, key):
        del at[key]

    def add(at, key):
        at[key] = {**at[key], "surplus": 1} if isinstance(at[key], dict) else [at[key], at[key]]

    for wrong in (drop, add, *(lambda at, key, v=v: at.__setitem__(key, v) for v in WRONG)):
        text = put(path, wrong)
        try:
            loaded = schema.from_json(text, "f")
        except ProfileError as error:
            assert str(error).startswith("f: ") and "\n" not in str(error) and len(str(error)) < 500
            continue
        # a field of an object is never dispensable; a shorter list of notes or windows may still make a sound profile, and so
        # may one without the meaning of what it does not use
        assert wrong is not drop or isinstance(path[-1], int) or "meaning" in path or path[:-1] == ("evidence", "metrics")
        assert values(schema.to_json(loaded)) == values(text)


@pytest.mark.parametrize(("path", "value", "said"), [
    (("rows", 0, "tuned", "p50_ms"), -1.0, "want 0 < p20"), (("rows", 0, "tuned", "p50_ms"), 1e999, "Infinity"),
    (("rows", 0, "kernel"), "cuda", "want one of cpu, triton"), (("rows", 0, "config"), {"score_elements": 0}, "ments=0"),
    (("rows", 0, "config"), {"os.system": 1}, "want exactly"), (("rows", 0, "speedup", "low"), 9.0, "low <= median"),
    (("rows", 0, "scale_index"), 4, "want [5, 6]"), (("schema",), 4, "upgrade"), (("schema",), 1, "tune again"),
    (("meaning", "cs4a"), 0, "want numbers"),
    (("rows", 0, "mode"), "lazy", "want one of eager, graph"),
    (("policy", "rules", 0, "variant", "kind"), "magic", "kind"), (("policy", "heads"), ["ABC"], "class letters"),
    (("policy", "rules", 0, "variant", "tile"), "8x", "tile"), (("policy", "rules", 0, "variant", "top_k"), 2.0, "top_k"),
    (("evidence", "metrics", "psnr", "bound"), 30.0, "does not reach"), (("evidence",), None, "exactly when"),
    (("generation",), None, "exactly when"), (("workload", "grids"), [[0, 1]], "grids"),
    (("state",), "predicted", "exactly when"),
    (("workload", "heads"), 4, "class letters"), (("preset",), "best", "preset"),
    (("workload", "extra"), 1, "workload.extra: unknown"),
    (("notes", 0), "x" * 501, "notes[0]"), (("rows", 0, "tuned", "n"), 0, "want >= 1"), (("seed",), 1 << 70, "seed"),
    (("created",), "20261123", "want a date"), (("kernel_hash",), "EF" * 32, "64 hexadecimal"), (("trials",), -1, "trials"),
    (("workload", "weights_sha256"), "cd", "64 hexadecimal"), (("evidence", "data_hash"), "", "64 hexadecimal"),
    (("evidence", "yardsticks", 0, "ssim"), 1.5, "evidence.yardsticks[0]"),
    (("evidence", "metrics", "ms_ssim", "mean"), 2.0, "metrics.ms_ssim: mean"),
    (("silicon", "threads"), 0, "silicon: threads"), (("silicon", "family"), "ada", "want 'cpu' for cpu"),
    (("silicon", "capability"), [9], "want 2"), (("policy", "rules", 0, "variant", "sample"), 1 << 40, "rules[0].variant"),
    (("policy", "rules", 0, "variant", "tile"), "8x99999999999", "rules[0].variant"),
    (("workload", "head_dim"), 1025, "head_dim"),
    (("evidence", "metrics", "psnr", "required"), -1.0, "metrics.psnr: required"),
    (("evidence", "metrics", "ssim", "bound"), 0.98, "closer to dense than the mean"),
    (("evidence", "metrics"), {}, "at least"),
    (("evidence", "metrics", "ssim", "bound"), None, "does not reach"), (("evidence", "metrics", "psnr"), 35.0, "want an object"),
    (("workload", "layers"), "2", "want an integer"),
])  # fmt: skip
def test_wrong_values_are_named(path, value, said):
    with pytest.raises(ProfileError) as caught:
        schema.from_json(put(path, lambda at, key: at.__setitem__(key, value)), "f.json")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_illegal_launches_are_refused():
    """What the registry would refuse at the first attention call is refused when the file is read."""
    data = json.loads(TEXT)
    config = {"block_m": 64, "block_n": 64, "num_stages": 3, "num_warps": 4, "maxnreg": 0}
    for row in data["rows"]:
        row.update(kernel="triton", config=config)
    assert schema.from_json(sealed(data), "f").rows[0].kernel == "triton"
    data["rows"][1]["config"] = {**config, "block_n": 3}
    with pytest.raises(ProfileError, match=r"rows\[1\]: block_n=3: want 16"):
        schema.from_json(json.dumps(data), "f")
    data["rows"][1]["config"] = {**config, "fetchers": 4}
    with pytest.raises(ProfileError, match=r"rows\[1\]: fetchers=4: wants a Hopper GPU"):
        schema.from_json(json.dumps(data), "f")
    data["rows"][1]["config"] = {name: value for name, value in config.items() if name != "maxnreg"}
    with pytest.raises(ProfileError, match="want exactly"):  # a file of before may lack `fetchers` (as above), nothing else
        schema.from_json(json.dumps(data), "f")
    data["rows"][1]["config"] = config
    data["silicon"].update(gpu="v100", family="volta", capability=[7, 0])
    with pytest.raises(ProfileError, match="capability 7"):
        schema.from_json(json.dumps(data), "f")


def test_messages_are_short_and_printable():
    """Text from a damaged file cannot flood or steer a terminal."""
    for variant in ({"kind": "dense", "a\nb\x1b[31m": 1}, {"kind": "x" * 100_000}, {"kind": "csla", "\u202e": 1}):
        with pytest.raises(ProfileError) as caught:
            schema.from_json(put(("policy", "rules", 0, "variant"), lambda at, key, v=variant: at.__setitem__(key, v)), "f")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("cut", range(0, len(TEXT) - 2, 37))
def test_cut_files_are_refused(cut):
    with pytest.raises(ProfileError):
        schema.from_json(TEXT[:cut], "f")


def test_random_byte_flips_never_crash_or_change_what_is_meant():
    """SPARVAR_SOAK sets how many; a flipped digit mostly makes another sound profile, which the checksum tells from this one."""
    rng, raw = random.Random(0), TEXT.encode()
    for _ in range(int(os.environ.get("SPARVAR_SOAK", "1500"))):
        broken = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            broken[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            loaded = schema.from_json(broken.decode("utf-8"), "f")
        except (ProfileError, UnicodeDecodeError):
            continue
        assert loaded == example()


@pytest.mark.slow
def test_every_flipped_digit_is_refused():
    for at, character in enumerate(TEXT):
        if character.isdigit():
            with pytest.raises(ProfileError):
                schema.from_json(TEXT[:at] + str((int(character) + 1) % 10) + TEXT[at + 1 :], "f")


def test_what_changes_no_value_is_no_edit():
    data = json.loads(TEXT)
    for text in (json.dumps(data), json.dumps(dict(reversed(data.items())), indent=7), TEXT.replace("1000000.0", "1e6") + "\n\n"):
        assert schema.from_json(text, "f") == example()


@pytest.mark.parametrize(("path", "value"), [
    (("trials",), 13), (("rows", 0, "speedup", "low"), 2.95), (("notes",), []),
    (("policy", "heads"), ["BBC", "BBA"]), (("rows", 0, "mode"), "graph"), (("generation", "dense_name"), "sdpa "),
    (("workload", "prefix"), False), (("checksum",), None), (("checksum",), "ab" * 32), (("checksum",), [1]),
    (("checksum",), "\x1b" * 5000),
])  # fmt: skip
def test_an_edit_is_refused_until_sealed(tmp_path, path, value):
    data = json.loads(TEXT)
    at = data
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    file = tmp_path / "p.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ProfileError) as caught:
        store.load(file)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 500
    if value is False:  # a wrong type stays wrong under any seal
        with pytest.raises(ProfileError, match="prefix"):
            store.seal(file)
        return
    assert "edited or damaged" in said and "--seal" in said
    assert store.seal(file) == store.load(file) and (path == ("checksum",)) == (store.load(file) == example())


def test_a_missing_checksum_is_named():
    data = json.loads(TEXT)
    del data["checksum"]
    with pytest.raises(ProfileError, match="checksum: missing"):
        schema.from_json(json.dumps(data), "f")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5,
)  # fmt: skip


@pytest.mark.slow
@given(st.sampled_from(FIELDS), json_values)
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere_is_refused_or_kept(path, value):
    text = put(path, lambda at, key: at.__setitem__(key, value))
    try:
        loaded = schema.from_json(text, "f")
    except ProfileError:
        return
    again = json.loads(schema.to_json(loaded))
    for step in path:
        again = again[step]
    number = isinstance(again, float) and isinstance(value, int | float) and not isinstance(value, bool)
    assert again == pytest.approx(value, rel=1e-5) if number else again == value


positive = st.floats(1e-6, 1e5)
sorted_3 = st.lists(positive, min_size=3, max_size=3).map(sorted)
timings = st.builds(lambda t, n: schema.Timing(*t, n), sorted_3, st.integers(1, 10**6))
speedups = st.builds(lambda t, n: schema.Speedup(t[1], t[0], t[2], n), sorted_3, st.integers(1, 10**6))
names = st.text(st.characters(categories=("L", "N", "P", "S")), max_size=40).filter(str.isprintable)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def sound_profiles(draw):
    """Profiles of a random shape, measured or predicted, with floats of more digits than a file keeps."""
    sides = draw(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=2, max_size=14))
    layers, heads, n = draw(st.integers(1, 4)), draw(st.integers(1, 4)), len(sides)
    letters = tuple(draw(st.text("AB", min_size=heads, max_size=heads)) for _ in range(layers))
    tiles = st.builds(Tile, st.integers(0, 32), st.integers(1, 32))
    decision = draw(st.integers(0, n - 2))
    variants = st.one_of(
        st.builds(Pooled, st.integers(0, decision), st.integers(2, 8)), st.just(Reuse(decision)),
        st.builds(Csla, st.tuples(*[st.integers(0, 9)] * n), st.integers(0, n), tiles, decision_scale=st.just(decision)),
        st.builds(Cs4a, st.just(decision), st.floats(1e-6, 1), tiles, residual=st.booleans(), sample=st.integers(1, 9)),
    )  # fmt: skip
    places = [(s, c) for s in range(decision + 1, n) for c in sorted(set("".join(letters)))]
    used = sorted(draw(st.sets(st.sampled_from(places))))
    policy = Policy(letters, tuple(Rule(s, c, draw(variants)) for s, c in used))
    measured, verified = draw(st.booleans()), draw(st.booleans())
    rows = []
    for s in sorted({s for s, _ in used}):
        config = (("score_elements", draw(st.integers(1, 1 << 30))),)
        if measured:
            rows.append(schema.Row(s, "cpu", config, "measured", draw(names), draw(timings), draw(timings), draw(speedups)))
        else:
            predicted = {"tuned_predicted_ms": draw(positive), "dense_predicted_ms": draw(positive)}
            rows.append(schema.Row(s, "cpu", config, "predicted", draw(names), **predicted))
    capability, optional = st.sampled_from((None, (9, 0))), st.none() | st.integers(1, 1 << 40)
    workload = schema.Workload(
        draw(names), draw(names), draw(names), tuple(sides), draw(st.integers(0, 999)), layers, heads,
        draw(st.sampled_from((16, 64, 128))), draw(st.sampled_from(("fp32", "bf16", "fp16"))), draw(st.integers(1, 8)),
        draw(positive), draw(st.none() | positive), draw(st.none() | hashes),
    )  # fmt: skip
    return dataclasses.replace(
        example(), policy=policy, workload=workload, rows=tuple(rows), notes=tuple(draw(st.lists(names, max_size=3))),
        state="measured" if measured else "predicted", policy_state="measured" if verified else "unverified",
        evidence=example().evidence if verified else None, kernel_hash=draw(hashes), seed=draw(st.integers(0, 1 << 62)),
        generation=schema.WholePicture(draw(names), draw(timings), draw(timings), draw(speedups))
        if measured and verified else None,
        silicon=schema.Silicon("own", "own", draw(names), draw(capability), *(draw(optional) for _ in range(3))),
    )  # fmt: skip


@pytest.mark.slow
@given(sound_profiles())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_sound_profile_round_trips(made):
    assert made.why_not() is None
    text = schema.to_json(made)
    loaded = schema.from_json(text, "f")
    assert schema.to_json(loaded) == text  # times lose digits once, then no more
    assert (loaded.policy, loaded.workload, loaded.silicon) == (made.policy, made.workload, made.silicon)
    for got, want in zip(loaded.rows, made.rows, strict=True):
        assert (got.scale_index, got.kernel, got.config, got.state) == (want.scale_index, want.kernel, want.config, want.state)
        for a, b in ((got.tuned, want.tuned), (got.dense, want.dense), (got.speedup, want.speedup)):
            assert (a is None) == (b is None)
            assert a is None or dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=1e-5)
    SparseAttention(loaded.policy, loaded.workload.schedule)  # what loads can be planned


def test_settings_keep_every_digit():
    """A softmax scale of 1/sqrt(128) cut to 6 digits would be another problem, and the runtime would go dense."""
    made = example()
    rules = (dataclasses.replace(made.policy.rules[0], variant=Cs4a(4, 1 / 3, Tile(8, 8))), *made.policy.rules[1:])
    made = dataclasses.replace(
        made, policy=dataclasses.replace(made.policy, rules=rules),
        workload=dataclasses.replace(made.workload, softmax_scale=128**-0.5, logit_bound=2**0.5 * 10),
    )  # fmt: skip
    loaded = schema.from_json(schema.to_json(made), "f")
    assert loaded == made and loaded.workload.softmax_scale == 128**-0.5


def test_unreadable_files(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ProfileError, match="No such file or directory; give the path of a profile"):
        store.load(path)
    with pytest.raises(ProfileError, match="Is a directory; give the path of a profile"):
        store.load(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ProfileError, match="not UTF-8"):
        store.load(path)
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ProfileError, match="over 1048576 bytes"):
        store.load(path)
    for text, said in (
        ("[" * 100_000, "nested"),
        (TEXT.replace('"confidence"', '"checksum": 1e999, "confidence"', 1), "unknown field"),
        (re.sub('"checksum": "[0-9a-f]*"', '"checksum": 1e999', TEXT), "edited or damaged"),
        ('{"schema": 1, "schema": 1}', "twice"),
        ('{"a": NaN}', "NaN"),
        (TEXT.replace('"trials": 12', '"trials": 1e999'), "trials"),
        (TEXT.replace('"confidence": 0.95', '"confidence": 1e999'), "confidence: got inf"),
        (TEXT.replace('"trials": 12', f'"trials": {"9" * 5000}'), "digits"),
        (TEXT + "{}", "Extra data"),
        ("\ufeff" + TEXT, "BOM"),
        ("", "Expecting value"),
        ("[]", "want an object"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(ProfileError, match=said):
            store.load(path)
    with pytest.raises(ProfileError, match="Is a directory"):
        store.load(tmp_path)


class FullFile(io.FileIO):
    """A file on a disk with room for ten bytes."""

    def write(self, data):
        super().write(bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(("module", "call", "with_"), [
    (os, "replace", fails(FULL)), (os, "fsync", fails(FULL)), (os, "fdopen", lambda handle, _mode: FullFile(handle, "wb")),
    (tempfile, "mkstemp", fails(READ_ONLY)), (os, "replace", fails(KeyboardInterrupt())),
    (os, "fsync", fails(KeyboardInterrupt())),
], ids=["replace", "fsync", "write", "read-only", "interrupted-replace", "interrupted-fsync"])  # fmt: skip
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, module, call, with_):
    path = tmp_path / "p.json"
    store.save(example(), path)
    with monkeypatch.context() as patch:
        patch.setattr(module, call, with_)
        with pytest.raises((ProfileError, KeyboardInterrupt)) as caught:
            store.save(dataclasses.replace(example(), seed=1), path)
    if caught.type is ProfileError:
        assert re.search(r"p\.json: cannot be written \((No space left on device|Permission denied)\)", str(caught.value))
    assert store.load(path) == example() and [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be written"):
        store.save(example(), tmp_path / "file" / "p.json")
    (tmp_path / "p.json").mkdir()
    with pytest.raises(ProfileError, match=r"p\.json: is a folder"):
        store.save(example(), tmp_path / "p.json")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "p.json"}


def test_a_device_or_pipe_is_never_replaced_by_a_file(tmp_path):
    """As root a rename onto /dev/null would leave a file there for every program of the machine."""
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda p: store.write_atomic(p, b"x"), store.require_writable):
        with pytest.raises(ProfileError, match="pipe: no plain file"):
            write(tmp_path / "pipe")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_link_stays_one(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept" / "file")
    for data in (b"first", b"second"):
        store.write_atomic(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "kept" / "file").read_bytes() == data
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ProfileError, match="loop: cannot be written"):
        store.write_atomic(tmp_path / "loop", b"x")


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "astray").symlink_to(tmp_path / "file" / "p")
    store.require_writable(tmp_path / "file", tmp_path / "new" / "p.json")
    wrong = {"folder": "folder: is a folder", "file/p": "file/p: cannot be written", "astray": "astray: cannot be written",
             "x" * 300: "(File name too long)"}  # fmt: skip
    for name, said in wrong.items():
        with pytest.raises(ProfileError, match=re.escape(said)):
            store.require_writable(tmp_path / "file", tmp_path / name)
    assert {p.name for p in tmp_path.rglob("*")} == {"file", "folder", "astray"}


@pytest.mark.parametrize(("made", "said"), [
    (dataclasses.replace(example(), evidence=None), "evidence: want it exactly"),
    (dataclasses.replace(example(), notes=("x" * 501,)), "notes[0]: got"),
    (dataclasses.replace(example(), notes=("\ud800",)), "notes[0]: got"),
    (dataclasses.replace(example(), notes=("y" * 500,) * 2500), "bytes, want at most 1048576"),
    (dataclasses.replace(example(), schema=1), "schema: got 1"),
    (changed("generation", dense=schema.Timing(1.0, math.nan, 2.0, 3)), "generation.dense.p50_ms: got nan"),
    (changed("generation", dense=schema.Timing(3.0, 2.0, 1.0, 3)), "generation.dense: got p20 3.0"),
    (changed("evidence", confidence=0.99999999), "confidence: got 1.0"),  # six digits would make it a certainty
], ids=range(8))  # fmt: skip
def test_what_would_not_load_is_not_written(tmp_path, made, said):
    with pytest.raises(ProfileError) as caught:
        store.save(made, tmp_path / "p.json")
    assert "p.json: not written: " in str(caught.value) and said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_measured_profile_holds_no_predicted_row():
    made = example()
    measured = made.rows[-1]
    guessed = dataclasses.replace(
        measured, state="predicted", tuned=None, dense=None, speedup=None, tuned_predicted_ms=1.0, dense_predicted_ms=2.0
    )
    assert guessed.why_not() is None
    reason = dataclasses.replace(made, rows=(*made.rows[:-1], guessed)).why_not()
    assert reason == "rows: every row must be 'measured' like the profile"


def test_a_place_through_a_folder_that_is_not_there_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.require_writable(Path("no n/../x.jpg"))
    assert list(tmp_path.iterdir()) == []
