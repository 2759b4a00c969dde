"""One image's attention on a GPU: a launch per (layer, scale), prepared once, with nothing left to decide at the call.

A stage is one launch of the gathered kernel over all heads of a layer at a scale. What depends on geometry alone (tables,
window lists) is built when the stage is; what depends on data (CS4A's lists, residuals) is written by the decision scale
straight into the buffers that the later stages read. No call waits for the GPU, so a whole image can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.binary import TYPES, Launcher, launcher, pointer
from sparvar_kernels.configs import TritonConfig
from sparvar_kernels.cs4a import band_lists, children, keys_kept, source_tiles, window_first
from sparvar_kernels.csla import csla_lists
from sparvar_kernels.dense import SAFE_LOGIT, dense_heads, dense_with_lse
from sparvar_kernels.gathered_triton import LOG2E, gathered_kernel
from sparvar_kernels.policy import LayerPlan, Record
from sparvar_kernels.pooled import pool_keys
from sparvar_kernels.problem import DTYPES, AttentionProblem
from sparvar_kernels.scales import Tile, partition
from sparvar_kernels.selecting_triton import mass_kernel, select_kernel
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant, at_decision
from sparvar_kernels.work import FIELDS, LIST_PAD, Part, tiles_of, work_table

POINTERS = ("q", "k", "v", "out", "keys", "table", "extra", "bias")
ADD_RESIDUAL, TAKE_RESIDUAL = 1, 2


def gathered_types(dtype: torch.dtype) -> dict[str, str]:
    """Argument types of the gathered kernel for inputs of `dtype`."""
    kinds = {"keys": "*i32", "table": "*i32", "bias": "*fp32"}
    types = {f"{name}_ptr": kinds.get(name, f"*{TYPES[dtype]}") for name in POINTERS}
    types |= {name: "i32" for name in gathered_kernel.arg_names if name.startswith("stride_")}
    types |= dict.fromkeys(("grid_width", "source_height", "source_width"), "i32")
    return types | dict.fromkeys(("step_y", "step_x", "scale_log2e"), "fp32")


def gathered_constants(
    problem: AttentionProblem, config: TritonConfig, *, epilogue: int, bias: bool, masked: bool
) -> dict[str, Any]:
    """Compile-time constants of the gathered kernel, in the order of its arguments."""
    bounded = problem.logit_bound is not None and problem.logit_bound <= SAFE_LOGIT and problem.dtype != "fp16"
    return {
        "FIELDS": FIELDS, "EPILOGUE": epilogue, "HAS_BIAS": bias, "MASKED": masked, "BOUNDED": bounded,
        "IEEE": problem.dtype == "fp32", "HEAD_DIM": problem.head_dim,
        "BLOCK_D": block_d(problem.head_dim), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip


def block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class Lists:
    """Where a part's lists lie, so that a decision scale can fill them: see `work.Part`. rows: lists a head has."""

    variant: Cs4a
    heads: tuple[int, ...]
    at: int
    head_step: int
    batch_step: int
    row_step: int
    rows: int
    width: int


@dataclass(frozen=True)
class Stage:
    """One launch: its key buffer and table on the device, and what a decision scale has to fill in beforehand."""

    keys: Tensor
    table: Tensor
    masked: bool
    dynamic: tuple[Lists, ...]


