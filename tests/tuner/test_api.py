"""Tuning, trials, explanations and captures from Python: the same as the command, and tables of what was found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from places import ROOT

import sparvar_tune
from sparvar_tune.catalog import gpus
from sparvar_tune.catalog.models import find_model
from sparvar_tune.catalog.names import PRESETS
from sparvar_tune.cli import parser
from sparvar_tune.cli.compare_table import comparison, last_common, pair_frame
from sparvar_tune.launch_search.log import read_log, to_frame
from sparvar_tune.live.pocketvar import YARDSTICKS, PocketAdapter
from sparvar_tune.measure.pairs import held_out_pairs
from sparvar_tune.policy_search import certify
from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.trial import Verdict
from sparvar_tune.profile import machine, schema, store
from sparvar_tune.ways import search_here, subject
from sparvar_tune.ways.choose_way import choose_way
from sparvar_tune.ways.settings import Settings, seconds
from sparvar_tune.ways.subject import Subject


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    tiny.install(monkeypatch.setattr)
    torch.set_num_threads(1)  # on a busy machine two wait for one another longer than the tiny model takes
    return home


def test_python_and_the_command_predict_the_same_profile(home, tmp_path, capsys):
    said: list[str] = []
    profile = sparvar_tune.tune("hart", gpu="a100", out=tmp_path / "python", progress=said.append)
    assert parser.main(["--gpu", "a100", "--model", "hart", "--out", str(tmp_path / "command")]) == 0
    out = capsys.readouterr().out
    files = [tmp_path / way / "a100-80" / "hart.json" for way in ("python", "command")]
    assert files[0].read_bytes() == files[1].read_bytes() and store.load(files[0]) == profile
    assert profile.state == "predicted" and all(line in out for line in "\n".join(said).splitlines())
    sparvar_tune.tune("hart", gpu="a100", out=str(tmp_path / "silent"))
    assert capsys.readouterr() == ("", "")


def test_both_ask_the_search_for_the_same(tiny_model, monkeypatch, tmp_path):
    asked: list[search_here.Request] = []

    def stop(request, *_args, **_kwargs):
        asked.append(request)
        raise search_here.NothingMeetsTheBound("stopped here")

    monkeypatch.setattr(search_here, "tune", stop)
    with pytest.raises(ValueError, match="stopped here"):
        sparvar_tune.tune(
            "pocketvar", gpu="cpu", quality="fast", bounds={"psnr": 31}, budget="3m", pairs=20, seed=5, out=tmp_path
        )
    words = ["--gpu", "cpu", "--model", "pocketvar", "--quality", "fast", "--min-psnr", "31", "--budget", "3m", "--pairs", "20"]
    assert parser.main([*words, "--seed", "5", "--out", str(tmp_path)]) == 2
    assert asked[0] == asked[1] and asked[0].budget_s == 180 and asked[0].preset == "custom"


@pytest.mark.parametrize(("words", "said"), [
    ({"model": "hrt"}, "nearest: hart"), ({"gpu": "h10"}, "nearest: h100"), ({"quality": "best"}, "quality"),
    ({"pairs": 1}, "2..10000"), ({"pairs": True}, "whole number"), ({"budget": float("nan")}, "want a time"),
    ({"budget": "soon"}, "want a time"), ({"seed": -1}, "seed"), ({"bounds": {"psnr": float("inf")}}, "0..200 dB"),
    ({"bounds": {"ssim": "0.9"}}, "0..1"), ({"mode": "fast"}, "eager"), ({"workers": 0}, "workers"), ({"images": 0}, "1..256"),
    ({"bounds": {"snr": 1}}, "nearest: psnr"), ({"images": 4}, "one image at a time"), ({"aspect": "2"}, "aspect"),
    ({"budget": None}, "'None': want a time"), ({"budget": True}, "want a time"), ({"resume": "no"}, "got 'no', want True"),
    ({"search": 1}, "search: got 1, want True"), ({"out": 3}, "out: got 3, want a path"), ({"out": ""}, "out: got '', want"),
    ({"log": b"x"}, "log: got b'x'"), ({"merge": 5}, "merge: got 5, want a path"), ({"merge": [None]}, "merge: got None"),
    ({"storage": 5}, "storage: got 5, want a URL"), ({"progress": "print"}, "progress: got 'print', want a function"),
    ({"bounds": 34.5}, "bounds: got 34.5, want one by metric"), ({"name": "mine"}, "name: got 'mine' without generate"),
    ({"gpu": ["h100"]}, "unknown"), ({"resolution": ""}, 'resolution "": unknown'), ({"model": "pocket\x1b[2Jvar"}, "x1b[2J"),
])  # fmt: skip
def test_wrong_values_are_refused_at_the_door(home, words, said):
    with pytest.raises(ValueError) as refused:
        sparvar_tune.tune(**{"model": "pocketvar", "gpu": "cpu", **words})
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not home.exists()


def test_times_are_read_as_people_write_them():
    assert [seconds(t) for t in (90, "90", "90s", "1.5m", " 1h ", 0.5)] == [90, 90, 90, 90, 3600, 0.5]
    for wrong in (0, -1, "0s", "1d", "1e9", "", 1e12, float("inf")):
        with pytest.raises(ValueError, match="want a time"):
            seconds(wrong)


def test_settings_hide_a_password():
    assert "hunter2" not in repr(Settings(storage="postgresql://u:hunter2@host/x"))


def test_a_profile_is_a_table():
    profile = store.load(store.shipped_folder() / "cpu" / "pocketvar.json")
    frame = profile.to_frame()
    assert list(frame.index) == [row.scale_index for row in profile.rows]
    row, last = profile.rows[-1], frame.iloc[-1]
    assert (last.dense_ms, last.tuned_ms, last.low, last.high) == (
        row.dense.p50_ms, row.tuned.p50_ms, row.speedup.low, row.speedup.high
    )  # fmt: skip
    assert all(last[name] == value for name, value in row.config)
    guess = store.load(store.shipped_folder() / "a100-80" / "hart.json")
    frame = guess.to_frame()
    assert frame.speedup.isna().all() and frame.tuned_ms.iloc[0] == guess.rows[0].tuned_predicted_ms


def test_trials_are_a_table(tiny_model):
    with pytest.raises(ValueError, match="no trials of pocketvar"):
        sparvar_tune.trials("pocketvar", gpu="cpu")
    folder = Subject.of("pocketvar", "cpu").run_folder()
    folder.mkdir(parents=True)
    study = search.open_study(folder, "space", 0, False)
    verdict = Verdict(10.0, -0.5, {"psnr": 36.0, "ssim": 0.97}, True)
    search.search(study, lambda knobs: verdict, lambda: len(search.finished(study)) >= 3, lambda found: None)
    frame = sparvar_tune.trials("pocketvar", gpu="cpu")
    assert len(frame) == 3 and (frame.time_ratio == 10).all() and frame.form[0] == "paper" and frame.front.sum() == 1


def test_measurements_are_a_table():
    file = sorted((ROOT / "reports" / "h100-sxm").glob("*.jsonl"))[0]
    lines = read_log(file)
    frame = to_frame(lines)
    assert len(frame) == len(lines) and set(frame.kind) <= {"binary", "times", "failure"}
    times = frame[frame.kind == "times"]
    assert len(times) and (times.tuned_ms > 0).all() and frame.registers.max() > 0
    assert to_frame([]).empty


def test_the_shipped_comparison_comes_out_of_its_raw_numbers():
    report = ROOT / "reports" / "cpu" / "pocketvar.md"
    raw = json.loads(report.with_suffix(".json").read_text())
    outcomes = {
        way: [certify.Outcome(o["ms"], {int(s): ms for s, ms in o["scales_ms"].items()}, o["fidelity"])
              for o in raw["outcomes"][way]]
        for way in ("dense", "paper's fixed setting", *(f"tuned, {quality}" for quality in PRESETS))
    }  # fmt: skip
    pairs = held_out_pairs(10, len(outcomes["dense"]))
    model = find_model("pocketvar")
    adapter = types.SimpleNamespace(
        model=model, schedule=model.schedule(), dense_name="torch scaled_dot_product_attention",
        yardsticks=lambda: PocketAdapter.yardsticks(types.SimpleNamespace(
            _yardstick_rows=lambda: json.loads(YARDSTICKS.read_text())["rows"])),
    )  # fmt: skip
    text, kept = comparison(
        outcomes, pairs, adapter, (), schema.Silicon(**raw["machine"]), schema.Versions(**raw["versions"])
    )  # fmt: skip
    tables = [[line for line in t.splitlines() if line.startswith("|")] for t in (text, report.read_text())]
    assert tables[0] == tables[1] and "32 held-out" in text
    assert json.loads(kept)["pairs"] == [list(pair) for pair in pairs]
    # "fast" leaves the last scale out, so it has no attention there
    assert last_common(outcomes) == 11 and "The last scale is 11, 48x48, the last that every way draws." in text
    frame = pair_frame(outcomes, pairs, 8, 11)
    assert len(frame) == 5 * 32 and frame[frame.way == "dense"].psnr.eq(100).all()
    del outcomes["tuned, fast"]
    text, _ = comparison(
        outcomes, pairs, adapter, (), schema.Silicon(**raw["machine"]), schema.Versions(**raw["versions"])
    )  # fmt: skip
    assert "The last scale is 12, 64x64.\n" in text


@pytest.mark.filterwarnings("ignore:.*unverified")
def test_a_gpu_in_no_row_is_lent_profiles_and_gets_none(home, monkeypatch):
    """As `load_profile` does; there is no name its own profile could have."""
    own = dataclasses.replace(gpus.GPUS["h100-sxm"], slug=gpus.UNLISTED, name="NVIDIA H100 NVL", sms=130)
    for module in (gpus, machine, subject):
        monkeypatch.setattr(module, "device_row", lambda device=None: own)
    assert Subject.of("hart").gpu == own
    for call in (lambda: sparvar_tune.tune("hart"), lambda: choose_way(Subject.of("hart"), Settings())):
        with pytest.raises(ValueError, match=r"Add a row there"):
            call()


def test_what_runs_here_is_said_as_the_command_says_it(home, capsys):
    text = sparvar_tune.explain("pocketvar", gpu="cpu")
    assert parser.main(["explain", "--gpu", "cpu", "--model", "pocketvar"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == text


def test_a_capture_holds_what_attention_was_given(tiny_model):
    calls = sparvar_tune.capture("pocketvar", (3, 7), scales=(4, 6))
    assert set(calls) == {(layer, s) for layer in (0, 1) for s in (4, 6)}
    q, k, v = calls[1, 6]
    assert q.shape == (1, 2, 256, 32) and k.shape == v.shape == (1, 2, sum(n * n for n in tiny.SIDES), 32)
    again = sparvar_tune.capture("pocketvar", (3, 7))
    assert set(again) == {(layer, s) for layer in (0, 1) for s in (5, 6)} and torch.equal(again[1, 6][0], q)
    for wrong in ((), (7,), (-1,), 3, ("0",), torch.tensor([0.5])):
        with pytest.raises(ValueError, match=r"want some of 0\.\.6"):
            sparvar_tune.capture("pocketvar", scales=wrong)
    for wrong in (None, 3, (0,), (10, 0), ("cat", 0), (0, -1), (0, 2**62), (True, 0)):
        with pytest.raises(ValueError, match=r"^pair: "):
            sparvar_tune.capture("pocketvar", wrong)
    with pytest.raises(ValueError, match="model: got a int without"):
        sparvar_tune.capture(3)
    with pytest.raises(ValueError, match="no adapter"):
        sparvar_tune.capture("hart")


@pytest.mark.slow
def test_the_face_is_light_and_whole():
    code = "import sys, sparvar_tune as s; print('torch' in sys.modules, [n for n in s.__all__ if not hasattr(s, n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]"]
    with pytest.raises(AttributeError, match="no attribute 'tunee'"):
        _ = sparvar_tune.tunee
