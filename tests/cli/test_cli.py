"""The command line with the tiny model: the whole way to a profile and a picture, and every bad input as one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command_line import refused, run
from PIL import Image
from places import PYTHONPATH, ROOT

from sparvar_tune import runtime
from sparvar_tune.cli import parser
from sparvar_tune.live.pocketvar import PocketAdapter
from sparvar_tune.policy_search import storage
from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.trial import Verdict
from sparvar_tune.profile import misses, overlay, schema, store
from sparvar_tune.ways import predict, search_here
from sparvar_tune.ways.subject import Subject

POCKETVAR = ROOT / "profiles" / "cpu" / "pocketvar.json"
TUNE = ["--gpu", "cpu", "--model", "pocketvar", "--budget", "1h", "--pairs", "12"]


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    tiny.install(monkeypatch.setattr)
    torch.set_num_threads(1)  # on a busy machine two wait for one another longer than the tiny model takes
    return home


@pytest.fixture
def never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model sparse attention is no faster than dense; let every timed pair say it is, to reach the end."""
    from sparvar_tune.policy_search import certify

    measured = certify.compare_on

    def faster(*args, **kwargs):
        trial = measured(*args, **kwargs)
        trial.tuned_ms = [ms / 2 for ms in trial.dense_ms]
        trial.tuned_scales = [{s: ms / 2 for s, ms in spent.items()} for spent in trial.dense_scales]
        return trial

    monkeypatch.setattr(certify, "compare_on", faster)
    monkeypatch.setattr(search_here, "compare_on", faster)
    measured_options = search_here.measure_options

    def dear_dense(*args):
        table = measured_options(*args)
        for times in table.time_ms.values():
            times["dense"] = 1000.0
        return table

    monkeypatch.setattr(search_here, "measure_options", dear_dense)