def build_stage(
    groups: Sequence[tuple[Variant, tuple[int, ...]]], problem: AttentionProblem, config: TritonConfig, device: str,
    slots: Sequence[tuple[int, ...] | None], outs: Sequence[tuple[int, ...] | None],
) -> Stage:  # fmt: skip
    """The stage of some variants, each with its heads. Raises ValueError where a query tile would see no key."""
    schedule, s = problem.schedule, problem.scale_index
    whole = torch.arange(problem.num_keys, dtype=torch.int32)
    static, size, parts, dynamic = [], 0, [], []
    for (variant, heads), slot, out in zip(groups, slots, outs, strict=True):
        tile = getattr(variant, "tile", Tile(0, config.block_m))
        tiles = tiles_of(problem.grid, tile)
        many = len(tiles.rows)
        if isinstance(variant, Cs4a):
            made = _dynamic_lists(variant, heads, problem, size)
            shared = variant.keys == "place" and s != variant.decision_scale  # lists lie by tile of the decision scale
            sources = source_tiles(schedule, s, variant) if shared else torch.arange(many)
            parts.append(Part(tiles, heads, size, made.head_step, made.batch_step, sources.int() * made.row_step,
                              torch.full((many,), _width(variant, problem), dtype=torch.int32), slot, out))  # fmt: skip
            dynamic.append(made)
            block = torch.zeros(problem.batch, len(heads), made.rows, made.row_step, dtype=torch.int32)
            if made.width < _width(variant, problem):
                block[..., made.width : _width(variant, problem)] = band_lists(schedule, s, variant)
            static.append(block.flatten())
        elif isinstance(variant, Csla):
            lists = csla_lists(schedule, s, variant)
            width = lists.keys.shape[-1]
            counts = torch.full((many,), width) if lists.counts is None else lists.counts[0, 0]
            parts.append(Part(tiles, heads, size, 0, 0, torch.arange(many, dtype=torch.int32) * width, counts, slot, out))
            static.append(lists.keys.flatten())
        else:
            count = 0 if isinstance(variant, Reuse) else len(whole)
            parts.append(
                Part(tiles, heads, size, 0, 0, torch.zeros(many, dtype=torch.int32), torch.full((many,), count), slot, out)
            )
            static.append(whole[:count])
        size += static[-1].numel()
    if size >= 1 << 31:
        raise ValueError(f"scale {s}: key lists of {size} entries; want less than 2**31 (fewer images at once)")
    table = work_table(parts, config.block_m)
    keys = torch.cat([*static, torch.zeros(LIST_PAD, dtype=torch.int32)])
    masked = bool((table[:, 7] % config.block_n != 0).any())
    return Stage(keys.to(device), table.to(device), masked, tuple(dynamic))


@lru_cache(maxsize=256)
def shared_stage(*arguments: Any) -> Stage:
    """A stage of geometry alone: every layer with the same groups uses one."""
    return build_stage(*arguments)


def _width(variant: Cs4a, problem: AttentionProblem) -> int:
    return keys_kept(variant, problem.schedule, problem.scale_index)


