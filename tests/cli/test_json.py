"""`--json`: one object of documented fields, alone on stdout, that says what the words say; exit codes; completion; progress."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import run
from examples import metrics
from made_profiles import profile
from places import ROOT

from sparvar_tune.cli import console, exit_codes, json_answer, machine_checks, parser
from sparvar_tune.cli.commands import check, compare, show
from sparvar_tune.emojivar import installed
from sparvar_tune.profile import store
from sparvar_tune.profile.reader import Reader
from sparvar_tune.runtime import load
from sparvar_tune.runtime.explain import Explained
from sparvar_tune.ways import verify as verifying

PAGE = (ROOT / "docs" / "json.md").read_text()
ENVELOPE = {"answer", "version", "exit_code"}
ASKED = json_answer.Asked
# command -> the dataclasses whose fields stand in its object
PARTS = {
    "show": (show.ShowAnswer,), "explain": (ASKED, Explained), "verify": (ASKED, verifying.Verification),
    "compare": (ASKED, compare.CompareAnswer), "check": (check.CheckAnswer,),
}  # fmt: skip


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict, str, str]:
    """(the object, the words of the same command, what went to stderr beside the object); both runs end alike."""
    said_code, words_out, _ = run(capsys, *words)
    code, out, err = run(capsys, *words, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == said_code == found["exit_code"] and found["version"] == json_answer.VERSION and found["answer"] == words[0]
    if words[0] in PARTS:
        for part in PARTS[words[0]]:  # every field is there and of its type; no other is
            Reader().read(part, {f.name: found[f.name] for f in dataclasses.fields(part)}, words[0])
        names = {f.name for part in PARTS[words[0]] for f in dataclasses.fields(part)}
        assert set(found) == ENVELOPE | names | ({"profile"} if words[0] == "verify" else set())
    return found, words_out, err


def fields_of(cls: type, seen: set[type] | None = None) -> set[str]:
    """The names of a dataclass's fields and of those in them, down to where another page describes them."""
    seen = set() if seen is None else seen
    seen.add(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    for hint in re.findall(r"\b[A-Z]\w+", " ".join(str(f.type) for f in dataclasses.fields(cls))):
        inner = vars(sys.modules[cls.__module__]).get(hint)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner) and inner not in seen:
            names |= fields_of(inner, seen)
    return names


@pytest.mark.parametrize("command", PARTS)
def test_every_field_is_documented(command):
    section = PAGE.partition(f"\n## {command}\n")[2].partition("\n## ")[0] + PAGE.partition("\n## Parts\n")[2]
    section += PAGE.partition("\n## ")[0]
    missing = {name for part in PARTS[command] for name in fields_of(part)} - set(re.findall(r"`(\w+)`", section))
    assert not missing, f"docs/json.md says nothing of {missing}"


@pytest.mark.filterwarnings("ignore:.*unverified")
def test_explain(home, capsys):
    found, words, _ = answer(capsys, "explain", "--model", "pocketvar", "--gpu", "cpu")
    for scale in found["scales"]:
        said = next(line for line in words.splitlines() if line.startswith(f"scale {scale['scale_index']}:"))
        assert f"{scale['speedup']['median']:.2f}x measured" in said and f"n={scale['speedup']['n']}" in said
        assert ("dense, because" in said) == (scale["runs"] == "dense")
    assert all(f"- {reason}" in words for reason in found["reasons"]) and found["policy"] in words
    found, words, _ = answer(capsys, "explain", "--model", "hart", "--gpu", "cpu")
    assert found["profile"] is found["policy"] is None and not found["scales"] and "everything runs dense" in words


def test_show(home, capsys):
    path = ROOT / "profiles" / "cpu" / "pocketvar.json"
    found, words, _ = answer(capsys, "show", "--profile", str(path))
    file = json.loads(path.read_text())
    assert found["profile"] == {k: v for k, v in file.items() if k != "checksum"} and found["path"] == str(path)
    assert f"{file['generation']['speedup']['median']:.2f}x" in words and len(file["rows"]) == words.count("  scale ")
    found, words, _ = answer(capsys, "show", "--gpus", "--models")
    lines = [line.split()[0] for line in words.splitlines()]
    assert [row["slug"] for row in (*found["gpus"], *found["models"])] == lines
    assert next(g for g in found["gpus"] if g["slug"] == "h200")["memory_gbps"] == 4800


