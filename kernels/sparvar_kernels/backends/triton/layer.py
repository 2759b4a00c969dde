"""One image's attention on a GPU: a launch per (layer, scale), prepared once, with nothing left to decide at the call.

A stage is one launch of the gathered kernel over all heads of a layer at a scale. What depends on geometry alone (tables,
window lists) is built when the stage is; what depends on data (CS4A's lists, residuals) is written by the decision scale
straight into the buffers that the later stages read. No call waits for the GPU, so a whole image can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.dense import SAFE_LOGIT, dense_heads, dense_with_lse, out_like
from sparvar_kernels.backends.triton.binary import ALIGNMENT, INTERPRETED, TYPES, Build, Launcher, launcher, pointer
from sparvar_kernels.backends.triton.choosing import Fill, fill_lists, record_builds
from sparvar_kernels.backends.triton.gathered import LOG2E, block_d, gathered_kernel
from sparvar_kernels.backends.triton.selecting import column_mass, mass_build, mass_dtype, sampled_rows
from sparvar_kernels.backends.triton.table import FIELDS
from sparvar_kernels.backends.triton.work import (
    APART,
    Lists,
    Stage,
    build_stage,
    launch_groups,
    means_stage,
    shared_stage,
)
from sparvar_kernels.geometry.problem import DTYPES, AttentionProblem
from sparvar_kernels.policy import LayerPlan, Record, why_not_live
from sparvar_kernels.variants import Cs4a, NearFar, Pooled, Variant
from sparvar_kernels.variants.near_far.planner import keys_and_means
from sparvar_kernels.variants.pooled.planner import pool_keys

POINTERS = ("q", "k", "v", "out", "keys", "table", "extra", "bias")
ADD_RESIDUAL, TAKE_RESIDUAL = 1, 2
ADD_8_COLUMNS = 3  # where warps fetch: of a residual's cells in a step, instead of 16


def gathered_build(
    problem: AttentionProblem, config: TritonConfig, *, epilogue: int, masked: bool, bias: bool = False, aligned: bool = True,
    cells: int = 16,
) -> Build:  # fmt: skip
    """What a stage of `problem` launches: the gathered kernel, or where warps fetch the one for Hopper.

    aligned: addresses and strides of all tensors are multiples of 16; needed where warps fetch. cells: columns of a residual's
    cells in one step there, 8 or 16.
    """
    kinds = {"keys": "*i32", "table": "*i32", "bias": "*fp32"}
    types = {f"{name}_ptr": kinds.get(name, f"*{TYPES[DTYPES[problem.dtype]]}") for name in POINTERS}
    types |= {name: "i32" for name in gathered_kernel.arg_names if name.startswith("stride_")}
    types |= dict.fromkeys(("grid_width", "source_height", "source_width"), "i32")
    types |= dict.fromkeys(("step_y", "step_x", "scale_log2e"), "fp32")
    bounded = problem.logit_bound is not None and problem.logit_bound <= SAFE_LOGIT and problem.dtype != "fp16"
    constants: dict[str, Any]
    if not config.fetchers:
        constants = {
            "FIELDS": FIELDS, "EPILOGUE": epilogue, "HAS_BIAS": bias, "MASKED": masked, "BOUNDED": bounded,
            "HEAD_DIM": problem.head_dim, "BLOCK_D": block_d(problem.head_dim), "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }  # fmt: skip
        return Build.of(gathered_kernel, types, constants, config.options(problem), aligned)
    from sparvar_kernels.backends.triton.fetching import fetched_kernel  # not every Triton has what it is written in

    _, multiplying, fetching = config.registers(problem)
    constants = {
        "FIELDS": FIELDS, "EPILOGUE": ADD_8_COLUMNS if (epilogue, cells) == (ADD_RESIDUAL, 8) else epilogue, "MASKED": masked,
        "BOUNDED": bounded, "HEAD_DIM": problem.head_dim, "BLOCK_N": config.block_n, "SLOTS": config.num_stages,
        "GROUPS": config.block_m // 64, "OTHER_REGISTERS": multiplying, "FETCH_REGISTERS": fetching,
    }  # fmt: skip
    types |= {"num_entries": "i32", "num_items": "i32"}
    return Build.of(fetched_kernel, types, constants, config.options(problem), aligned)


class Gather:
    """Calls the gathered kernel, or the fetching one, for one stage. source: the grid of the residual that is added.

    A call does what depends on its tensors' addresses, no more; what depends on their strides is kept from the first one.
    """

    def __init__(
        self, stage: Stage, problem: AttentionProblem, config: TritonConfig, epilogue: int,
        source: tuple[int, int] = (1, 1), bias: bool = False,
    ) -> None:  # fmt: skip
        self.stage, self.problem, self.config = stage, problem, config  # the stage's buffers live as long as this
        self.epilogue, self.source, self.bias = epilogue, source, bias
        self.keys, self.table = pointer(stage.keys), pointer(stage.table)
        self.ready: dict[tuple[Any, ...], tuple[Launcher, tuple[int, int, int], tuple[Any, ...]]] = {}

    def build(self, aligned: bool) -> Build:
        """What it launches for tensors that are aligned, or not."""
        aligned = bool(self.config.fetchers) or (aligned and not self.bias)
        return gathered_build(
            self.problem, self.config, epilogue=self.epilogue, masked=self.stage.masked, bias=self.bias, aligned=aligned,
            cells=self.stage.cells,
        )  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, extra: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        """extra: the residual [B, slots, n, D] on the grid `source` (add), or the dense output [B, H, N, D] (take)."""
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        out_strides = out.stride()
        if extra is None:
            extra, extra_at, extra_strides = out, out_at, out_strides
        else:
            extra_at, extra_strides = extra.data_ptr(), extra.stride()
        form = ((q_at | k_at | v_at | out_at | extra_at) & 15, q.stride(), k.stride(), v.stride(), out_strides, extra_strides)
        ready = self.ready.get(form)
        if ready is None:
            if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
                return self(q.contiguous(), k.contiguous(), v.contiguous(), out, extra, bias)
            if self.config.fetchers and not _aligned(q, k, v):
                q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
                return self(q, k, v, out, extra, bias)
            ready = self.ready[form] = self._prepare(q, k, v, out, extra, bias)
        run, grid, rest = ready
        bias_at = self.table if bias is None else pointer(bias)
        if INTERPRETED:
            run(grid, q, k, v, out, self.keys, self.table, extra, bias_at, *rest)
        else:
            run(grid, q_at, k_at, v_at, out_at, self.keys, self.table, extra_at, bias_at, *rest)

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, extra: Tensor, bias: Tensor | None
    ) -> tuple[Launcher, tuple[int, int, int], tuple[Any, ...]]:
        """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
        if max(k.stride(2), v.stride(2)) * k.shape[2] >= 1 << 31 or max(q.stride(2), out.stride(2)) * q.shape[2] >= 1 << 31:
            raise ValueError("q, k, v: a head spans 2**31 elements or more; make them contiguous")
        tensors = (q, k, v, out, extra)
        strides = [stride for t in tensors for stride in t.stride()[:3]]
        (height, width), (source_height, source_width) = self.problem.grid, self.source
        rest = (
            *strides, *((0, 0) if bias is None else bias.stride()[:2]),
            width, source_height, source_width, source_height / height, source_width / width,
            self.problem.softmax_scale * LOG2E,
        )  # fmt: skip
        run, entries = launcher(self.build(_aligned(*tensors)), q.device), self.stage.table.shape[0]
        if not self.config.fetchers:
            return run, (entries, self.problem.batch, 1), rest
        items = entries * self.problem.batch
        fit = torch.cuda.get_device_properties(q.device).multi_processor_count * self.config.resident(self.problem)
        return run, (min(items, fit), 1, 1), (*rest, entries, items)