def _dynamic_lists(variant: Cs4a, heads: tuple[int, ...], problem: AttentionProblem, at: int) -> Lists:
    schedule, s = problem.schedule, problem.scale_index
    own = s == variant.decision_scale
    if variant.keys == "place" and not own:
        there = at_decision(variant, schedule, s)
        rows = len(partition(schedule.grids[variant.decision_scale], there.tile).counts)  # type: ignore[union-attr]
    else:
        rows = len(partition(problem.grid, variant.tile).counts)
    full = _width(variant, problem)
    chosen = full if variant.keys == "place" else keys_kept(variant, schedule, variant.decision_scale)
    step = -(-full // 4) * 4
    return Lists(variant, heads, at, rows * step, len(heads) * rows * step, step, rows, chosen)


class Gather:
    """Calls the gathered kernel for one stage."""

    def __init__(self, stage: Stage, problem: AttentionProblem, config: TritonConfig, epilogue: int, bias: bool = False) -> None:
        self.stage, self.problem = stage, problem
        self.constants = gathered_constants(problem, config, epilogue=epilogue, bias=bias, masked=stage.masked)
        self.options = config.options
        self.grid = (stage.table.shape[0], problem.batch, 1)
        self.keys, self.table = pointer(stage.keys), pointer(stage.table)
        self.scale_log2e = problem.softmax_scale * LOG2E
        self.launchers: dict[bool, Launcher] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, extra: Tensor | None = None,
        source: tuple[int, int] = (1, 1), bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """extra: the residual [B, slots, n, D] on the grid `source` (add), or the dense output [B, H, N, D] (take)."""
        qs, ks, vs, os = q.stride(), k.stride(), v.stride(), out.stride()
        if qs[3] != 1 or ks[3] != 1 or vs[3] != 1:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            qs, ks, vs = q.stride(), k.stride(), v.stride()
        at = q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()
        at |= qs[0] | qs[1] | qs[2] | ks[0] | ks[1] | ks[2] | vs[0] | vs[1] | vs[2] | os[0] | os[1] | os[2]
        es = os
        if extra is None:
            extra = out
        else:
            es = extra.stride()
            at |= extra.data_ptr() | es[0] | es[1] | es[2]
        aligned = bias is None and not at & 15
        run = self.launchers.get(aligned)
        if run is None:
            if max(ks[2], vs[2]) * k.shape[2] >= 1 << 31 or max(qs[2], os[2]) * q.shape[2] >= 1 << 31:
                raise ValueError("q, k, v: a head spans 2**31 elements or more; make them contiguous")
            run = self.launchers[aligned] = launcher(
                gathered_kernel, gathered_types(q.dtype), self.constants, self.options, aligned, q.device
            )
        bias_at, bs = (self.table, (0, 0)) if bias is None else (pointer(bias), bias.stride())
        height, width = self.problem.grid
        run(
            self.grid, pointer(q), pointer(k), pointer(v), pointer(out), self.keys, self.table, pointer(extra), bias_at,
            *qs[:3], *ks[:3], *vs[:3], *os[:3], *es[:3], *bs[:2],
            width, source[0], source[1], source[0] / height, source[1] / width, self.scale_log2e,
        )  # fmt: skip


@lru_cache(maxsize=256)
def _sample_rows(grid: tuple[int, int], tile: Tile, sample: int, device: str) -> Tensor:
    return partition(grid, tile).rows[:, ::sample].int().contiguous().to(device)


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, problem: AttentionProblem, heads: tuple[int, ...], tile: Tile, sample: int
) -> Tensor:
    """[B, h, T, >= Nk]: softmax probability of each key summed over the sampled queries of each tile.

    bf16, which ranks keys to within 0.4 % of their mass; fp32 for fp32 inputs.

    lse [B, H, Nq] fp32, unit stride along Nq: natural log of the sum of exponentials over all keys.
    """
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    device = str(q.device)
    rows = _sample_rows(problem.grid, tile, sample, device)
    tiles, each = rows.shape
    samples = max(8, 1 << (each - 1).bit_length())
    block_m = max(64 if problem.dtype == "fp32" else 128, samples)
    padded = -(-problem.num_keys // 16) * 16
    precision = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    mass = torch.empty(problem.batch, len(heads), tiles, padded, dtype=precision, device=q.device)
    groups = -(-tiles // (block_m // samples))
    block_n, programs = 64, groups * problem.batch * len(heads)
    chunks = max(1, min(-(-problem.num_keys // (4 * block_n)), -(-528 // programs)))
    keys_each = -(-problem.num_keys // (chunks * block_n)) * block_n
    types = {"q_ptr": f"*{TYPES[q.dtype]}", "k_ptr": f"*{TYPES[q.dtype]}", "lse_ptr": "*fp32", "mass_ptr": f"*{TYPES[precision]}",
             "rows_ptr": "*i32", "heads_ptr": "*i32", "scale_log2e": "fp32"}  # fmt: skip
    ints = [n for n in mass_kernel.arg_names if n.startswith(("stride_", "num_")) or n in ("mass_keys", "keys_each")]
    constants = {"EACH": each, "SAMPLES": samples, "IEEE": q.dtype == torch.float32, "HEAD_DIM": problem.head_dim,
                 "BLOCK_D": block_d(problem.head_dim), "BLOCK_M": block_m, "BLOCK_N": block_n}  # fmt: skip
    aligned = not (q.data_ptr() | k.data_ptr() | q.stride(0) | q.stride(1) | q.stride(2) | k.stride(0) | k.stride(1)
                   | k.stride(2) | lse.stride(0) | lse.stride(1)) & 15  # fmt: skip
    run = launcher(mass_kernel, types | dict.fromkeys(ints, "i32"), constants,
                   {"num_warps": 8 if block_m >= 128 else 4, "num_stages": 3}, aligned, q.device)  # fmt: skip
    run(
        (-(-problem.num_keys // keys_each), groups, problem.batch * len(heads)),
        pointer(q), pointer(k), pointer(lse), pointer(mass), pointer(rows), pointer(_on_device(heads, device)),
        *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2],
        len(heads), tiles, problem.num_keys, padded, keys_each, problem.softmax_scale * LOG2E,
    )  # fmt: skip
    return mass


@lru_cache(maxsize=256)
def _child_table(problem: AttentionProblem, decision_scale: int, expand: bool, device: str) -> tuple[Tensor, Tensor, int]:
    """(table [Nk, most], weights [Nk], most) of `children`; itself alone where lists stay on the decision scale's keys."""
    if not expand:
        n = problem.schedule.num_keys(decision_scale)
        return torch.arange(n, dtype=torch.int32, device=device), torch.ones(n, dtype=torch.int32, device=device), 1
    table, weight = children(problem.schedule, decision_scale, problem.scale_index, device)
    return table.contiguous(), weight.contiguous(), table.shape[1]


@lru_cache(maxsize=256)
def _list_sources(problem: AttentionProblem, variant: Cs4a, rows: int, device: str) -> Tensor:
    """[rows] int32: the decision-scale tile each list takes its mass from."""
    if variant.keys == "index" and problem.scale_index != variant.decision_scale:
        return source_tiles(problem.schedule, problem.scale_index, variant).int().to(device)
    return torch.arange(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _first_keys(problem: AttentionProblem, variant: Cs4a, device: str) -> Tensor | None:
    first = window_first(problem.schedule, variant, device)
    return None if first is None else first.to(torch.int8).contiguous()


def select(mass: Tensor, keys: Tensor, lists: Lists, problem: AttentionProblem, decision: AttentionProblem) -> None:
    """Fills `lists` in the key buffer of the stage at `problem` from mass [B, h, T_S, >= Nk_S] of the decision scale."""
    device, variant = str(mass.device), lists.variant
    expand = variant.keys == "place" and problem.scale_index != variant.decision_scale
    table, weight, most = _child_table(problem, variant.decision_scale, expand, device)
    there = at_decision(variant, problem.schedule, problem.scale_index) if expand else variant
    first = _first_keys(problem, there, device)
    sources = _list_sources(problem, variant, lists.rows, device)
    n = decision.num_keys
    main = 1 << (n.bit_length() - 1)
    types = {name: "*i32" for name in ("keys_ptr", "source_ptr", "table_ptr", "weight_ptr")}
    types |= {"mass_ptr": f"*{TYPES[mass.dtype]}", "first_ptr": "*i8"}
    ints = ("list_at", "head_step", "batch_step", "row_step", "num_heads", "num_tiles", "num_keys", "mass_keys", "width", "most")
    constants = {"EXACT": mass.dtype == torch.float32, "HAS_FIRST": first is not None, "CHILDREN": most, "MAIN": main,
                 "TAIL": max(16, 1 << (n - main).bit_length())}  # fmt: skip
    options = {"num_warps": 8, "num_stages": 1}
    run = launcher(select_kernel, types | dict.fromkeys(ints, "i32"), constants, options, True, mass.device)
    run(
        (lists.rows, problem.batch * len(lists.heads), 1),
        pointer(mass), pointer(keys), pointer(mass if first is None else first),
        pointer(sources), pointer(table), pointer(weight),
        lists.at, lists.head_step, lists.batch_step, lists.row_step, len(lists.heads), mass.shape[2], n, mass.shape[3],
        lists.width, most,
    )  # fmt: skip


def _like(q: Tensor) -> Tensor:
    """An output laid out as q is, unless q has gaps."""
    return torch.empty_like(q) if q.stride(3) == 1 else torch.empty(q.shape, dtype=q.dtype, device=q.device)


class Layer:
    """All scales of one layer for one batch size, dtype and device. `problems`: per scale; `configs`: per scale."""

    def __init__(
        self, plans: tuple[LayerPlan, ...], problems: Sequence[AttentionProblem], configs: Sequence[TritonConfig], device: str
    ) -> None:
        self.plans, self.problems, self.configs, self.device = plans, problems, configs, device
        self.launches: dict[int, list[tuple[int | None, Gather]]] = {}
        self.apart = [tuple(g for g in plan.groups if isinstance(g[0], Dense | Pooled)) for plan in plans]
        self.stages: dict[tuple[int, int | None], tuple[Stage, Gather]] = {}
        self.pooled: dict[tuple[int, Pooled], Gather] = {}
        self.residuals: dict[int, Tensor] = {}
        self.seen: set[int] = set()  # decision scales run for this image
        self.decisions: dict[int, tuple[Gather | None, list[tuple[Record, list[tuple[Lists, Tensor, int]]]]]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, s: int) -> Tensor:
        plan = self.plans[s]
        if plan.records:
            return self._decide(q, k, v, s)
        out = _like(q)
        for decision, gather in self._gathers(s):
            if decision is None:
                gather(q, k, v, out)
                continue
            if decision not in self.seen:
                raise ValueError(f"scale {s}: its decision scale {decision} was not run for this image and layer")
            gather(q, k, v, out, self.residuals.get(decision), self.problems[decision].grid)
        self._others(q, k, v, s, out)
        return out

    def reset(self) -> None:
        self.seen.clear()

    def _others(self, q: Tensor, k: Tensor, v: Tensor, s: int, out: Tensor) -> None:
        """Heads that do not share the launch: cuDNN is faster at dense ones, pooled ones have keys of their own."""
        for variant, heads in self.apart[s]:
            if isinstance(variant, Dense):
                dense_heads(q, k, v, self.problems[s], heads, out)
            elif isinstance(variant, Pooled):
                self._pool(q, k, v, s, variant, heads, out)

    def _pool(self, q: Tensor, k: Tensor, v: Tensor, s: int, variant: Pooled, heads: tuple[int, ...], out: Tensor) -> None:
        keys, values, bias = pool_keys(q, k, v, self.problems[s], variant)
        gather = self.pooled.get((s, variant))
        if gather is None:
            problem, config = self.problems[s], self.configs[s]
            lists = torch.arange(keys.shape[2], dtype=torch.int32)
            tiles = tiles_of(problem.grid, Tile(0, config.block_m))
            many = len(tiles.rows)
            part = Part(tiles, heads, 0, 0, 0, torch.zeros(many, dtype=torch.int32), torch.full((many,), len(lists)))
            padded = torch.cat([lists, torch.zeros(LIST_PAD, dtype=torch.int32)]).to(self.device)
            stage = Stage(padded, work_table([part], config.block_m).to(self.device), True, ())
            # a mean key is no longer on the unit sphere and its bias is no logit: no bound is known
            gather = self.pooled[s, variant] = Gather(stage, replace(problem, logit_bound=None), config, 0, bias=True)
        gather(q, keys, values, out, bias=(bias.float() * LOG2E).contiguous())

    def _gathers(self, s: int) -> list[tuple[int | None, Gather]]:
        """The launches of scale s: one, or one per decision scale where its variants have several."""
        if s in self.launches:
            return self.launches[s]
        wanted: dict[int | None, list[tuple[Variant, tuple[int, ...]]]] = {}
        for variant, heads in self.plans[s].groups:
            if isinstance(variant, Csla | Cs4a | Reuse):
                wanted.setdefault(variant.decision_scale, []).append((variant, heads))
        free = wanted.pop(None, [])
        if free and wanted:  # lists without a residual ride along
            wanted[next(iter(wanted))] += free
        elif free:
            wanted[None] = free
        self.launches[s] = [(decision, self._stage(s, decision, groups)[1]) for decision, groups in wanted.items()]
        return self.launches[s]

    def _stage(self, s: int, decision: int | None, groups: list[tuple[Variant, tuple[int, ...]]]) -> tuple[Stage, Gather]:
        if (s, decision) not in self.stages:
            slots = [self._slots(s, variant, heads) for variant, heads in groups]
            arguments = (tuple(groups), self.problems[s], self.configs[s], self.device, tuple(slots), (None,) * len(groups))
            fixed = not any(isinstance(variant, Cs4a) for variant, _ in groups)
            stage = shared_stage(*arguments) if fixed else build_stage(*arguments)
            epilogue = ADD_RESIDUAL if any(slot is not None for slot in slots) else 0
            self.stages[s, decision] = stage, Gather(stage, self.problems[s], self.configs[s], epilogue)
        return self.stages[s, decision]

    def _slots(self, s: int, variant: Variant, heads: tuple[int, ...]) -> tuple[int, ...] | None:
        """Rows of the decision scale's residual buffer that belong to these heads."""
        decision = getattr(variant, "decision_scale", None)
        if decision is None:
            return None
        there, begin = at_decision(variant, self.problems[s].schedule, s), 0
        for record in self.plans[decision].records:
            if record.key == (there, heads):
                return tuple(range(begin, begin + len(heads))) if record.wants_residual else None
            begin += len(record.heads) if record.wants_residual else 0
        raise AssertionError("a variant without its record")

    def _decision(self, s: int) -> tuple[Gather | None, list[tuple[Record, list[tuple[Lists, Tensor, int]]]]]:
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
            own = [(lists, stage.keys, s) for lists in stage.dynamic]
            shape = (problem.batch, begin, problem.num_queries, problem.head_dim)
            self.residuals[s] = torch.empty(shape, dtype=DTYPES[problem.dtype], device=self.device)
        jobs = []
        for record in self.plans[s].records:
            if not isinstance(record.variant, Cs4a):
                continue
            fill = [job for job in own if (job[0].variant, job[0].heads) == record.key]
            for later in range(s + 1, len(self.plans)):
                self._gathers(later)
                for (scale, _), (stage, _) in self.stages.items():
                    if scale != later:
                        continue
                    for lists in stage.dynamic:
                        if (at_decision(lists.variant, problem.schedule, later), lists.heads) == record.key:
                            fill.append((lists, stage.keys, later))
            jobs.append((record, fill))
        self.decisions[s] = gather, jobs
        return self.decisions[s]

    def _decide(self, q: Tensor, k: Tensor, v: Tensor, s: int) -> Tensor:
        """A decision scale: dense for the heads that later scales ask about, their lists and residuals."""
        problem = self.problems[s]
        gather, jobs = self._decision(s)
        self.seen.add(s)
        out, lse = dense_with_lse(q, k, v, problem.softmax_scale)
        for decision, sparse in self._gathers(s):  # other heads may be sparse here
            sparse(q, k, v, out, self.residuals.get(decision) if decision is not None else None,
                   problem.grid if decision is None else self.problems[decision].grid)  # fmt: skip
        for variant, heads in self.apart[s]:
            if isinstance(variant, Pooled):
                self._pool(q, k, v, s, variant, heads, out)
        masses: dict[tuple[Any, ...], Tensor] = {}
        for record, fill in jobs:
            variant = record.variant
            assert isinstance(variant, Cs4a)
            shared = (record.heads, variant.tile, variant.sample)
            if shared not in masses:
                masses[shared] = column_mass(q, k, lse, problem, *shared)
            for lists, keys, later in fill:
                select(masses[shared], keys, lists, self.problems[later], problem)
        if gather is not None:
            gather(q, k, v, self.residuals[s], out)
        return out