def test_verify(home, tmp_path, monkeypatch, capsys):
    tiny.install(monkeypatch.setattr)
    weights = dataclasses.replace(profile().workload, weights_sha256=None, logit_bound=1.0)
    weights = dataclasses.replace(weights, logit_bound=tiny.models.MODELS["pocketvar"].logit_bound)
    evidence = dataclasses.replace(profile().evidence, weights_sha256=None, metrics=metrics(36.0, 35.0, 1.0))
    path = tmp_path / "pocketvar.json"
    store.save(profile(workload=weights, evidence=evidence), path)
    measured = verifying.compare_on

    def faster(*args):
        trial = measured(*args)
        trial.tuned_ms = [ms / 2 for ms in trial.dense_ms]
        trial.tuned_scales = [{s: ms / (2 if s == 6 else 0.9) for s, ms in at.items()} for at in trial.dense_scales]
        return trial

    monkeypatch.setattr(verifying, "compare_on", faster)
    words = ("verify", "--gpu", "cpu", "--model", "pocketvar", "--profile", str(path), "--pairs", "6", "--budget", "1h")
    found, said, beside = answer(capsys, *words)
    assert [look["metric"] for look in found["looks"]] == ["psnr", "ssim"] and found["pairs"] == 6
    assert f"PSNR {found['looks'][0]['mean']:.2f} dB" in said and "2.00x" in said and found["picture"]["speedup"]["median"] == 2
    verdicts = {row["scale_index"]: row["verdict"] for row in found["rows"]}
    assert verdicts == {5: "demoted", 6: "ok"} and "scale  5: FAIL" in said and "scale  6: ok" in said
    assert [line for line in beside.splitlines() if line.startswith("wrote")] and found["overlay"] in said


def test_compare(home, monkeypatch, capsys, tmp_path):
    tiny.install(monkeypatch.setattr)
    monkeypatch.setattr(compare, "PRESETS", ("fast",))
    monkeypatch.setattr(load, "shipped_folder", lambda: tmp_path)
    found, words, beside = answer(
        capsys, "compare", "--gpu", "cpu", "--model", "pocketvar", "--pairs", "2", "--out", str(tmp_path / "t.md")
    )
    assert [way["name"] for way in found["ways"]] == ["dense", "paper's fixed setting"] and found["pairs"] == 2
    assert found["ways"][0]["metrics"] == {} and found["ways"][0]["speedup"]["median"] == 1
    assert f"| {found['ways'][1]['metrics']['psnr']['mean']:.2f} (" in words  # pictures are the same in both runs
    assert found["left_out"][0]["quality"] == "fast" and "left out fast" in words and "left out fast" in beside
    table = (tmp_path / "t.md").read_text()  # of the second run, whose times the object has
    assert f"{found['ways'][1]['speedup']['median']:.2f}x" in table and found["written"][0] == str(tmp_path / "t.md")


def test_check(home, capsys, monkeypatch):
    found, words, _ = answer(capsys, "check", "--gpu", "cpu")
    assert found["versions"]["torch"] in words and len(found["variants"]) == 7 == words.count("ok  ")
    assert all(f"{one['error']:.1e}" in words for one in found["variants"])
    monkeypatch.setattr(check, "relative_l2", lambda got, want: 0.5)
    found, words, _ = answer(capsys, "check", "--gpu", "cpu")
    assert found["exit_code"] == exit_codes.ExitCode.FAILED and words.count("FAIL") == 7
    assert not any(one["good"] for one in found["variants"])


def test_doctor(home, capsys, monkeypatch):
    found, words, _ = answer(capsys, "doctor")
    assert [f"{seen['name']}: {seen['text']}" for seen in found["seen"]] == [
        line[9:].partition("; mend: ")[0] for line in words.splitlines()
    ]  # fmt: skip
    assert {"python", "torch", "gpu", "folder", "extra gpu"} <= {seen["name"] for seen in found["seen"]}
    assert found["exit_code"] == 0 and "WRONG" not in words and str(home) in words
    assert {f"`{name}`" for name in ("seen", "name", "state", "text", "mend")} <= set(re.findall(r"`\w+`", PAGE))
    monkeypatch.setenv("SPARVAR_TUNE_HOME", str(Path(__file__) / "below a file"))
    found, words, _ = answer(capsys, "doctor")
    wrong = [seen for seen in found["seen"] if seen["state"] == "wrong"]
    assert [seen["name"] for seen in wrong] == ["folder"] and "SPARVAR_TUNE_HOME" in wrong[0]["mend"] in words
    assert found["exit_code"] == 1


