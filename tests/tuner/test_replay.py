"""Replay on made-up spaces whose optimum is known: what is refused, what a trial costs, and that seeds decide everything."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import pstdev

import optuna
import pytest
from places import PYTHONPATH, ROOT

from lab import kernel_table
from lab import sampler_study as r
from lab.recorded_spaces import Space, TriedConfig, numbers, read_space
from sparvar_tune.launch_search import choose

CHOICES = {
    "block_m": [64, 128],
    "block_n": [32, 64, 128],
    "num_warps": [4, 8],
    "num_stages": [2, 3, 4, 5, 6],
    "order": ["a", "b"],
}


def smooth(c: dict) -> float | None:
    """Every parameter has its own best value; deep pipelines of wide blocks do not fit."""
    if c["block_n"] * c["num_stages"] > 512:
        return None
    distance = (c["block_m"] == 64) + abs(math.log2(c["block_n"] / 64)) + abs(c["num_stages"] - 5) + (c["num_warps"] == 4)
    return 0.2 * (1 + 0.1 * distance + 0.05 * (c["order"] == "b"))


def rugged(c: dict) -> float | None:
    """Parameters matter only together: chance decides, by the configuration; one in ten fails, one is far ahead."""
    if list(c.values()) == [64, 128, 8, 3, "b"]:
        return 0.2
    rng = random.Random(str(list(c.values())))
    return None if rng.random() < 0.1 else 0.2 * rng.uniform(1.1, 3.0)


def plain_space(time=smooth, choices=CHOICES, spread=0.01) -> dict:
    """The JSON of a space; 8 warps on 64 rows of queries are illegal unless the pipeline has 3 stages."""
    rows = []
    for values in product(*choices.values()):
        c = dict(zip(choices, values, strict=True))
        if c.get("num_warps") == 8 and c["block_m"] == 64 and c["num_stages"] != 3:
            continue
        ms = time(c)
        times = {"p20": ms * (1 - spread), "p50": ms, "p80": ms * (1 + spread), "n": 30} if ms else {"failure": "out of memory"}
        rows.append({"config": c, **times})
    return {"schema": 1, "gpu": "h100-sxm", "problem": "made up", "unit": "ms", "space": choices, "rows": rows}


def write(path: Path, data: dict) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def spaces(tmp_path_factory) -> dict[str, Space]:
    folder = tmp_path_factory.mktemp("spaces")
    return {f.__name__: read_space(write(folder / f"{f.__name__}.json", plain_space(f))) for f in (smooth, rugged)}


def line(times: list[float | None], spread: float = 0.0, n: int = 30) -> Space:
    """A space of one parameter with these times; None fails."""
    made = [
        TriedConfig({"a": i}, t * (1 - spread), t, t * (1 + spread), n, None)
        if t
        else TriedConfig({"a": i}, None, None, None, None, "failed")
        for i, t in enumerate(times)
    ]
    return Space("h100-sxm", "line", {"a": list(range(len(times)))}, {(i,): row for i, row in enumerate(made)})


def test_a_space_is_read(spaces):
    space = spaces["smooth"]
    assert space.gpu == "h100-sxm" and space.choices == CHOICES and space.optimum == 0.2
    assert len(space.rows) == 120 - 24 and list(space.rows) == sorted(space.rows)
    assert space.rows[1, 1, 1, 3, 0].value == 0.2 and space.rows[1, 2, 1, 3, 0].value == math.inf
    assert (0, 0, 1, 0, 0) not in space.rows, "an illegal configuration has no row"
    assert spaces["rugged"].optimum == spaces["rugged"].rows[0, 2, 1, 1, 1].value == 0.2


def set_in(row: int, **fields):
    return lambda d: d["rows"][row].update(fields)


REFUSED = {
    "schema": (lambda d: d.update(schema=2), "schema"),
    "unit": (lambda d: d.update(unit="us"), "unit"),
    "unknown field": (lambda d: d.update(host="x"), "host: unknown field"),
    "missing field": (lambda d: d.pop("gpu"), "gpu: missing"),
    "unknown field of a row": (set_in(3, p99=1.0), "rows[3].p99: unknown field"),
    "NaN": (set_in(2, p50=math.nan), "rows[2].p50: got nan"),
    "infinite": (set_in(2, p80=math.inf), "rows[2].p80: got inf"),
    "NaN in the space": (lambda d: d["space"].update(block_m=[math.nan, 1.0]), "space.block_m"),
    "huge": (lambda d: d["space"].update(block_m=[1, 10**400]), "space.block_m"),
    "not a list": (lambda d: d["space"].update(block_m=64), "space.block_m"),
    "mixed kinds": (lambda d: d["space"].update(block_m=[64, True]), "space.block_m"),
    "a value twice": (lambda d: d["space"].update(order=["a", "b", "a"]), "space.order"),
    "descending": (lambda d: d["space"].update(block_m=[128, 64]), "space.block_m"),
    "order of times": (set_in(1, p20=9.0), "rows[1]: want 0 < p20"),
    "time zero": (set_in(1, p20=0.0, p50=0.0), "rows[1]: want 0 < p20"),
    "no time": (set_in(1, p50=None), "rows[1]: p20, p50, p80, n"),
    "time and failure": (set_in(1, failure="x"), "rows[1]: failure"),
    "other value": (lambda d: d["rows"][4]["config"].update(block_n=48), "rows[4].config.block_n: got 48"),
    "other kind of value": (lambda d: d["rows"][4]["config"].update(block_m=64.0), "rows[4].config.block_m: got 64.0"),
    "parameter left out": (lambda d: d["rows"][4]["config"].pop("order"), "rows[4].config"),
    "a configuration twice": (lambda d: d["rows"].append(d["rows"][7]), "rows[96].config: the same as that of rows[7]"),
    "nothing ran": (lambda d: d.update(rows=[{"config": d["rows"][0]["config"], "failure": "x"}]), "rows: want one"),
    "rows is an object": (lambda d: d.update(rows={}), "rows: got a dict"),
    "a row is a number": (lambda d: d["rows"].append(3), "want an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_space_is_refused(tmp_path, name):
    spoil, says = REFUSED[name]
    data = json.loads(json.dumps(plain_space()))
    spoil(data)
    path = write(tmp_path / "space.json", data)
    with pytest.raises(ValueError) as caught:
        read_space(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[1]", b'{"a": 1, "a": 2}', b"[" * 10**5], ids=repr)
def test_a_file_of_something_else_is_refused(tmp_path, raw):
    path = tmp_path / "space.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="not a recorded space") as caught:
        read_space(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        read_space(tmp_path / "none.json")


def test_numbers_are_not_booleans():
    assert numbers([1, 2.5]) == [1, 2.5] and numbers([True, False]) == numbers(["a"]) == []


@pytest.mark.filterwarnings("error::UserWarning")  # gp warns when it is told an infinite time
@pytest.mark.parametrize("sampler", r.SAMPLERS)
def test_curves_are_sound(spaces, sampler):
    budget = 12 if sampler == "gp" else 20  # it is slow, and learns from the eleventh on
    for space in spaces.values():
        known = {row.value for row in space.rows.values()} | {math.inf}
        curve = r.simulate(space, sampler, budget, 1)
        assert len(curve) == budget and set(curve) <= known
        assert curve == r.simulate(space, sampler, budget, 1), "the same seed"
        assert sampler == "screened" or curve == sorted(curve, reverse=True)
        assert curve[:7] == r.simulate(space, sampler, 7, 1), "a smaller budget is the beginning of a larger one"


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "screened"])
def test_seeds_differ(spaces, sampler):
    assert len({tuple(r.simulate(spaces["rugged"], sampler, 20, seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("sampler", r.SAMPLERS)
def test_everything_is_found_in_the_end(sampler):
    """Illegal and repeated proposals are free, and a sampler that only repeats itself is helped on: six trials know six rows."""
    space = line([0.6, None, 0.5, 0.4, 0.3, 0.1, None])
    del space.rows[(6,)]
    curve = r.simulate(space, sampler, 12, 3)
    assert curve[-1] == 0.1 and (sampler == "screened" or curve[5] == 0.1)


def test_grid_goes_in_order_and_pays_for_failures():
    inf = math.inf
    assert r.simulate(line([None, 0.5, None, 0.7, 0.2]), "grid", 6, 0) == [inf, 0.5, 0.5, 0.5, 0.2, 0.2]


def test_illegal_is_free(monkeypatch):
    """The sampler proposes an illegal point, a repeated one, a failing one: only the last costs."""
    space = line([0.5, None, 0.4, 0.3])
    del space.rows[(2,)]
    script = iter([0, 2, 0, 1, 3])
    monkeypatch.setattr(r, "_suggest", lambda trial, name, values: next(script))
    assert r.simulate(space, "random", 3, 0) == [0.5, 0.5, 0.3]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_stuck_sampler_is_helped_on(monkeypatch):
    """It proposes 0 for ever: after MAX_FREE repeats each of the others gets its turn, in an order of the seed's."""
    random_sampler, asked = optuna.samplers.RandomSampler, []
    stuck = lambda seed: optuna.samplers.PartialFixedSampler({"a": 0}, random_sampler(seed))  # noqa: E731
    monkeypatch.setattr(optuna.samplers, "RandomSampler", stuck)
    suggest = r._suggest
    monkeypatch.setattr(r, "_suggest", lambda *given: asked.append(0) or suggest(*given))
    assert r._proposed(line([0.5, 0.4, 0.3, None, 0.2]), "random", 5, 0)[0] == (0,)
    curves = [r.simulate(line([0.5, 0.4, 0.3, 0.2]), "random", 4, seed) for seed in range(8)]
    assert all(c[0] == 0.5 and c[3] == 0.2 for c in curves) and len({tuple(c) for c in curves}) > 1
    asked.clear()
    assert r._proposed(line([0.5, 0.4]), "random", 2, 0) == [(0,), (1,)] and len(asked) == 1 + r.MAX_FREE + 1


