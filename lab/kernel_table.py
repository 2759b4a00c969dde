"""Kernel benchmark: the issue's cases on this GPU, every baseline interleaved, against the machine's own limits.

    python -m lab.kernel_table --out reports/kernels-h100.md          measure, write the table and the raw JSON beside it
    python -m lab.kernel_table --from reports/kernels-h100.json ...   the table again from the raw numbers

A row is reported only when its output agreed with a reference computed from the same lists.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lab.peers import dense_ways, flashinfer_lists, flex128
from lab.recorded_spaces import File, TriedConfig, write_space
from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.triton.layer import Layer
from sparvar_kernels.backends.triton.work import shared_stage
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.policy import Policy, Rule, plan_layers
from sparvar_kernels.variants import Cs4a, Csla, Reuse, Variant
from sparvar_kernels.variants.csla.planner import csla_lists
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.launch_search.choose import legal, space
from sparvar_tune.launch_search.compiling import binaries, compile_all, compilers
from sparvar_tune.launch_search.layer_call import Bench, in_graph, variants_of
from sparvar_tune.measure.limits import machine_limits
from sparvar_tune.measure.timing import interleaved, paired_speedup, timing
from sparvar_tune.policy_search.menu import paper_policy, paper_windows
from sparvar_tune.profile.machine import version_of
from sparvar_tune.profile.schema import Speedup, Workload, one_line
from sparvar_tune.profile.store import write_atomic
from sparvar_tune.tracing.work import stage_work

ROUNDS = 30
DENSE = ("FA2", "cuDNN", "FA3")  # FlashAttention-2 and -3
# ways beside dense ones, and what a report says of them
BESIDE = (("Flex128", "the paper's FlexAttention form takes", "ours"),
          ("plain", "the kernel whose warps do all takes", "ours"),
          ("FlashInfer", "FlashInfer over the same lists, page size 1, takes", "ours"),
          ("efficient", "PyTorch's memory-efficient attention takes", "ours"),
          ("parts", "its parts one after the other take", "together"))  # fmt: skip
RECORDED = ("CSLA 8x8, last scale", "CSLA 8x8, with residual", "CSLA 8x8, scale 48", "CS4A 20 % 8x16",
            "CS4A 10 % 8x16, with residual", "HART CSLA 8x8, no text (9451 keys)")  # fmt: skip
SQUARE = MODELS["infinity-8b"].schedule()
HART_PAPER = ScaleSchedule.square((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))  # without text: 9451 keys


@dataclass(frozen=True)
class Case:
    """One policy of one layer at one scale. goal: what the row is held against, in words of the issue."""

    name: str
    schedule: ScaleSchedule
    scale_index: int
    heads: int
    head_dim: int
    dtype: str
    logit_bound: float | None
    policy: Policy
    goal: str = ""
    flex: bool = False
    lists: bool = False  # others may run over its key lists, too
    decision: bool = False  # time the decision scale itself
    without: Variant | None = None  # the same without its residual, to be timed beside it

    @property
    def file(self) -> str:
        """Of its recorded space."""
        return f"{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}.json"

    @property
    def policy_without(self) -> Policy | None:
        return None if self.without is None else Policy.uniform(1, self.heads, {self.scale_index: self.without})

    def problem(self, scale_index: int) -> AttentionProblem:
        """Its attention call at a scale: one image's two guidance halves, cosine attention where there is a bound."""
        scale = 1.0 if self.logit_bound else self.head_dim**-0.5
        return AttentionProblem(
            self.schedule, scale_index, 2, self.heads, self.head_dim, self.dtype, scale, self.logit_bound
        )  # fmt: skip


def _csla(schedule: ScaleSchedule, tile: Tile, decision: int | None = None, sinks: int = 5) -> Csla:
    return Csla(paper_windows(schedule), sinks, tile, decision_scale=decision)


def _one(
    name: str, variant: Variant, goal: str, scale: int = 12, flex: bool = False, bound: float | None = 20.0, lists: bool = False,
    without: Variant | None = None,
) -> Case:  # fmt: skip
    policy = Policy.uniform(1, 28, {scale: variant})
    return Case(name, SQUARE, scale, 28, 128, "bf16", bound, policy, goal, flex, lists, without=without)


def _hart(name: str, schedule: ScaleSchedule, variant: Variant, goal: str) -> Case:
    last = len(schedule) - 1
    return Case(name, schedule, last, 24, 64, "fp16", None, Policy.uniform(1, 24, {last: variant}), goal)