@pytest.mark.slow
def test_tune_then_use(tiny_model, never_slower, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(PocketAdapter, "steps", ())  # so that what wins has rows
    tiny.stop_after(5, monkeypatch.setattr)
    code, out, err = run(capsys, *TUNE, "--min-psnr", "40", "--min-ssim", "0.9")
    assert code == 0, (out, err)
    path = tiny_model / "profiles" / "cpu" / "pocketvar--custom.json"
    profile = store.load(path)
    assert profile.evidence.n == 12 and profile.evidence.of("psnr").bound >= 40 and profile.state == "measured"
    assert "whole picture" in out and "certifying trial" in out
    code, out, _ = run(capsys, "show", "--profile", str(path))
    assert code == 0 and "held-out pairs" in out
    code, out, _ = run(capsys, "explain", "--model", "pocketvar", "--gpu", "cpu", "--profile", str(path))
    assert code == 0 and "file given" in out and f"scale {profile.rows[0].scale_index}" in out
    png = tmp_path / "two.png"
    code, out, _ = run(
        capsys, "generate", "--model", "pocketvar", "--gpu", "cpu", "--profile", str(path), "--out", str(png), "--class", "3"
    )
    assert code == 0 and "PSNR" in out and Image.open(png).size[0] > 300
    assert "other silicon" in refused(capsys, "explain", "--model", "pocketvar", "--gpu", "h200", "--profile", str(path))
    assert "for model pocketvar" in refused(capsys, "explain", "--model", "hart", "--gpu", "cpu", "--profile", str(path))
    code, out, _ = run(capsys, "verify", "--model", "pocketvar", "--gpu", "cpu", "--profile", str(path), "--pairs", "4")
    assert code in (0, 1) and "pictures: ok" in out and "verified in" in out
    assert overlay.find("cpu", path.name).profile_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 3'))
    assert "show --profile FILE --seal" in refused(capsys, "show", "--profile", str(path))
    code, out, _ = run(capsys, "show", "--profile", str(path), "--seal")
    assert code == 0 and "sealed" in out and store.load(path).seed == 3


@pytest.mark.slow
def test_a_bound_nothing_meets_writes_nothing(tiny_model, capsys, tmp_path, monkeypatch):
    tiny.stop_after(3, monkeypatch.setattr)
    said = refused(capsys, *TUNE, "--min-psnr", "99", "--out", str(tmp_path / "out"), after_work=True)
    assert "the best reached" in said and "nothing written" in said
    assert not list((tmp_path / "out").rglob("*.json"))


def test_dry_run_only_talks(tiny_model, capsys, tmp_path):
    code, out, _ = run(capsys, *TUNE, "--dry-run", "--out", str(tmp_path / "out"))
    assert code == 0 and "scale 5: dense" in out and "cs4a" in out and "plan:" in out
    assert not (tmp_path / "out").exists() and not tiny_model.exists()


@pytest.mark.parametrize("asked", [TUNE, ["--gpu", "a100", "--model", "hart"]], ids=["search", "predict"])
def test_a_dry_run_refuses_a_place_as_the_run_does(tiny_model, capsys, tmp_path, asked):
    (tmp_path / "file").write_text("")
    lines = {refused(capsys, *asked, "--out", str(tmp_path / "file"), *more, after_work=True) for more in ([], ["--dry-run"])}
    assert len(lines) == 1 and "cannot be written (Not a directory)" in lines.pop()
    assert [path.name for path in tmp_path.iterdir() if path != tiny_model] == ["file"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_folder_for_trials_that_cannot_be_made_is_refused_before_any_work(capsys, tmp_path, monkeypatch, more):
    tiny.install(monkeypatch.setattr)
    monkeypatch.setattr(search_here, "measure_options", lambda *_: pytest.fail("work began"))
    monkeypatch.setenv("SPARVAR_TUNE_HOME", "/proc/x")
    said = refused(capsys, *TUNE, "--out", str(tmp_path / "out"), *more, after_work=True)
    assert "/proc/x/runs/cpu--pocketvar: cannot keep trials here" in said and "SPARVAR_TUNE_HOME" in said
    code, out, _ = run(capsys, *TUNE, "--out", str(tmp_path / "out"), "--dry-run", "--storage", f"sqlite:///{tmp_path}/x.db")
    assert code == 0 and "x.db" in out, "with a storage a CPU keeps nothing there"


@pytest.mark.parametrize("command, wrong, want", [
    ("compare", ("x.pdf", "table.json", "x."), ".md or .markdown"), ("generate", ("x.jpg", "x.png.", ".jpg"), ".png"),
    ("capture", ("x.npz", "x.txt"), ".safetensors"), ("report", ("x.", "x.pdf", ".hidden"), ".html or .htm or .md or .markdown"),
    ("generate", (".png", ".PNG"), ".png and begins with something else"),
    ("report", ("there/.html", ".md"), ".html or .htm or .md or .markdown and begins with something else"),
])  # fmt: skip
def test_a_file_is_not_written_under_a_name_of_something_else(capsys, tmp_path, command, wrong, want):
    for name in wrong:
        said = refused(capsys, command, "--model", "pocketvar", "--gpu", "cpu", "--out", str(tmp_path / name))
        assert said.endswith(f"{Path(name).name}, want a name that ends in {want}\n"), said
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("command, names", [("compare", ("x", "x.MD", "a.b.md")), ("generate", ("x", "x.PNG", "a.b.png"))])
def test_a_name_without_an_end_or_with_the_right_one_is_taken(command, names):
    for name in names:
        _, options = parser.read_options([command, "--model", "pocketvar", "--gpu", "cpu", "--out", name])
        assert str(options.out) == name


def spawn(home: Path, delay: str, trials: int, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "SPARVAR_TUNE_HOME": str(home), "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"}
    # where the tests themselves run in the background of a shell, SIGINT is ignored and children inherit that
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen([sys.executable, tiny.__file__, delay, str(trials), *words], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_runs_lose_no_finished_trial(tmp_path, how):
    home = tmp_path / "home"
    first = spawn(home, "0.02", 1000, *TUNE)
    seen = []
    for line in first.stdout:
        if " trial " in line:
            seen.append(line)
        if len(seen) == 4:
            first.send_signal(how)
            break
    _, err = first.communicate()
    assert len(seen) == 4 and first.returncode == (130 if how == signal.SIGINT else -9), err
    assert "Traceback" not in err and ("--resume" in err or how == signal.SIGKILL)
    kept = search.read_trials(home / "runs" / "cpu--pocketvar")
    assert len(kept) >= 4
    second = spawn(home, "0", 1, *TUNE, "--resume")
    out, err = second.communicate()
    assert f"going on after {len(kept)} finished trials" in out, (out, err)
    assert search.read_trials(home / "runs" / "cpu--pocketvar")[: len(kept)] == kept


@pytest.mark.slow
def test_two_runs_at_once_are_kept_apart(tmp_path):
    first = spawn(tmp_path, "0.1", 1000, *TUNE)
    for line in first.stdout:
        if "measured" in line:
            break
    second = spawn(tmp_path, "0", 1, *TUNE)
    _, err = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "another tuning run" in err


@pytest.mark.parametrize(("words", "said"), [
    (["--gpu", "h10", "--model", "hart"], "nearest: h100-sxm"), (["--gpu", "a100", "--model", "hrt"], "nearest: hart"),
    (["--gpu", "a100"], "--model"), (["--gpu", "a100", "--model", "hart", "--aspect", "1.7"], "aspect"),
    (["--gpu", "a100", "--model", "infinity-8b", "--resolution", "2M"], "1M"),
    (["--model", "hart", "--budget", "soon"], "want a time"),
    (["--model", "hart", "--pairs", "0"], "whole number"), (["--model", "hart", "--seed", "-1"], "0..2147483647"),
    (["tune", "--model", "hart", "--quality", "best"], "near-lossless"),
    (["--gpu", "cpu", "--model", "hart"], "such as --gpu h100"), (["show"], "want --model"),
    (["show", "--model", "hart", "--gpu", "rtx5090"], "nothing to show"),
    (["verify", "--model", "pocketvar", "--gpu", "a100"], "not in this machine"),
    (["generate", "--model", "hart", "--gpu", "cpu"], "no adapter"),
    (["--gpu", "cpu", "--model", "pocketvar", "--min-psnr", "nan"], "0..200"),
    (["--gpu", "cpu", "--model", "pocketvar", "--images", "4"], "one image at a time"),
    (["verify", "--gpu", "cpu", "--model", "pocketvar", "--images", "4"], "one image at a time"),
    (["--gpu", "h100", "--model", "hart", "--images", "257"], "1..256"), (["show", "--seal"], "want --profile"),
    (["explain", "--gpu", "h100", "--model", "hart", "--images", "257"], "1..256"),
    (["show", "--gpu", "h100", "--model", "hart", "--images", "0"], "1..256"),
    (["--model", "hart", "--pairs", "9" * 5000], "whole number"), (["--model", "hart", "--pairs", "10001"], "2..10000"),
    (["--model", "hart", "--budget", "9" * 400], "at most 30 days"), (["--model", "hart", "--budget", "0s"], "want a time"),
    (["--model", "hart", "--min-ssim", "2"], "0..1"), (["--model", "hart", "--min", "snr=2"], "nearest: psnr"),
    (["--model", "hart", "--min", "lpips=1"], "want --max lpips=1"),
    (["--model", "hart", "--max", "psnr=1"], "want --min psnr=1"),
    (["--gpu", "cpu", "--model", "pocketvar", "--max", "lpips=0.1"], "--metric-weights lpips=PATH"),
    (["--gpu", "cpu", "--model", "pocketvar", "--min-worst-class", "psnr=33", "--pairs", "9"], "--pairs 20"),
    (["--gpu", "cpu", "--model", "pocketvar", "--min-psnr-worst-class", "33", "--pairs", "9"], "--pairs 20"),
    (["--model", "hart", "--metric-weights", "psnr=x"], "needs none"),
    (["--model", "hart", "--metric-weights", "lpips"], "NAME=PATH"),
    (["--model", "hart", "--metric", "lpips=x"], "unrecognized arguments: --metric"),  # not short for --metric-weights
    (["--model", "hart", "--min-psnr", "x"], "NAME=VALUE"), (["--model", "hart", "--min", "psnr"], "NAME=VALUE"),
    (["--model", "hart", "--min", "psnr=2", "--min-psnr", "3"], "each metric once"), (["--model", "hart", "a\nb"], "a b"),
    (["verify", "--gpu", "cpu", "--model", "pocketvar", "--pairs", "1"], "2..10000"),
    (["generate", "--gpu", "cpu", "--model", "pocketvar", "--class", "²"], "want 0..9"),
    (["generate", "--gpu", "cpu", "--model", "pocketvar", "--seed", "5000000000000000000"], "seed"),
    (["explian", "--model", "hart"], 'command "explian": unknown; nearest: explain'), (["hart"], 'command "hart": unknown'),
    (["--gpu", "h100", "--model", "hart", "--out", ""], "--out: '': want a path"), (["--model", "\x1b[2Jx"], r"\x1b[2Jx"),
    (["show", "--profile", ""], "--profile: '': want a path"), (["--gpu", "h100", "--model", "hart", "--aspect", ""], "unknown"),
])  # fmt: skip
def test_bad_words_are_one_line(tiny_model, capsys, words, said):
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(("content", "said"), [
    (b'{"schema": 1, "created"', "not a profile"), (b'{"schema": 9}', "upgrade"), (b"\xff\xff", "not UTF-8"),
    (b'{"schema": 1}', "tune again (sparvar-tune --gpu"), (b'{"schema": 2, "x": NaN}', "NaN"), (b"{}", "missing"),
    (None, "over 1048576"),
])  # fmt: skip
def test_bad_files_are_one_line(tiny_model, capsys, tmp_path, content, said):
    path = tmp_path / "p.json"
    with path.open("wb") as file:
        file.truncate(100 << 20) if content is None else file.write(content)
    for command in ("show", "explain", "verify", "generate"):
        assert said in refused(capsys, command, "--model", "pocketvar", "--gpu", "cpu", "--profile", str(path))


@pytest.mark.slow
def test_prediction_is_marked(tiny_model, capsys, tmp_path):
    code, out, _ = run(capsys, "--gpu", "a100", "--model", "hart", "--out", str(tmp_path))
    assert code == 0 and "unverified" in out and "predicted" in out and "to make it real" in out
    assert "--source CHECKOUT --weights FOLDER" in out  # the way there is
    profile = store.load(tmp_path / "a100-80" / "hart.json")
    assert (profile.state, profile.policy_state, profile.evidence, profile.generation) == ("predicted", "unverified", None, None)
    assert [r.scale_index for r in profile.rows] == [10, 11, 12] and profile.workload.prefix == 300
    for row in profile.rows:
        assert 0 < row.tuned_predicted_ms < row.dense_predicted_ms
    code, out, _ = run(capsys, "--gpu", "a100", "--model", "hart", "--images", "4", "--out", str(tmp_path))
    four = store.load(tmp_path / "a100-80" / "hart--images-4.json")
    assert code == 0 and "--images 4 --write" in out and four.workload.batch == 8 == 4 * profile.workload.batch
    assert 2 < four.rows[-1].tuned_predicted_ms / profile.rows[-1].tuned_predicted_ms < 5
    code, out, _ = run(capsys, "--gpu", "h100", "--model", "infinity-8b", "--aspect", "1.750", "--out", str(tmp_path))
    assert code == 0 and (tmp_path / "h100-sxm" / "infinity-8b--1M--1.750.json").is_file()


def test_places_that_cannot_be_written(tiny_model, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "--gpu", "a100", "--model", "hart", "--out", str(tmp_path / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(search_here, "tune", lambda *_: pytest.fail("found out only after the work"))
        assert "cannot be written" in refused(capsys, *TUNE, "--out", str(tmp_path / "file"))

    monkeypatch.setattr(tiny.adapter.PocketAdapter, "finish", lambda *_args, **_kw: pytest.fail("drew before it was known"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for command in (["generate"], ["compare"], ["capture"], ["report", "--pictures", "0"], ["bench", "--write", "--baseline"]):
        out = [] if command[-1] == "--baseline" else ["--out"]
        for where, said in (("folder", "is a folder"), ("pipe", "no plain file")):
            assert said in refused(capsys, *command, *out, str(tmp_path / where), "--model", "pocketvar", "--gpu", "cpu")
    assert "cannot be written" in refused(
        capsys, "trace", "--model", "pocketvar", "--gpu", "cpu", "--out", str(tmp_path / "file")
    )
    assert "nothing to seal" in refused(capsys, "show", "--seal", "--profile", str(POCKETVAR))
    with monkeypatch.context() as patch:
        patch.setenv("SPARVAR_TUNE_HOME", str(tmp_path / "file"))
        patch.setattr(tiny.adapter.PocketAdapter, "start", lambda *_args, **_kw: pytest.fail("drew before it was known"))
        for more in ([], ["--write"]):
            said = refused(capsys, "verify", "--model", "pocketvar", "--gpu", "cpu", "--profile", str(POCKETVAR), *more)
            assert "set SPARVAR_TUNE_HOME" in said and "--out" not in said

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refused(capsys, "--gpu", "a100", "--model", "hart", "--out", str(tmp_path / "new"))
    assert not [p for p in (tmp_path / "new").rglob("*") if p.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_letter_the_terminal_lacks_changes_no_exit_code(tmp_path, encoding):
    home = tmp_path / "Übung 画像"
    (home / "profiles" / "cpu").mkdir(parents=True)
    shutil.copy(store.shipped_folder() / "cpu" / "pocketvar.json", home / "profiles" / "cpu")
    env = {**os.environ, "SPARVAR_TUNE_HOME": str(home), "PYTHONIOENCODING": encoding}
    for model, code in (("pocketvar", 0), ("画像", 2)):
        words = [sys.executable, "-m", "sparvar_tune.cli", "show", "--gpu", "cpu", "--model", model]
        done = subprocess.run(words, env=env, capture_output=True)
        said = (done.stdout or done.stderr).decode(encoding)
        assert done.returncode == code and said.count("\n") == (1 if code else done.stdout.count(b"\n")), done.stderr
        assert ("画像" if encoding == "utf-8" else r"\u753b\u50cf") in said


def test_a_package_that_is_not_installed_is_one_line(capsys, monkeypatch):
    def lacks(_words):
        raise ModuleNotFoundError("No module named 'optuna.storages'", name="optuna.storages")

    monkeypatch.setattr(parser, "read_options", lacks)
    assert "optuna is not installed; sparvar-tune doctor names" in refused(capsys, "show", "--gpus")


@pytest.mark.slow
def test_closed_streams_and_warnings_are_no_traceback(tmp_path):
    """`>&-` closes a stream; a warning is a line without the place in our code."""
    command = f"{sys.executable} -m sparvar_tune.cli explain --gpu h100 --model hart"
    env = {**os.environ, "SPARVAR_TUNE_HOME": str(tmp_path)}
    done = subprocess.run(f"{command} >&-", shell=True, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("sparvar-tune: note: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["show", "--gpus"]])
def test_a_reader_that_has_seen_enough_gets_no_traceback(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "sparvar_tune.cli", *words], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode in (0, 1) and done.stderr == b""


@pytest.mark.parametrize("command", ["--help >/dev/full", "nosuch 2>/dev/full", "nosuch >/dev/full 2>/dev/full"])
def test_a_full_disk_is_one_line_and_bad_input(command):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # so that streams hold back
    done = subprocess.run(f"{sys.executable} -m sparvar_tune.cli {command}", shell=True, env=env, capture_output=True, text=True)
    said = "" if "2>" in command else "sparvar-tune: No space left on device\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_every_option_says_what_it_is():
    commands = next(a for a in parser.build_parser()._actions if a.dest == "command").choices
    dumb = [(name, a.option_strings) for name, command in commands.items() for a in command._actions if not a.help]
    assert dumb == []


def test_check_takes_no_option_that_it_would_not_heed(capsys):
    assert "--model" in refused(capsys, "check", "--model", "nope")


def test_help_says_the_exit_codes(capsys):
    for words in (["--help"], ["tune", "--help"]):
        code, out, _ = run(capsys, *words)
        assert code == 0 and "exit codes:" in out and "  0  done" in out and "130  interrupted" in out


def test_check_and_tables(tiny_model, capsys):
    assert "not in this machine" in refused(capsys, "check", "--gpu", "b200")
    for command in ("generate", "verify", "compare"):
        assert "not in this machine" in refused(capsys, command, "--gpu", "b200", "--model", "pocketvar")
    code, out, _ = run(capsys, "check", "--gpu", "cpu")
    assert code == 0 and out.count("ok  ") == 7
    code, out, _ = run(capsys, "show", "--gpus", "--models")
    assert code == 0 and "h100-sxm" in out and "infinity-8b" in out


def test_trials_are_shown_as_csv(tiny_model, capsys):
    assert "want --model" in refused(capsys, "show", "--trials")
    assert "no trials" in refused(capsys, "show", "--trials", "--model", "pocketvar", "--gpu", "cpu")
    folder = Subject.of("pocketvar", "cpu").run_folder()
    folder.mkdir(parents=True)
    study = search.open_study(folder, "space", 0, False)
    verdict = Verdict(10.0, -0.5, {"psnr": 36.0, "ssim": 0.97}, True)
    search.search(study, lambda knobs: verdict, lambda: len(search.finished(study)) >= 3, lambda found: None)
    code, out, _ = run(capsys, "show", "--trials", "--model", "pocketvar", "--gpu", "cpu")
    rows = out.splitlines()
    assert code == 0 and rows[0].startswith("trial,form,price_last") and len(rows) == 4


def test_trials_of_a_shared_storage_are_shown_by_study(tiny_model, capsys, tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    words = ["show", "--trials", "--model", "pocketvar", "--gpu", "cpu", "--storage"]
    assert "no such file" in refused(capsys, *words, url) and not (tmp_path / "shared.db").exists()
    assert "no such file" in refused(capsys, *words, f"journal://{tmp_path}/shared.journal") and not list(
        tmp_path.glob("*.alive")
    )
    assert "want --trials" in refused(capsys, "show", "--model", "pocketvar", "--storage", url)
    shared = storage.open_shared(url)
    assert "no trials" in refused(capsys, *words, url)
    verdict = Verdict(10.0, -0.5, {"psnr": 36.0, "ssim": 0.97}, True)
    for space, number in (("pocketvar-aa", 2), ("pocketvar-bb", 1), ("pocketvar-2-aa", 1)):
        study, told = search.join_study(shared, space), []
        search.search(study, lambda knobs: verdict, lambda n=number, t=told: len(t) == n, told.append, shared)
    code, out, _ = run(capsys, *words, url)
    assert code == 0 and [line.partition(",")[0] for line in out.splitlines()] == [
        "study", "pocketvar-aa", "pocketvar-aa", "pocketvar-bb"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*unverified")
def test_a_gpu_that_is_not_here_is_explained(tiny_model, capsys):
    for images in ("1", "2"):
        code, out, _ = run(capsys, "explain", "--gpu", "h100", "--model", "hart", "--images", images)
        assert code == 0 and "exact silicon" in out and ("that for 1 serves" in out) == (images == "2")


def test_json_stays_small_and_plain():
    data = json.loads((ROOT / "profiles" / "a100-80" / "hart.json").read_text())
    assert dataclasses.is_dataclass(schema.Profile) and set(data) == {
        "checksum", *(f.name for f in dataclasses.fields(schema.Profile))
    }  # fmt: skip


def test_misses_are_recorded_tuned_and_forgotten(tiny_model, capsys, monkeypatch):
    for _ in range(2):
        tuned = runtime.load_profile("hart", gpu="b200", record_miss=True, folders=(tiny_model,))
        assert tuned.profile is None
    runtime.load_profile("var-d16", gpu="l40s", record_miss=True, images=4, folders=(tiny_model,))
    assert [(m.model, m.gpu, m.images) for m in misses.read()] == [("hart", "b200", 1), ("var-d16", "l40s", 4)]
    assert misses.file().read_text().count("\n") == 2  # asked for twice, kept once
    lines = misses.file().read_text().replace(', "images": 1', "")  # as before several images were counted
    assert '"images": 4' in lines and "null" not in lines and lines.count("images") == 1
    misses.file().write_text(lines + '{"gpu": "b2')  # a process was killed here
    runtime.load_profile("var-d20", gpu="b200", record_miss=True, folders=(tiny_model,))
    code, out, _ = run(capsys, "--gpu", "b200", "--from-misses")
    assert code == 0 and "2 recorded misses of b200" in out and "var-d20" in out
    assert (tiny_model / "profiles" / "b200" / "hart.json").exists() and [m.model for m in misses.read()] == ["var-d16"]
    assert "leave out --model" in refused(capsys, "--from-misses", "--model", "hart")
    assert "want --model M" in refused(capsys, "--gpu", "cpu")

    def broken(*_):
        raise ValueError("nothing\nworks")

    monkeypatch.setattr(predict, "predict_profile", broken)
    code, out, _ = run(capsys, "--gpu", "l40s", "--from-misses")
    assert (
        code == 1 and "not tuned: nothing" in out and out.count("works") == 1 and [m.model for m in misses.read()] == ["var-d16"]
    )


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_misses_that_cannot_be_read_are_not_none(home, capsys, more):
    misses.file().mkdir(parents=True)
    said = refused(capsys, "--gpu", "b200", "--from-misses", *more)
    assert f"{misses.file()}: recorded misses cannot be read (Is a directory)" in said
    with pytest.warns(UserWarning, match="the miss is not recorded: .*misses.jsonl"):
        assert runtime.load_profile("hart", gpu="b200", record_miss=True, folders=(home,)).profile is None


IMPORTS = """
import os, signal, sys
from sparvar_tune.cli import parser

def read(words):
    os.kill(os.getpid(), signal.SIGINT)
    try:
        return lambda options: print("ran on"), None  # as what swallows an exception in the middle of an import would
    except KeyboardInterrupt:
        return lambda options: print("swallowed"), None

parser._read = read
sys.argv = ["sparvar-tune", "explain"]
sys.exit(parser.main())
"""


def test_ctrl_c_while_modules_are_imported_ends_at_once():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PYTHONPATH},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nsparvar-tune: interrupted\n")


@pytest.mark.parametrize("words", [("tune", "--budget", "-5m"), ("show", "--profile")], ids=" ".join)
def test_a_value_that_is_missing_or_looks_like_an_option(capsys, words):
    said = refused(capsys, *words)
    assert f"argument {words[1]}: expected one argument; got none, or one that begins with" in said and "--option=-1" in said