def _aligned(*tensors: Tensor) -> bool:
    """True if every address and stride but the last is a multiple of what fast copies want."""
    return all(n % ALIGNMENT == 0 for t in tensors for n in (t.data_ptr(), *t.stride()[:3]))


class Layer:
    """All scales of one layer for one batch size, dtype and device. `problems`: per scale; `configs`: per scale."""

    def __init__(
        self, plans: tuple[LayerPlan, ...], problems: Sequence[AttentionProblem], configs: Sequence[TritonConfig], device: str
    ) -> None:
        self.plans, self.problems, self.configs, self.device = plans, problems, configs, device
        self.launches: dict[int, list[tuple[int | None, Gather]]] = {}
        self.apart = [tuple(g for g in plan.groups if g[0].reads in APART) for plan in plans]
        self.stages: dict[tuple[int, int | None], tuple[Stage, Gather]] = {}
        self.over_means: dict[tuple[int, Variant, int], Gather] = {}
        self.residuals: dict[int, Tensor] = {}
        self.runs: dict[int, int] = {}  # decision scale -> how often it was run for this image
        self.decisions: dict[int, tuple[Gather | None, list[tuple[Record, Fill]]]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, s: int) -> Tensor:
        if self.plans[s].records:
            return self._decide(q, k, v, s)
        out = out_like(q)
        for decision, gather in self._gathers(s):
            if decision is None:
                gather(q, k, v, out)
                continue
            if self.runs.get(decision) != 1:
                raise ValueError(why_not_live(s, decision, self.runs.get(decision, 0)))
            gather(q, k, v, out, self.residuals.get(decision))
        if self.apart[s]:
            self._others(q, k, v, s, out)
        return out

    def reset(self) -> None:
        self.runs.clear()

    def prepare(self, s: int) -> None:
        """Builds the tables and lists of scale s, as its first call would."""
        if self.plans[s].records:
            self._decision(s)
        self._gathers(s)

    def builds(self, s: int) -> list[Build]:
        """Every binary a call at scale s launches, given contiguous inputs. Needs no GPU: the layer may be one of a CPU."""
        p = self.problems[s]
        aligned = p.head_dim % 16 == 0
        found = [gather.build(aligned) for _, gather in self._gathers(s)]
        found += [self._over_means(s, v, heads, 1).build(aligned) for v, heads in self.apart[s] if v.reads != "everything"]
        if self.plans[s].records:
            gather, jobs = self._decision(s)
            found += [gather.build(aligned)] if gather else []
            for record, fill in jobs:
                assert isinstance(record.variant, Cs4a)
                each = sampled_rows(p, record.variant.tile, record.variant.sample)
                # the sums of a row lie one behind the other, but those of PyTorch's fp32 attention, a multiple of 32 apart
                even = p.dtype == "fp32" or p.num_queries % 16 == 0
                found.append(mass_build(p, each, aligned and even))
                found += record_builds(record.variant, p, fill, mass_dtype(p.dtype))
        return list(dict.fromkeys(found))

    def _others(self, q: Tensor, k: Tensor, v: Tensor, s: int, out: Tensor) -> None:
        """Heads that do not share the launch: cuDNN is faster at dense ones, those over means have keys of their own."""
        for variant, heads in self.apart[s]:
            if variant.reads == "everything":
                dense_heads(q, k, v, self.problems[s], heads, out)
            else:
                self._average(q, k, v, s, variant, heads, out)

    def _average(self, q: Tensor, k: Tensor, v: Tensor, s: int, variant: Variant, heads: tuple[int, ...], out: Tensor) -> None:
        if isinstance(variant, NearFar):
            keys, values, bias = keys_and_means(q, k, v, self.problems[s], variant)
        else:
            assert isinstance(variant, Pooled), "the ways to read means so far"
            keys, values, bias = pool_keys(q, k, v, self.problems[s], variant)
        gather = self._over_means(s, variant, heads, keys.shape[2])
        gather(q, keys, values, out, bias=(bias.float() * LOG2E).contiguous())

    def _over_means(self, s: int, variant: Variant, heads: tuple[int, ...], keys: int) -> Gather:
        """The launch of some heads over `keys` keys and means."""
        if (s, variant, keys) not in self.over_means:
            problem, config = self.problems[s], self.configs[s].plain
            stage = means_stage(variant, heads, problem, config, self.device, keys)
            # a mean key is no longer on the unit sphere and its bias is no logit: no bound is known
            self.over_means[s, variant, keys] = Gather(stage, replace(problem, logit_bound=None), config, 0, bias=True)
        return self.over_means[s, variant, keys]

    def _gathers(self, s: int) -> list[tuple[int | None, Gather]]:
        """The launches of scale s: one, or one per decision scale where its variants have several."""
        if s in self.launches:
            return self.launches[s]
        self.launches[s] = [
            (decision, self._stage(s, decision, groups)[1]) for decision, groups in launch_groups(self.plans[s].groups).items()
        ]
        return self.launches[s]

    def _stage(self, s: int, decision: int | None, groups: list[tuple[Variant, tuple[int, ...]]]) -> tuple[Stage, Gather]:
        if (s, decision) not in self.stages:
            slots = [self._slots(s, variant, heads) for variant, heads in groups]
            arguments = (tuple(groups), self.problems[s], self.configs[s], self.device, tuple(slots), (None,) * len(groups))
            fixed = not any(variant.reads == "ranked lists" for variant, _ in groups)
            stage = shared_stage(*arguments) if fixed else build_stage(*arguments)
            epilogue = ADD_RESIDUAL if any(slot is not None for slot in slots) else 0
            source = self.problems[s if decision is None else decision].grid
            self.stages[s, decision] = stage, Gather(stage, self.problems[s], self.configs[s], epilogue, source)
        return self.stages[s, decision]

    def _slots(self, s: int, variant: Variant, heads: tuple[int, ...]) -> tuple[int, ...] | None:
        """Rows of the decision scale's residual buffer that belong to these heads."""
        decision = variant.decision_scale
        if decision is None:
            return None
        there, begin = variant.at_decision(self.problems[s].schedule, s), 0
        for record in self.plans[decision].records:
            if record.key == (there, heads):
                return tuple(range(begin, begin + len(heads))) if record.wants_residual else None
            begin += len(record.heads) if record.wants_residual else 0
        raise AssertionError("a variant without its record")

    def _decision(self, s: int) -> tuple[Gather | None, list[tuple[Record, Fill]]]:
        """What a decision scale has to do: the launch that takes residuals, and per record the lists to fill."""
        if s in self.decisions:
            return self.decisions[s]
        problem, config = self.problems[s], self.configs[s]
        wanting = [r for r in self.plans[s].records if r.wants_residual]
        begin, outs = 0, []
        for record in wanting:
            outs.append(tuple(range(begin, begin + len(record.heads))))
            begin += len(record.heads)
        gather, own = None, []
        if wanting:
            groups = [r.key for r in wanting]
            stage = build_stage(groups, problem, config, self.device, [None] * len(groups), outs)
            gather = Gather(stage, problem, config, TAKE_RESIDUAL)
            own = [(lists, stage.keys, problem) for lists in stage.dynamic]
            shape = (problem.batch, begin, problem.num_queries, problem.head_dim)
            self.residuals[s] = torch.empty(shape, dtype=DTYPES[problem.dtype], device=self.device)
        for later in range(s + 1, len(self.plans)):
            self._gathers(later)
        jobs: list[tuple[Record, Fill]] = []
        for record in self.plans[s].records:
            if record.variant.reads == "ranked lists":
                fill = [job for job in own if (job[0].variant, job[0].heads) == record.key]
                jobs.append((record, fill + list(self._waiting(s, record))))
        self.decisions[s] = gather, jobs
        return self.decisions[s]

    def _waiting(self, s: int, record: Record) -> Iterator[tuple[Lists, Tensor, AttentionProblem]]:
        """The lists of later scales that a record of decision scale s fills, with their key buffer and problem."""
        for (later, _), (stage, _) in sorted(self.stages.items(), key=lambda made: made[0][0]):
            for lists in stage.dynamic:
                if later > s and (lists.variant.at_decision(self.problems[s].schedule, later), lists.heads) == record.key:
                    yield lists, stage.keys, self.problems[later]

    def _decide(self, q: Tensor, k: Tensor, v: Tensor, s: int) -> Tensor:
        """A decision scale: dense for the heads that later scales ask about, their lists and residuals."""
        problem = self.problems[s]
        gather, jobs = self._decision(s)
        self.runs[s] = self.runs.get(s, 0) + 1
        out, lse = dense_with_lse(q, k, v, problem.softmax_scale)
        for decision, sparse in self._gathers(s):  # other heads may be sparse here
            sparse(q, k, v, out, self.residuals.get(decision) if decision is not None else None)
        for variant, heads in self.apart[s]:
            if variant.reads != "everything":
                self._average(q, k, v, s, variant, heads, out)
        masses: dict[tuple[Any, ...], Tensor] = {}
        for record, fill in jobs:
            variant = record.variant
            assert isinstance(variant, Cs4a)
            shared = (record.heads, variant.tile, variant.sample)
            if shared not in masses:
                masses[shared] = column_mass(q, k, lse, problem, *shared)
            fill_lists(masses[shared], variant, problem, record.heads, fill)
        if gather is not None:
            gather(q, k, v, self.residuals[s], out)
        return out
