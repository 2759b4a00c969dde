"""The schedule of one GPU: for each sparse scale of a policy the launch configuration that runs it fastest there.

Inputs are random (times of these kernels do not depend on values), shapes and policy are the model's. First the default
configuration of every scale, in alternation with dense attention: a usable profile within seconds. Then binaries are made,
each once, by processes that never touch the GPU; every configuration that the cost model does not rule out gets a short look;
the best few run again in alternation with the default and with dense attention.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.registry import default_config, why_not
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.launch_search.compiling import Binary, Compiled, binaries, machine_code, row_binaries
from sparvar_tune.launch_search.cost_model import BYTES, Taken, keep_likely, key_of, may_prune, scale_ms
from sparvar_tune.launch_search.layer_call import distinct_layers
from sparvar_tune.launch_search.log import Workshop
from sparvar_tune.launch_search.timing_task import Clocks, Task, Times
from sparvar_tune.measure.timing import paired_speedup, timing
from sparvar_tune.profile.schema import MachineCode, Row, Workload

DENSE_NAME = "cuDNN through torch"
SCREENED, FINALISTS, ROUNDS = 8, 4, 30  # calls of the first look; who gets a second; rounds of that
KINDS = 3  # kinds of layers a first look is taken at; the second is taken at all
STEADY, LOOKS = 0.05, 3  # how far the halves of a final may lie apart, and how often one is measured before it is left so
Code = tuple[str, ...] | None  # of every binary a configuration needs; None where one failed


def combinations(choices: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Every combination of one choice for each name, the last name's changing fastest."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def legal(problem: AttentionProblem, capability: tuple[int, int] | None) -> list[TritonConfig]:
    """Every legal configuration: of launches whose warps do all, then of those whose warps fetch or multiply."""
    plain = (TritonConfig(**values) for values in combinations(TritonConfig.space()))
    return [c for c in (*plain, *TritonConfig.fetching(problem)) if not why_not(problem, "triton", c, capability)]


def space(problem: AttentionProblem, capability: tuple[int, int] | None) -> list[TritonConfig]:
    """Every legal configuration worth trying.

    Eight warps want 128 rows (a warp group of four works on 64), and only they gain from a register limit: two programs
    then fit on a multiprocessor. Pipelines of fewer than five stages never won on Hopper. There warps that only fetch mostly do.
    """
    return [c for c in legal(problem, capability) if c.fetchers or (c.num_warps * 16 <= c.block_m
            and (c.num_warps == 8 or not c.maxnreg) and c.num_stages >= 5)]  # fmt: skip


@dataclass(frozen=True)
class ChosenLaunches:
    """The rows of a schedule, how many configurations were timed for them, and what a reader of the profile should know."""

    rows: tuple[Row, ...]
    tried: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scale:
    """One sparse scale of a policy: its kinds of layers (first of each -> how many), and what may be launched there."""

    index: int
    kinds: Mapping[int, int]
    configs: tuple[TritonConfig, ...]
    default: TritonConfig


class LaunchSearch:
    """The rows of `policy` on `workload`, measured by a workshop. `say` prints a line to keep, `status` one to overwrite."""

    def __init__(
        self, workload: Workload, policy: Policy, gpu: Gpu, capability: tuple[int, int], workshop: Workshop,
        say: Callable[[str], None], status: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.workload, self.policy, self.gpu, self.capability = workload, policy, gpu, capability
        self.workshop, self.say, self.status = workshop, say, status
        self.begun = time.monotonic()
        self.clocks: list[Clocks] = []
        self.setup_ms: dict[int, float] = {}
        self.doubts: dict[int, str] = {}
        self.taken: dict[str, Taken] = {}
        self.looked = 0  # configurations that were timed
        self.scales: list[Scale] = []
        for s in sorted({r.scale_index for r in policy.rules}):
            configs = tuple(space(workload.problem(s), capability))
            if not configs:
                raise ValueError(f"scale {s}: no launch configuration is legal on {gpu.slug}; add one to TritonConfig.space")
            usual = default_config(workload.problem(s), "triton", capability)
            default = usual if usual in configs else configs[0]
            self.scales.append(Scale(s, distinct_layers(policy, s), configs, default))

    def find(self, keep: Callable[[ChosenLaunches], None]) -> ChosenLaunches:
        """The fastest rows; `keep` gets those of the default configurations as soon as they are timed."""
        self._first(keep)
        compiled = self._compile({scale.index: scale.configs for scale in self.scales})
        rows = self._finals(self._screen(compiled))
        for row in rows:
            assert row.tuned and row.dense and row.speedup
            gain = row.speedup
            config = ", ".join(f"{k}={v}" for k, v in row.config)
            self._tell(f"scale {row.scale_index}: {row.dense.p50_ms:.3f} -> {row.tuned.p50_ms:.3f} ms a layer, "
                       f"{gain.median:.2f}x ({gain.low:.2f}..{gain.high:.2f}) with {config}")  # fmt: skip
        return ChosenLaunches(tuple(rows), self.looked, self._notes())

    def _first(self, keep: Callable[[ChosenLaunches], None]) -> None:
        """Times the default configurations: a usable profile for whoever stops here. One that does not run ends nothing."""
        compiled = self._compile({scale.index: [scale.default] for scale in self.scales})
        if None in compiled.values():
            return
        try:
            rows = self._finals({scale: [scale.default] for scale in self.scales})
        except ValueError as error:
            self._tell(f"no first profile: {error}")
            return
        keep(ChosenLaunches(tuple(rows), len(rows), (*self._notes(), "best so far: only the default configurations were timed")))
        self._tell(f"{len(rows)} scales timed with the default configuration")

    def _compile(self, configs: Mapping[int, Sequence[TritonConfig]]) -> dict[tuple[int, TritonConfig], Code]:
        """(scale, configuration) -> the code that runs it. Equal codes run alike."""
        wanted = {(scale.index, c): self._binaries(scale, c) for scale in self.scales for c in configs[scale.index]}
        made = self.workshop.compile((b for group in wanted.values() for b in group), self.status)
        self._note_taken(wanted, made)
        failed = [m for m in made.values() if m.failure]
        self._tell(f"{len(made)} binaries, {len(failed)} failed" + (f": {failed[0].failure}" if failed else ""))
        return {
            at: None if any(made[b].failure for b in group)
            else (str(at[1].block_m), *(f"{made[b].code} {made[b].registers} {made[b].shared_bytes}" for b in group))
            for at, group in wanted.items()
        }  # fmt: skip

    def _note_taken(self, wanted: Mapping[tuple[int, TritonConfig], list[Binary]], made: Mapping[Binary, Compiled]) -> None:
        """What binaries take, for predictions."""
        for (_, config), group in wanted.items():
            for b in group:
                key = key_of(b.build.kernel, dict(b.build.constants), self.workload.dtype, config, self.capability)
                if key and not made[b].failure:
                    self.taken[key] = Taken(made[b].registers, made[b].shared_bytes, made[b].spill_bytes)

    def _likely(self, scale: Scale, configs: Sequence[TritonConfig]) -> list[TritonConfig]:
        """Those that may be the fastest by the cost model, where it was tested; elsewhere, and where warps fetch, all of them."""
        problems = self.workload.problems()
        known = [c for c in configs if not c.fetchers]
        if not may_prune(problems[scale.index], self.gpu) or len(known) < 2:
            return list(configs)
        try:
            likely = keep_likely({
                c: scale_ms(self.policy, problems, scale.kinds, scale.index, c, self.gpu, self.taken) for c in known
            })  # fmt: skip
        except KeyError:  # a launch whose binary the model does not know: look at everything
            return list(configs)
        return [c for c in configs if c.fetchers or c in likely]

    def _binaries(self, scale: Scale, config: TritonConfig) -> list[Binary]:
        problems = self.workload.problems()
        found = (binaries(self.policy, problems, layer, scale.index, config, self.capability) for layer in scale.kinds)
        return list(dict.fromkeys(b for group in found for b in group))

    def _screen(self, compiled: Mapping[tuple[int, TritonConfig], Code]) -> dict[Scale, list[TritonConfig]]:
        """The finalists of every scale, by a short look at each distinct binary; the default stays pinned."""
        groups: dict[Task, Scale] = {}
        same = pruned = 0
        for scale in self.scales:
            distinct: dict[tuple[str, ...], TritonConfig] = {}
            for c in scale.configs:
                code = compiled[scale.index, c]
                same += code in distinct
                if code is not None:
                    distinct.setdefault(code, c)
            likely = self._likely(scale, list(distinct.values()))
            pruned += len(distinct) - len(likely)
            for layer in self._looked_at(scale):
                groups[Task(scale.index, layer, tuple(likely), SCREENED, False)] = scale
        spent: dict[tuple[Scale, TritonConfig], float] = {}
        failed = 0
        for task, times in self._looks(list(groups)).items():
            scale = groups[task]
            for config, ms in zip(task.configs, times, strict=True):
                failed += ms == float("inf")
                spent[scale, config] = spent.get((scale, config), 0.0) + ms * scale.kinds[task.layer]
        self.looked = len(spent)
        self._tell(f"{self.looked} configurations looked at, {same} equal to another's binary, {pruned} predicted too slow, "
                   f"{failed} failed")  # fmt: skip
        finalists = {}
        for scale in self.scales:
            ran = sorted((ms, i, c) for i, ((at, c), ms) in enumerate(spent.items()) if at is scale and ms < float("inf"))
            best = [c for _, _, c in ran[:FINALISTS]]
            pinned = [scale.default] if compiled[scale.index, scale.default] is not None and scale.default not in best else []
            finalists[scale] = best + pinned
            if not finalists[scale]:
                raise ValueError(f"scale {scale.index}: no configuration runs on this GPU")
        return finalists

    def _looks(self, groups: list[Task]) -> dict[Task, list[float]]:
        """Median time of every configuration of every group (infinite: it failed).

        A group is one task, for one worker to set up once. Where one of it fails, each is tried alone.
        """
        found = self.workshop.time(groups, self.workload, self.policy, self.status)
        broken = [task for task in groups if isinstance(found[task], str)]
        alone = {(task, c): replace(task, configs=(c,)) for task in broken for c in task.configs}
        found |= self.workshop.time(list(alone.values()), self.workload, self.policy, self.status)

        def medians(times: Times | str) -> list[float]:
            return [float("inf")] if isinstance(times, str) else [median(ms) for ms in times.tuned_ms]

        return {
            task: [medians(found[alone[task, c]])[0] for c in task.configs] if task in broken else medians(found[task])
            for task in groups
        }

    def _looked_at(self, scale: Scale) -> list[int]:
        kinds = list(scale.kinds)
        return kinds if len(kinds) <= KINDS else [kinds[i * (len(kinds) - 1) // (KINDS - 1)] for i in range(KINDS)]

    def _finals(self, finalists: Mapping[Scale, list[TritonConfig]]) -> list[Row]:
        """The row of every scale; a time that is not steady or not possible is measured again."""
        rows: dict[int, Row] = {}
        for again in range(LOOKS):
            open_scales = {s: c for s, c in finalists.items() if s.index not in rows or s.index in self.doubts}
            tasks = {
                (scale, layer): Task(scale.index, layer, tuple(configs), ROUNDS, True, again)
                for scale, configs in open_scales.items() for layer in scale.kinds
            }  # fmt: skip
            found = self.workshop.time(list(tasks.values()), self.workload, self.policy, self.status)
            for scale, configs in open_scales.items():
                rows[scale.index] = self._row(scale, configs, {layer: found[tasks[scale, layer]] for layer in scale.kinds})
        return [rows[s] for s in sorted(rows)]

    def _row(self, scale: Scale, configs: Sequence[TritonConfig], found: Mapping[int, Times | str]) -> Row:
        """The best of `configs`, means over layers; notes a doubt about it."""
        dense, tuned = [0.0] * ROUNDS, [[0.0] * ROUNDS for _ in configs]
        for layer, count in scale.kinds.items():
            times = found[layer]
            if isinstance(times, str):
                return self._apart(scale, configs, times)
            share = count / len(self.policy.heads)
            dense = [a + share * ms for a, ms in zip(dense, times.dense_ms, strict=True)]
            tuned = [
                [a + share * ms for a, ms in zip(sums, new, strict=True)] for sums, new in zip(tuned, times.tuned_ms, strict=True)
            ]
            self.clocks += [times.clocks] if times.clocks else []
            self.setup_ms[scale.index] = max(times.setup_ms, self.setup_ms.get(scale.index, 0.0))
        won = min(range(len(configs)), key=lambda i: median(tuned[i]))
        self.doubts.pop(scale.index, None)
        if doubt := self._doubt(scale, dense, tuned[won]):
            self.doubts[scale.index] = doubt
        return Row(
            scale.index, "triton", configs[won].to_row(), "measured", self.dense_name,
            timing(tuned[won]), timing(dense), paired_speedup(dense, tuned[won]), mode=self.workshop.identity.mode,
            binary=self._machine_code(scale, configs[won]),
        )  # fmt: skip

    def _machine_code(self, scale: Scale, config: TritonConfig) -> MachineCode | None:
        """What the row launches, compiled before it was timed."""
        wanted = row_binaries(self.policy, self.workload.problems(), scale.kinds, scale.index, config, self.capability)
        return machine_code(self.workshop.compile(wanted, self.status), wanted, self.workshop.identity.triton)

    def _apart(self, scale: Scale, configs: Sequence[TritonConfig], failure: str) -> Row:
        """A final that failed as a whole, each configuration by itself: one of them may be the cause."""
        if len(configs) == 1:
            raise ValueError(f"scale {scale.index}: the configuration {vars(configs[0])} does not run: {failure}")
        rows = []
        for config in configs:
            tasks = {layer: Task(scale.index, layer, (config,), ROUNDS, True) for layer in scale.kinds}
            found = self.workshop.time(list(tasks.values()), self.workload, self.policy, self.status)
            if not any(isinstance(found[t], str) for t in tasks.values()):
                rows.append(self._row(scale, [config], {layer: found[t] for layer, t in tasks.items()}))
        if not rows:
            raise ValueError(f"scale {scale.index}: no finalist ran; the first said {failure}")
        return min(rows, key=lambda row: row.tuned.p50_ms if row.tuned else float("inf"))

    @property
    def dense_name(self) -> str:
        return DENSE_NAME if self.workload.dtype != "fp32" else "scaled_dot_product_attention of torch"

    def _doubt(self, scale: Scale, dense: Sequence[float], tuned: Sequence[float]) -> str | None:
        """Why a final is not to be believed yet, or None."""
        ratios = [d / t for d, t in zip(dense, tuned, strict=True)]
        halves = median(ratios[: ROUNDS // 2]), median(ratios[ROUNDS // 2 :])
        if max(halves) > (1 + STEADY) * min(halves):
            return f"its gain drifted from {halves[0]:.2f}x to {halves[1]:.2f}x"
        p = self.workload.problem(scale.index)
        if self.gpu.memory_gbps:  # queries read and outputs written at the least, which no cache saves
            least = 2 * p.batch * p.heads * p.num_queries * p.head_dim * BYTES[p.dtype] / self.gpu.memory_gbps / 1e6
            if median(tuned) < 0.8 * least:
                return f"{median(tuned):.4f} ms is less than reading queries and writing outputs takes ({least:.4f} ms)"
        return None

    def _notes(self) -> tuple[str, ...]:
        mode = self.workshop.identity.mode
        notes = [f"times are of {mode} calls on random inputs by events on the device, lists planned before"]
        if self.setup_ms:
            most = max(self.setup_ms.values())
            notes.append(f"planning: lists, tables and loading take up to {most:.0f} ms a scale on the host, once a process")
        if self.clocks:
            mhz, watts = [c.sm_mhz for c in self.clocks], [c.power_w for c in self.clocks]
            slowed = sorted({why for c in self.clocks for why in c.slowed})
            notes.append(
                f"SM clock {min(mhz)}..{max(mhz)} MHz, {min(watts):.0f}..{max(watts):.0f} W, up to "
                f"{max(c.celsius for c in self.clocks)} C; slowed by: {', '.join(slowed) or 'nothing'}"
            )
        notes += [f"scale {s}: {why}, {LOOKS} times over" for s, why in sorted(self.doubts.items())]
        return tuple(notes)

    def _tell(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self.begun:4.0f} s] {text}")
