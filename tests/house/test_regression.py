"""What guards against getting worse: a slow-down, a launch and a spill are planted, and each is caught; a busy machine is not."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
from dataclasses import replace

import pytest
from benchmark_cases import CASES, tiny_call
from command_line import run
from interpreted import in_interpreter

from lab import bench_baseline
from sparvar_kernels import Csla, NearFar, Policy, Pooled, Rule, ScaleSchedule, SparseAttention, Tile
from sparvar_kernels.attention import Launch
from sparvar_kernels.backends.cpu import layer as layer_cpu
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants.csla.oracle import csla_keys
from sparvar_kernels.variants.definitions import tile_lists
from sparvar_kernels.variants.near_far.oracle import near_far_groups
from sparvar_tune.cli.parser import build_parser
from sparvar_tune.profile.schema import ProfileError
from sparvar_tune.regression import baseline, binaries, profile_facts
from sparvar_tune.regression.baseline import Fact, compare, count
from sparvar_tune.regression.counts import counted
from sparvar_tune.regression.ratios import cpu_ratio, ratio

CSLA = "CSLA 8x8, last scale"


class Machine:
    """A clock for calls of known cost on a machine whose speed wanders, by half and more, and that sometimes stops."""

    def __init__(self, seed: int) -> None:
        self.now, self.rng, self.pace = 0.0, random.Random(seed), 1.0

    def __call__(self) -> float:
        return self.now

    def work(self, cost: float) -> None:
        self.pace = min(3.0, max(0.5, self.pace * math.exp(self.rng.gauss(0, 0.1))))
        stopped = 10 * cost if self.rng.random() < 0.05 else 0.0
        self.now += cost * self.pace * math.exp(self.rng.gauss(0, 0.05)) + stopped

    def speed_up(self, ours: float) -> Fact:
        return ratio("csla", cpu_ratio(lambda: self.work(ours), lambda: self.work(1.0), self), "a machine")


def test_a_slow_down_of_20_percent_is_caught_on_a_machine_that_wanders():
    was = Machine(0).speed_up(0.2)
    assert was.value == pytest.approx(5.0, rel=0.05)
    for seed in range(1, 7):
        same, slower, faster = (compare([was], [Machine(seed).speed_up(cost)]) for cost in (0.2, 0.24, 0.16))
        assert same.good and faster.good and not slower.good, seed
        assert re.fullmatch(r"worse  csla: was [45]\.\d+x \(.*\), is 4\.\d+x \(.*\), bound 4\.\d+x", slower.lines[0]), (
            slower.lines
        )
    assert faster.changes[0].verdict == "better" and "write the baseline again" in faster.lines[-1]


def test_one_more_launch_a_layer_is_caught(monkeypatch):
    before = counted(tiny_call(CSLA)[2]).facts("csla", "torch")
    assert compare(before, counted(tiny_call(CSLA)[2]).facts("csla", "torch")).good, "it counts the same twice"
    attend = layer_cpu.attend
    monkeypatch.setattr(layer_cpu, "attend", lambda *args: attend(*args).add_(0))
    lines = compare(before, counted(tiny_call(CSLA)[2]).facts("csla", "torch")).lines
    was = int(next(f.value for f in before if f.name.endswith("launches")))
    assert lines == [f"worse  csla: launches: was {was}, is {was + 1}, bound {was}", "1 of 6 facts became worse"]
    monkeypatch.setattr(layer_cpu, "attend", lambda *args: attend(*args).clone())
    worse = {c.what for c in compare(before, counted(tiny_call(CSLA)[2]).facts("csla", "torch")).changes}
    assert worse == {"csla: launches", "csla: tensors", "csla: bytes"}


def more_launches() -> list[dict[str, int]]:
    """Counts of the GPU's backend as it is, and with a kernel launched twice. In Triton's interpreter."""
    import benchmark_cases

    from sparvar_kernels.backends.triton import layer

    before = benchmark_cases.launches([CSLA])[CSLA]
    gather = layer.Gather.__call__
    layer.Gather.__call__ = lambda self, *args, **named: (gather(self, *args, **named), gather(self, *args, **named))[0]
    return [before, benchmark_cases.launches([CSLA])[CSLA]]


def pairs_read(kernel: str) -> list[tuple[int, int]]:
    """(counted, by the definition) for two heads of three on two rows: of windows at a smaller tile of an edge, of keys and means
    of far cells, also at such a tile, where no cell is far, and of means at blocks that an edge cuts."""
    schedule, found = ScaleSchedule.square((1, 2, 3, 5, 8, 12)), []
    problem = AttentionProblem(schedule, 5, 2, 3, 32, "fp32", 0.25)
    q, k, v = problem.make_inputs(0)
    for variant in (
        Csla((-1, -1, -1, 3, 3, 3), 3, Tile(5, 8)),
        NearFar(3, 1, Tile(4, 4)), NearFar(4, 0, Tile(5, 8)), NearFar(12, 0, Tile(4, 4)), Pooled(3, 3),
    ):  # fmt: skip
        policy = Policy(("AAB",), (Rule(5, "A", variant),))
        attend = SparseAttention(policy, schedule, softmax_scale=0.25, launches={5: Launch(kernel)})
        tiles = [list(range(problem.num_queries))] if isinstance(variant, Pooled) else tile_lists(problem.grid, variant.tile)
        if isinstance(variant, Csla):
            read = csla_keys(schedule, 5, variant)
        elif isinstance(variant, Pooled):  # of three grids the blocks of 3x3 keys, of those before every key
            blocks = {(s, y // 3, x // 3) for s in (3, 4, 5) for y in range((5, 8, 12)[s - 3]) for x in range((5, 8, 12)[s - 3])}
            read = [[*range(1 + 4 + 9), *blocks]]
        else:
            read = [near_far_groups(variant, problem, queries) for queries in tiles]
        want = sum(len(queries) * len(each) for queries, each in zip(tiles, read, strict=True))
        found.append((counted(lambda: attend(q, k, v, 0, 5), run=kernel == "cpu").keys, 2 * 2 * want))  # noqa: B023
    return found


def test_keys_and_means_that_lists_name_are_counted():
    for got, want in pairs_read("cpu"):
        assert got == want


@pytest.mark.slow
def test_keys_and_means_that_lists_name_are_counted_on_a_gpu():
    for got, want in in_interpreter("test_regression", "t.pairs_read('triton')"):
        assert got == want


@pytest.mark.slow
def test_one_more_launch_on_a_gpu_is_caught():
    before, after = in_interpreter("test_regression", "t.more_launches()")
    assert (before["launches"], before["kernels"], before["tensors"]) == (1, 1, 1), "a layer is one launch and its output"
    assert (after["launches"], after["kernels"]) == (2, 2)


@pytest.mark.slow
def test_one_more_spill_is_caught():
    """The same kernel with a register less than it wants; compiled for a GPU that is not here."""
    pytest.importorskip("triton")
    from sparvar_kernels.backends.triton.binary import compile_for, resources

    case = CASES["decision scale 40: dense, mass, lists, residual"]
    problems = {s: case.problem(s) for s in range(len(case.schedule))}
    jobs = binaries.wanted(case.policy, problems, 0, case.scale_index, (9, 0))
    job = next(job for job in jobs if job.build.kernel.endswith("select_kernel"))
    found = []
    for limit in ((), (("maxnreg", 48),)):
        r = resources(compile_for(replace(job.build, options=(*job.build.options, *limit)), job.capability))
        found.append(
            binaries.facts("decide", {job: binaries.Compiled(r.registers, r.shared_bytes, r.spill_bytes, r.code)}, [job])
        )
    assert compare(found[0], found[0]).good
    lines = compare(*found).lines
    assert re.fullmatch(r"worse  decide: merged_select_kernel on sm_90: spilled bytes: was (\d+), is \d+, bound \1", lines[0])


def test_what_holds_elsewhere_is_not_compared_and_what_is_gone_is_said():
    was = [count("a", 1, "here"), count("b", 2, "here"), count("c", 3, "there")]
    found = compare(was, [count("a", 1, "here"), count("d", 9, "here")])
    assert [(c.verdict, c.what) for c in found.changes] == [("gone", "b")] and not found.good and found.same == 1
    assert found.elsewhere == (("there", 1),) and found.new == ("d",)
    assert "not compared: 1 facts under there" in found.lines[1] and "was not measured" in found.lines[0]


def test_runs_know_nothing_of_one_another(tmp_path):
    a, b = (replace(count("keys", 1, "torch 2"), of=run) for run in ("cpu/a.json", "cpu/b.json"))
    for fact in (a, b):
        baseline.save([fact], tmp_path / "b.json")
    both = baseline.load(tmp_path / "b.json").facts
    assert both == (a, b) and compare(both, [a]) == compare([a], [a]) and compare(both, [a]).good


def test_a_baseline_keeps_every_digit_and_other_machines_facts(tmp_path):
    path = tmp_path / "b.json"
    big, other = count("bytes", 10935344, "torch 2"), Fact("speed", 1.23456789, 1.2, 1.3, "x", "higher", 0.08, "a CPU")
    baseline.save([other], path)
    baseline.save([big], path)
    assert baseline.load(path).facts == (replace(other, value=1.23457), big)
    baseline.save([replace(big, value=5.0, low=5.0, high=5.0)], path)
    assert [fact.value for fact in baseline.load(path).facts] == [1.23457, 5]
    assert len(path.read_text().splitlines()) == 4, "a fact a line"


@pytest.mark.parametrize(("text", "said"), [
    ("{", "no baseline"), ('{"schema": 1}', "created: missing"),
    ('{"schema": 2, "created": "2026-11-27", "facts": []}', "schema"),
])  # fmt: skip
def test_a_damaged_baseline_is_one_line(tmp_path, text, said):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ProfileError, match=said) as refused:
        baseline.load(tmp_path / "b.json")
    assert "\n" not in str(refused.value)


def test_the_command(home, capsys, tmp_path, monkeypatch):
    """Words and JSON say the same; the exit code says whether something is worse."""
    keys = [7.0]
    monkeypatch.setattr(profile_facts, "called", lambda profile, row, gpu, what: [count(f"{what}: keys", keys[0], "here")])
    path = tmp_path / "b.json"
    words = ("bench", "--gpu", "cpu", "--model", "pocketvar", "--baseline", str(path))
    code, _, err = run(capsys, *words)
    assert code == 2 and "--write makes it" in err
    code, out, _ = run(capsys, *words, "--write")
    assert code == 0 and out.splitlines()[0] == "pocketvar scale 10: keys: 7" and "wrote 3 facts" in out
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.splitlines()[-1] == "0 of 3 facts became worse"
    keys[0] = 8.0
    code, out, _ = run(capsys, *words)
    assert code == 1 and "worse  pocketvar scale 12: keys: was 7, is 8, bound 7" in out and "3 of 3" in out
    code, out, err = run(capsys, *words, "--json")
    found = json.loads(out)
    assert code == found["exit_code"] == 1 and [c["now"] for c in found["compared"]["changes"]] == ["8"] * 3
    assert [f["value"] for f in found["facts"]] == [8, 8, 8] and "3 of 3 facts became worse" in err
    code, _, err = run(capsys, "bench", "--gpu", "cpu", "--model", "pocketvar", "--write")
    assert code == 2 and "want --baseline FILE" in err


def test_the_workflow_speaks_of_commands_there_are():
    text = (bench_baseline.BASELINE.parents[2] / "examples" / "ci.yml").read_text()
    lines = re.findall(r"sparvar-tune ((?:doctor|check|bench|verify)\b[^>\n]*)", text)
    assert len(lines) == 9 and text.count("sparvar-tune bench") == 4
    for line in lines:
        build_parser().parse_args(shlex.split(line))


def test_the_committed_baseline_is_sound():
    facts = baseline.load(bench_baseline.BASELINE).facts
    kinds = {fact.name.rpartition(": ")[2] for fact in facts}
    assert {"launches", "tensors", "bytes", "keys", "registers a thread", "shared bytes", "spilled bytes", "trials"} <= kinds
    targets = {name for fact in facts for name in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120") if f"on {name}:" in fact.name}
    assert len(targets) == 5 and sum(fact.better == "higher" for fact in facts) == 3