def cases() -> list[Case]:
    """The table's rows."""
    mixed = Policy(
        ("A" * 14 + "B" * 9 + "C" * 5,),
        (Rule(12, "A", _csla(SQUARE, Tile(8, 16))), Rule(12, "B", Cs4a(10, 0.1, Tile(8, 16), residual=False))),
    )
    decision = Policy.uniform(1, 28, {12: Cs4a(10, 0.1, Tile(8, 16), sample=4), 11: Cs4a(10, 0.1, Tile(6, 12), sample=4)})
    rules = paper_policy(SQUARE, 40, 28).rules
    papers = Policy.uniform(1, 28, {r.scale_index: r.variant for r in rules if isinstance(r.variant, Cs4a)})
    hart = MODELS["hart"].schedule()
    return [
        _one("CSLA 8x8, last scale", _csla(SQUARE, Tile(8, 8)), ">= 20x FA2, >= 3x Flex, >= 11x cuDNN", flex=True),
        _one("CSLA 8x16, last scale", _csla(SQUARE, Tile(8, 16)), ">= 20x FA2, >= 11x cuDNN", lists=True),
        _one("CSLA 8x8, no logit bound", _csla(SQUARE, Tile(8, 8)), "what the bound is worth", bound=None),
        _one("CSLA 8x8, with residual", _csla(SQUARE, Tile(8, 8), 10), "<= 1.06x of CSLA 8x8",
             without=_csla(SQUARE, Tile(8, 8))),
        _one("CSLA 8x16, with residual", _csla(SQUARE, Tile(8, 16), 10), "<= 1.06x of CSLA 8x16",
             without=_csla(SQUARE, Tile(8, 16))),
        _one("CSLA 8x8, scale 40", _csla(SQUARE, Tile(8, 8)), ">= 6x FA2", 10),
        _one("CSLA 8x8, scale 48", _csla(SQUARE, Tile(8, 8)), ">= 10x FA2", 11),
        _one("CS4A 20 % 8x16", Cs4a(10, 0.2, Tile(8, 16), residual=False), ">= 6.5x FA2, >= 85 % of cuDNN's rate",
             lists=True),
        _one("CS4A 10 % 8x16", Cs4a(10, 0.1, Tile(8, 16), residual=False), ">= 11x FA2, >= 85 % of cuDNN's rate",
             lists=True),
        _one("CS4A 10 % 8x16, with residual", Cs4a(10, 0.1, Tile(8, 16)), "<= 1.06x of CS4A 10 % 8x16",
             without=Cs4a(10, 0.1, Tile(8, 16), residual=False)),
        _one("CS4A 10 % 8x8, with residual", Cs4a(10, 0.1, Tile(8, 8)), ">= 8x FA2, <= 1.06x of CS4A 10 % 8x8",
             without=Cs4a(10, 0.1, Tile(8, 8), residual=False)),
        _one("reuse", Reuse(10), ""),
        _hart("HART CSLA 8x8, 300 text tokens", hart, _csla(hart, Tile(8, 8), sinks=4), ""),
        _hart("HART CSLA 8x8, no text (9451 keys)", HART_PAPER, _csla(HART_PAPER, Tile(8, 8)), ">= 18x FA2"),
        Case("decision scale 40: dense, mass, lists, residual", SQUARE, 10, 28, 128, "bf16", 20.0, decision, "<= 1.45x cuDNN",
             decision=True),
        Case("decision scale 40 in the paper's form: mass of every query", SQUARE, 10, 28, 128, "bf16", 20.0, papers, "",
             decision=True),
        Case("CSLA 8x8, last scale, fp32", SQUARE, 12, 28, 128, "fp32", 20.0,
             Policy.uniform(1, 28, {12: _csla(SQUARE, Tile(8, 8))}), ""),
        Case("mixed: 14 CSLA, 9 CS4A, 5 dense heads", SQUARE, 12, 28, 128, "bf16", 20.0, mixed, "<= sum of its parts"),
    ]  # fmt: skip


def work_of(case: Case, attend: SparseAttention, problem: AttentionProblem) -> tuple[float, float]:
    """(FLOPs, bytes) the sparse heads must spend."""
    layer: Any = next(iter(attend._layers.values()))[0]
    spent = [stage_work(stage, problem) for (scale, _), (stage, _) in layer.stages.items() if scale == case.scale_index]
    return sum(w.flops for w in spent), sum(w.moved for w in spent)