def test_order_matters_to_samplers_only_for_numbers(monkeypatch):
    class Trial:
        def suggest_int(self, name, low, high):
            return high

        def suggest_categorical(self, name, choices):
            return choices[0]

    assert [r._suggest(Trial(), "a", v) for v in ([1, 2, 4], ["x", "y"], [False, True])] == [2, 0, 0]


def test_screening_is_charged():
    """Ten rows cost two trials to look at, in which the best look counts; eight more trials, and the best eight are known."""
    space = line([1.0 - 0.05 * i for i in range(10)])
    parts = r._screened(space, 0)
    assert len(parts) == 10 + r.KEPT * r.PARTS + r.PARTS - 1
    assert parts[:10] == sorted(parts[:10], reverse=True) and parts[9] == space.optimum, "without noise the looks are right"
    assert r.simulate(space, "screened", 3, 0) == parts[4:15:5]
    parts = r._screened(line([None] * 9 + [0.3]), 0)
    assert parts[-1] == 0.3 and len(parts) == 10 + r.PARTS + r.PARTS - 1, "failures are not kept"


def test_noise_misleads_the_screen_and_measuring_again_helps():
    space = line([1.0 + 0.01 * i for i in range(40)], spread=0.2)
    looks, finals = [], []
    for seed in range(40):
        parts = r._screened(space, seed)
        looks.append(parts[39])
        finals.append(parts[-1])
    assert sum(looks) / 40 > 1.05, "the best look is often not the best"
    assert sum(finals) < sum(looks) - 0.5 and all(f <= look for f, look in zip(finals, looks, strict=True))