def test_doctor_where_torch_does_not_load():
    """The command that says so must not need it."""
    code = "import sys; sys.modules['torch'] = None; from sparvar_tune.cli.parser import main; sys.exit(main(sys.argv[1:]))"
    for words in (["doctor"], ["doctor", "--json"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 1 and "cannot be imported" in done.stdout and not done.stderr, done.stderr
    assert next(s for s in json.loads(done.stdout)["seen"] if s["state"] == "wrong")["mend"] == "pip install 'torch>=2.9'"


@pytest.mark.parametrize(("torch", "driver", "state", "said"), [
    (None, False, "missing", "no NVIDIA GPU"), (None, True, "wrong", "a CPU build"), ("13.0", True, "wrong", "cannot use it"),
])  # fmt: skip
def test_doctor_tells_no_gpu_from_one_that_torch_cannot_use(monkeypatch, torch, driver, state, said):
    class Torch:
        class version:
            cuda = torch

        class cuda:
            @staticmethod
            def is_available() -> bool:
                return False

    monkeypatch.setattr(machine_checks, "has_nvidia_driver", lambda: driver)
    seen = machine_checks.gpu(Torch)
    assert seen.state == state and said in seen.text and (seen.mend is None) == (state == "missing")


def test_doctor_knows_every_extra():
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = {extra: tuple(re.match(r"[A-Za-z0-9-]+", name)[0] for name in names) for extra, names in extras.items()}
    ours = {extra: names for extra, (names, _) in machine_checks.EXTRAS.items()}
    assert ours == {extra: names for extra, names in told.items() if extra not in ("train", "test", "docs")}


def test_doctor_finds_emojivars_weights_where_the_model_does(monkeypatch, tmp_path):
    def seen() -> machine_checks.Seen:
        return next(one for one in machine_checks.extras() if one.name == "extra emojivar")

    assert installed.place("emojivar.safetensors").is_file() and seen().state == machine_checks.OK, "a checkout has them"
    monkeypatch.setattr(installed, "place", lambda name: tmp_path / name)
    assert seen().state == machine_checks.MISSING and seen().mend == "pip install 'sparvar-tune[emojivar]'"


def test_a_refusal_leaves_stdout_empty(home, capsys):
    code, out, err = run(capsys, "explain", "--model", "hrt", "--json")
    assert code == exit_codes.ExitCode.BAD_INPUT and out == "" and err.count("\n") == 1


def test_exit_codes_are_those_of_the_page():
    rows = re.findall(r"(?m)^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "tune.md").read_text())
    assert [(int(code), meaning) for code, meaning in rows] == [(int(c), c.meaning) for c in exit_codes.ExitCode]


class Terminal(io.StringIO):
    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched


@pytest.mark.parametrize("watched", [True, False])
def test_progress(watched):
    """On a terminal every text overwrites the last; in a file one line in half a minute."""
    stream, now = Terminal(watched), [0.0]
    progress = console.Progress(stream, lambda: now[0])
    for i in range(1, 101):
        progress(f"compiling: {i}/100")
        now[0] += 2.0
    progress("pair 3/9: PSNR 30 dB, 8 s left")
    said = stream.getvalue()
    if watched:
        assert said.count("\r\033[K") == 101 and "\n" not in said and "compiling: 51/100, 98 s left" in said
    else:
        lines = said.splitlines()
        assert "\r" not in said and lines[0] == "compiling: 16/100, 168 s left" and len(lines) == 6
        assert "compiling: 91/100, 18 s left" in lines
    assert said.count("8 s left, ") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("line", "offered"), [
    ("sparvar-tune ex", {"explain "}), ("sparvar-tune --gpu h1", {"h100-sxm", "h100-pcie", "h100"}),
    ("sparvar-tune show --js", {"--json "}), ("sparvar-tune explain --model har", {"hart "}),
])  # fmt: skip
def test_completion(tmp_path, line, offered):
    pytest.importorskip("argcomplete")
    path = tmp_path / "offered"
    env = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(path), "_ARGCOMPLETE_IFS": ",",
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "sparvar_tune.cli"], env=env, check=True, capture_output=True)
    assert set(path.read_text().split(",")) == offered


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        parser.main(["--version"])
    assert stop.value.code == 0 and re.fullmatch(r"sparvar-tune \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["profiles", "runs"])
def test_doctor_sees_a_file_where_a_folder_is_wanted(home, capsys, name):
    place = store.user_folder().parent / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("")
    found, _, _ = answer(capsys, "doctor")
    assert [seen["state"] for seen in found["seen"] if seen["name"] == "folder"] == ["wrong"]