def error_of(case: Case, attend: SparseAttention, bench: Bench, samples: int = 12) -> float:
    """Largest relative error of sampled programs against fp32 attention over the lists they were given."""
    p, out = bench.problem, bench.call(attend).float()
    layer: Any = next(iter(attend._layers.values()))[0]
    worst = 0.0
    for (scale, decision), (stage, _) in layer.stages.items():
        if scale != case.scale_index:
            continue
        table, keys = stage.table.cpu().tolist(), stage.keys.cpu().long()
        for i in range(0, len(table), max(1, len(table) // samples)):
            head, origin, width, first, end, at, step, count, slot, to = table[i][:10]
            b = i % p.batch
            m = torch.arange(first, end)
            rows = (origin + m // width * p.grid[1] + m % width).cuda()
            listed = keys[at + b * step : at + b * step + count].cuda()
            if len(listed.unique()) != count:
                return float("inf")
            want = torch.zeros(len(rows), p.head_dim, device="cuda")
            if count:
                s = bench.q[b, head][rows].float() @ bench.k[b, head][listed].float().T * p.softmax_scale
                want = torch.softmax(s, -1) @ bench.v[b, head][listed].float()
            if slot >= 0:
                source = layer.residuals[decision][b, slot].float().view(1, *p.schedule.grids[decision], p.head_dim)
                grown = torch.nn.functional.interpolate(source.permute(0, 3, 1, 2), p.grid, mode="bilinear")
                want = want + grown[0].permute(1, 2, 0).reshape(-1, p.head_dim)[rows]
            worst = max(worst, float((out[b, to][rows] - want).norm() / want.norm()))
    return worst


def _ranked(case: Case, bench: Bench) -> list[TritonConfig]:
    """Configurations, the fastest first."""
    screened = []
    for candidate in case_space(case, bench.problem):
        attend = bench.attention(candidate)
        screened.append((median(interleaved({"this": lambda: bench.call(attend)}, 8)["this"]), candidate))  # noqa: B023
    return [config for _, config in sorted(screened, key=lambda at: at[0])]


def measure_case(case: Case) -> dict[str, Any]:
    """One row's raw numbers; "error" names what went wrong instead."""
    problems = {s: case.problem(s) for s in range(len(case.schedule))}
    bench = Bench(case.policy, problems, 0, case.scale_index)
    ranked = _ranked(case, bench)
    best = ranked[0]
    attend = bench.attention(best)
    worst = error_of(case, attend, bench) if not case.decision else _dense_error(bench, attend)
    raw: dict[str, Any] = {"case": case.name, "goal": case.goal, "config": vars(best), "relative_error": worst}
    if not worst < 0.01:
        return raw | {"error": f"relative error {worst:.2e} against its reference: not timed"}
    ways = dense_ways(bench.problem, bench.q, bench.k, bench.v) | {"ours": lambda: bench.call(attend)}
    if case.flex:
        ways["Flex128"] = flex128(bench.problem, bench.q, bench.k, bench.v)
    if best.fetchers:
        plain = bench.attention(next(config for config in ranked if not config.fetchers))
        ways["plain"] = lambda: bench.call(plain)
    if case.lists and (others := _over_lists(case, bench)):
        ways["FlashInfer"] = others
    if case.policy_without is not None:
        inputs = bench.q, bench.k, bench.v
        other = Bench(case.policy_without, problems, 0, case.scale_index, inputs)
        less = other.attention(_ranked(case, other)[0])
        ways["without"] = lambda: other.call(less)
        ways |= {f"{name}, graph": in_graph(ways[name], 1) for name in ("ours", "without")}
    if case.name.startswith("mixed"):
        ways["parts"] = _parts(case, bench, best)
    spent = interleaved(ways, ROUNDS)
    flops, moved = (0.0, 0.0) if case.decision else work_of(case, attend, bench.problem)
    return raw | {"ms": spent, "flops": flops, "bytes": moved}


def _over_lists(case: Case, bench: Bench) -> Callable[[], object] | None:
    """FlashInfer on the lists of 128 rows, its output held against ours."""
    attend = bench.attention(TritonConfig(128, 32, 8, 5))
    ours = bench.call(attend)
    layer: Any = next(iter(attend._layers.values()))[0]
    (stage,) = (stage for (scale, _), (stage, _) in layer.stages.items() if scale == case.scale_index)
    return flashinfer_lists(stage, bench.problem, bench.q, bench.k, bench.v, ours)


def _dense_error(bench: Bench, attend: SparseAttention) -> float:
    out, want = bench.call(attend).float(), bench.dense()
    return float((out - want.float()).norm() / want.float().norm())


def _parts(case: Case, bench: Bench, config: TritonConfig) -> Callable[[], object]:
    """The same heads, every variant as a call of its own on its heads alone."""
    calls: list[Callable[[], Tensor]] = []
    letters = case.policy.heads[0]
    for letter in sorted(set(letters)):
        heads = [i for i, x in enumerate(letters) if x == letter]
        part = slice(heads[0], heads[-1] + 1)
        rule = {r.scale_index: r.variant for r in case.policy.rules if r.head_class == letter}
        problems = {s: replace(p, heads=len(heads)) for s, p in bench.problems.items()}
        inputs = (bench.q[:, part], bench.k[:, part], bench.v[:, part])
        one = Bench(Policy.uniform(1, len(heads), rule), problems, 0, case.scale_index, inputs)
        attend = one.attention(config)
        calls.append(lambda one=one, attend=attend: one.call(attend))  # type: ignore[misc]
    return lambda: [call() for call in calls]


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("  ")[1].strip()
    except (OSError, IndexError):
        return None


def _host_us(call: Callable[[], object]) -> dict[str, Any]:
    """Host microseconds of a call, as a timing."""
    took = []
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(50):
            call()
        took.append((time.perf_counter() - begun) / 50 * 1e6)
    return timing(took).__dict__


def host_costs() -> dict[str, Any]:
    """Host microseconds of a call (small problem, so that the GPU is never behind), planning, graph and compile checks."""
    schedule = ScaleSchedule.square((1, 2, 4, 6, 8, 12))
    problem = AttentionProblem(schedule, 5, 2, 4, 128, "bf16", 1.0, 20.0)
    variant = Csla((-1, -1, 1, 1, 3, 5), 2, Tile(4, 4))
    bench = Bench(Policy.uniform(1, 4, {5: variant}), {5: problem}, 0, 5)
    attend = bench.attention(TritonConfig())
    for _ in range(20):
        bench.call(attend)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found: dict[str, Any] = {
        "call_us": _host_us(lambda: attend(bench.q, bench.k, bench.v, 0, 5)),
        "sdpa_us": _host_us(lambda: sdpa(bench.q, bench.k, bench.v)),
    }
    graph = torch.cuda.CUDAGraph()
    want = bench.call(attend).clone()
    with torch.cuda.graph(graph):
        out = bench.call(attend)
    bench.q.mul_(1.0)
    graph.replay()
    torch.cuda.synchronize()
    found["graph_equals_eager"] = bool(torch.equal(out, want))
    try:
        compiled = torch.compile(lambda q, k, v: attend(q * 1, k, v, 0, 5) + 1, fullgraph=True)
        found["compile_equals_eager"] = bool(torch.equal(compiled(bench.q, bench.k, bench.v), want + 1))
    except Exception as error:  # reported, not hidden
        found["compile_equals_eager"] = f"{type(error).__name__}: {str(error)[:200]}"
    plan = []
    for _ in range(7):
        csla_lists.cache_clear()
        begun = time.perf_counter()
        csla_lists(SQUARE, 12, _csla(SQUARE, Tile(8, 8)), "cuda")
        torch.cuda.synchronize()
        plan.append((time.perf_counter() - begun) * 1e3)
    found["csla_lists_ms"] = timing(plan).__dict__
    found["plan_image_ms"] = _plan_image_ms()
    return found


def _plan_image_ms() -> float:
    """Host milliseconds of all tables and lists of an Infinity-8B by the paper's policy: what a process pays once."""
    model = MODELS["infinity-8b"]
    policy = paper_policy(SQUARE, model.layers, model.heads)
    problems = list(Workload.of(model, model.default_resolution, model.default_aspect).problems().values())
    csla_lists.cache_clear()
    shared_stage.cache_clear()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for plans in plan_layers(policy, SQUARE):
        layer = Layer(plans, problems, [TritonConfig()] * len(problems), "cuda")
        for s in range(len(problems)):
            layer.prepare(s)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


def case_space(case: Case, problem: AttentionProblem) -> list[TritonConfig]:
    """Configurations worth trying: no program larger than a query tile."""
    capability = torch.cuda.get_device_capability()
    if case.decision:  # of its sparse pass
        return [c for c in legal(problem, capability) if c.fetchers or c == TritonConfig()]
    rows = max((v.tile or Tile(0, 128)).rows for v in variants_of(case.policy, 0, case.scale_index))
    return [c for c in space(problem, capability) if c.block_m <= max(64, rows)]


def record_space(case: Case) -> File:
    """The time of every legal configuration of a case, none pruned, all in one interleaved run: what `replay` reads."""
    bench = Bench(case.policy, {s: case.problem(s) for s in range(len(case.schedule))}, 0, case.scale_index)
    capability = torch.cuda.get_device_capability()
    configs = legal(bench.problem, capability)
    choices = {name: sorted({getattr(c, name) for c in configs}) for name in sorted(vars(TritonConfig()))}
    jobs = [b for c in configs for b in binaries(case.policy, bench.problems, 0, case.scale_index, c, capability)]
    with compilers(os.cpu_count() or 2) as pool:
        compile_all(jobs, pool, lambda text: None)
    ways: dict[str, Callable[[], object]] = {}
    failures: dict[int, str] = {}
    for i, config in enumerate(configs):
        try:
            attend = bench.attention(config)
            bench.call(attend)
            torch.cuda.synchronize()
            ways[str(i)] = lambda attend=attend: bench.call(attend)  # type: ignore[misc]
        except Exception as error:  # out of registers: data, not the end
            failures[i] = one_line(f"{type(error).__name__}: {error}")[:200]
    spent = interleaved(ways, ROUNDS)
    rows = []
    for i, config in enumerate(configs):
        point = {name: getattr(config, name) for name in choices}
        t = timing(spent[str(i)]) if i not in failures else None
        rows.append(
            TriedConfig(point, t.p20_ms, t.p50_ms, t.p80_ms, t.n, None)
            if t
            else TriedConfig(point, None, None, None, None, failures[i])
        )
    return File(1, torch.cuda.get_device_name(), case.name, "ms", choices, tuple(rows))


def measure_all(say: Callable[[str], None], keep: Callable[[dict[str, Any]], None], only: str = "") -> dict[str, Any]:
    """Every case whose name contains `only`; raw numbers as JSON values, handed to `keep` after every case."""
    chosen = [c for c in cases() if only in c.name]
    jobs = []
    for case in chosen:
        problems = {s: case.problem(s) for s in range(len(case.schedule))}
        for policy in filter(None, (case.policy, case.policy_without)):
            for config in case_space(case, problems[case.scale_index]):
                jobs += binaries(policy, problems, 0, case.scale_index, config, torch.cuda.get_device_capability())
    begun = time.monotonic()
    with compilers(os.cpu_count() or 2) as pool:
        compile_all(jobs, pool, say)
    raw: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version_of("triton"),
        "driver": _driver(), "date": datetime.date.today().isoformat(), "compile_s": time.monotonic() - begun,
        "binaries": len(set(jobs)), "limits": vars(machine_limits("cuda")), "host": host_costs(), "rows": [],
    }  # fmt: skip
    for i, case in enumerate(chosen):
        say(f"case {i + 1}/{len(chosen)}: {case.name}")
        try:
            raw["rows"].append(measure_case(case))
        except Exception as error:  # one case's failure does not cost the others
            raw["rows"].append({"case": case.name, "goal": case.goal, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        keep(raw)
    return raw


def _ratio(s: Speedup) -> str:
    return f"{s.median:.2f} ({s.low:.2f}..{s.high:.2f})"


def render(raw: dict[str, Any]) -> str:
    """The Markdown table of raw numbers."""
    limits, host = raw["limits"], raw["host"]
    call, plan = host["call_us"], host["csla_lists_ms"]
    beside = f", of PyTorch's dense one {host['sdpa_us']['p50_ms']:.1f} us" if "sdpa_us" in host else ""
    lines = [
        f"# Kernels on {raw['gpu']}", "",
        f"torch {raw['torch']}, triton {raw.get('triton')}, driver {raw.get('driver')}, {raw.get('date')}. Batch 2, Infinity-8B "
        "28 heads x 128 in bf16 with |logit| <= 20, HART 24 heads x 64 in fp16 without a bound; random data. Milliseconds "
        "p50 (p20..p80) by device events, every way of a row called in turn, "
        f"n = {ROUNDS}; ratios are medians of paired calls with 95 % intervals. Limit: the larger of listed bytes over this "
        f"machine's copy rate ({limits['copy_bytes_per_s'] / 1e12:.2f} TB/s) and useful FLOPs over its own matrix-product rate "
        f"({limits['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s). Regenerate: "
        "`python -m lab.kernel_table --from` the JSON beside this.", "",
        f"| case | ours | {' | '.join((*DENSE, *(f'x {name}' for name in DENSE)))} | useful TFLOP/s | of limit | goal "
        "| configuration |", "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    notes = []
    for row in raw["rows"]:
        if "error" in row:
            notes.append(f"- {row['case']}: {row['error']}")
            continue
        ms = row["ms"]
        ours = timing(ms["ours"])
        dense = [f"{timing(ms[name]).p50_ms:.3f}" if name in ms else "-" for name in DENSE]
        ratios = [_ratio(paired_speedup(ms[name], ms["ours"])) if name in ms else "-" for name in DENSE]
        bound = max(row["bytes"] / limits["copy_bytes_per_s"], row["flops"] / limits["gemm_flops_per_s"]) * 1e3
        rate = f"{row['flops'] / ours.p50_ms / 1e9:.0f}" if row["flops"] else "-"
        share = f"{bound / ours.p50_ms:.0%} of {bound:.3f}" if bound and "FA2" in ms else "-"  # the rates are those of bf16
        config = " ".join(f"{k.removeprefix('num_')}={v}" for k, v in row["config"].items())
        lines.append(
            f"| {row['case']} | {ours.p50_ms:.4f} ({ours.p20_ms:.4f}..{ours.p80_ms:.4f}) | {' | '.join([*dense, *ratios])} "
            f"| {rate} | {share} | {row['goal']} | {config} |"
        )
        for way, words, whose in BESIDE:
            if way in ms:
                over = paired_speedup(ms[way], ms["ours"])
                notes.append(f"- {row['case']}: {words} {timing(ms[way]).p50_ms:.3f} ms: {whose} {over.median:.2f}x "
                             f"({over.low:.2f}..{over.high:.2f}).")  # fmt: skip
        for kind, words in (("", "calls"), (", graph", "CUDA graphs")):
            if f"without{kind}" in ms:
                over = paired_speedup(ms[f"ours{kind}"], ms[f"without{kind}"])
                alone = f"{timing(ms[f'without{kind}']).p50_ms:.4f} ms"
                notes.append(f"- {row['case']}: without it, at its own best configuration, {alone} in {words}: it adds "
                             f"{over.median - 1:.1%} ({over.low - 1:.1%}..{over.high - 1:.1%}).")  # fmt: skip
    if "note" in raw:
        notes.append(f"- {raw['note']}")
    lines += ["", *notes, "",
              f"Host time of a call: {call['p50_ms']:.1f} us (p20 {call['p20_ms']:.1f}, p80 {call['p80_ms']:.1f}){beside}. "
              f"Window lists of the last scale, from nothing to the device: {plan['p50_ms']:.2f} ms; all tables and lists of "
              f"an Infinity-8B by the paper's policy, once a process: {host['plan_image_ms']:.0f} ms. CUDA graph equals eager: "
              f"{host['graph_equals_eager']}. torch.compile(fullgraph=True) equals eager: {host['compile_equals_eager']}. "
              f"{raw['binaries']} binaries compiled in {raw['compile_s']:.0f} s."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measures the table here, or writes it again from the raw numbers of a run."""
    parser = argparse.ArgumentParser(prog="python -m lab.kernel_table", description="kernels against every baseline on this GPU")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file; the raw numbers go beside it as JSON")
    parser.add_argument("--from", dest="source", type=Path, help="write the table again from this JSON instead of measuring")
    parser.add_argument("--spaces", type=Path, help="folder: also record whole launch spaces there, for lab.sampler_study")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args(argv)
    out = args.out.with_suffix(".md")
    if args.source is not None:
        try:
            text = render(json.loads(args.source.read_text("utf-8")))
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            parser.error(f"{args.source}: not the raw numbers of a run ({type(error).__name__}: {error})")
        write_atomic(out, text.encode())
        print(f"wrote {out}")
        return
    if not torch.cuda.is_available():
        parser.error("no GPU in this machine; run it where one is, or give --from FILE.json")

    def keep(raw: dict[str, Any]) -> None:
        write_atomic(out.with_suffix(".json"), (json.dumps(raw, indent=1) + "\n").encode())
        write_atomic(out, render(raw).encode())

    measure_all(print, keep, args.only)
    print(f"wrote {out} and {out.with_suffix('.json')}")
    for case in cases() if args.spaces else ():
        if case.name in RECORDED and args.only in case.name:
            write_space(record_space(case), args.spaces / case.file)
            print(f"wrote {args.spaces / case.file}")


if __name__ == "__main__":
    main()