def test_a_screen_is_as_noisy_as_its_samples_say():
    """The median of 6 normal samples spreads 0.47 of one sample's sigma; here (p80 / p20) that is log(1.5) / 1.683."""
    rng = random.Random(0)
    row = TriedConfig({}, 1 / math.sqrt(1.5), 1.0, math.sqrt(1.5), 30, None)
    looks = [math.log(r._screen(row, rng)) for _ in range(4000)]
    assert pstdev(looks) == pytest.approx(0.464 * math.log(1.5) / 1.683, rel=0.06)
    assert sum(looks) / 4000 == pytest.approx(0, abs=0.01)
    assert r._screen(TriedConfig({}, None, None, None, None, "x"), rng) == math.inf


def test_bad_requests_are_refused(spaces, monkeypatch):
    with pytest.raises(ValueError, match="want one of grid, random"):
        r.simulate(spaces["smooth"], "sobol", 5, 0)
    with pytest.raises(ValueError, match="budget"):
        r.simulate(spaces["smooth"], "grid", 0, 0)
    find = r.importlib.util.find_spec
    monkeypatch.setattr(r.importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    assert r.why_not_sampler("gp") == "gp needs scipy: pip install scipy" and r.why_not_sampler("tpe") is None


def test_learning_pays_on_the_smooth_space(spaces):
    table = {row.sampler: row for row in r.regret(spaces["smooth"], ("random", "tpe"), 40, seeds=8)}
    assert sum(table["tpe"].middle[10:]) < sum(table["random"].middle[10:]) and table["tpe"].near < table["random"].near


def test_chance_needs_half_the_rugged_space(spaces):
    """Random search without repeats finds one point of 96 in 48 trials in the median: not much earlier, not much later."""
    (row,) = r.regret(spaces["rugged"], ("random",), 96, seeds=30)
    assert 30 <= row.near <= 66 and row.middle[-1] == 0


def test_summary_by_hand():
    inf = math.inf
    row = r._summary("x", [[inf, 0.5, 0.02], [0.4, 0.01, 0.01], [0.02, 0.2, 0.2]])  # the last was near, but not for good
    assert (row.low, row.middle, row.high) == ((0.02, 0.01, 0.01), (0.4, 0.2, 0.02), (inf, 0.5, 0.2))
    assert row.near == 3
    eleven = r._summary("x", [[loss / 10] for loss in range(11)])
    assert (eleven.low, eleven.middle, eleven.high) == ((0.1,), (0.5,), (0.9,))
    assert r._summary("x", [[0.1], [0.1], [0.0]]).near == inf and r._summary("x", [[0.0]]).near == 1


def test_report(spaces):
    space = spaces["smooth"]
    never = r.Regret("unlucky", (math.inf,) * 80, (math.inf,) * 80, (math.inf,) * 80, math.inf)
    text = r.markdown([space], [[r.Regret("x", (0.0,) * 80, (0.1,) * 79 + (0.02,), (0.2,) * 80, 80), never]], 7, "plot.svg")
    assert "| x | " + "10.0% (0.0%..20.0%) | " * 4 + "2.0% (0.0%..20.0%) | 80 |" in text
    assert "| unlucky | none ran (none ran..none ran) |" in text and text.endswith("| over 80 |\n")
    failed = sum(row.failure is not None for row in space.rows.values())
    assert f"120 configurations, 96 legal, {failed} of them failed. Best 0.2 ms; 1 within 3%." in text
    assert "median of 7 seeds" in text and "(plot.svg)" in text and "## made up (h100-sxm)" in text


def test_plot(spaces):
    table = r.regret(spaces["smooth"], ("grid", "screened"), 80, seeds=3)
    svg = r.draw(list(spaces.values()), [table, table])
    assert svg.startswith(b"<?xml") and svg.count(b">screened</text>") == 2 and b"<dc:date>" not in svg


@pytest.mark.slow
def test_the_same_bytes_from_another_process(tmp_path):
    """Whatever the hash seed."""
    path = write(tmp_path / "space.json", plain_space())
    done = []
    for seed in ("1", "2"):
        out = tmp_path / seed / "samplers.md"
        command = [sys.executable, "-m", "lab.sampler_study", str(path), "--out", str(out), "--seeds", "3", "--samplers"]
        env = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": seed}
        done.append(subprocess.Popen([*command, "random", "tpe", "nsga2", "screened"], cwd=ROOT, env=env))
    assert [process.wait() for process in done] == [0, 0]
    for name in ("samplers.md", "samplers.svg"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() != b""


@pytest.mark.parametrize("missing", ["matplotlib", "scipy"])
def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys, missing):
    find = r.importlib.util.find_spec
    monkeypatch.setattr(r.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    path = write(tmp_path / "space.json", plain_space())
    samplers = ["grid"] + ["gp"] * (missing == "scipy")
    code = r.main([str(path), "--out", str(tmp_path / "out.md"), "--seeds", "1", "--samplers", *samplers])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install" in said
    assert code == (2 if missing == "matplotlib" else 0) and (tmp_path / "out.md").exists() == (code == 0)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], []])
def test_bad_input_is_one_line(tmp_path, capsys, arguments):
    assert r.main([str(tmp_path / "none.json"), "--out", str(tmp_path / "out.md"), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out.md").exists()


RECORDED = sorted((ROOT / "reports" / "spaces-h100").glob("*.json"))


def test_spaces_of_a_real_gpu_are_kept():
    assert len(RECORDED) >= 6


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_tuner_finds_the_optimum_of_recorded_spaces(path):
    """The configurations it tries hold the best of all, and picking among them by noisy screens costs at most 3 %."""
    space = read_space(path)
    case = next(c for c in kernel_table.cases() if c.name == space.problem)
    tried = {tuple(vars(c)[name] for name in space.choices) for c in choose.space(case.problem(case.scale_index), (9, 0))}
    kept = {p: row for p, row in space.rows.items() if tuple(row.config[name] for name in space.choices) in tried}
    assert len(kept) == len(tried) < len(space.rows)
    assert min(row.value for row in kept.values()) <= 1.03 * space.optimum
    fewer = dataclasses.replace(space, rows=kept)
    found = [r.simulate(fewer, "screened", 2 * len(kept), seed)[-1] for seed in range(30)]
    assert max(found) <= 1.03 * space.optimum
