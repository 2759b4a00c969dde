"""What one call does, counted and not timed: the same number on every run and machine with the same versions.

launches        operations that write memory: on a GPU each is a launch or more. Kernels of ours count as one each
tensors, bytes  those made while the call runs, its output among them
multiplications of matrix products and dense attention, as torch counts FLOPs
keys            (query, key) pairs that heads with lists or means visit; a mean key, too, is one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sparvar_kernels.backends.cpu import layer as layer_cpu
from sparvar_kernels.backends.cpu import pooled as pooled_cpu
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.variants import NearFar
from sparvar_kernels.variants.lists import KeyLists
from sparvar_tune.profile.machine import version_of
from sparvar_tune.regression.baseline import Fact, count

STEADY = 2  # calls before one is counted: the first builds what the others use
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts those of GPUs alone


@dataclass(frozen=True)
class Counts:
    """See the module docstring."""

    launches: int
    kernels: int
    tensors: int
    bytes: int
    multiplications: int
    keys: int

    def facts(self, what: str, under: str | None = None) -> list[Fact]:
        """One fact each."""
        under = under or f"torch {torch.__version__.partition('+')[0]}"
        units = {"bytes": " B"}
        return [count(f"{what}: {f.name}", getattr(self, f.name), under, units.get(f.name, "")) for f in fields(self)]


class Operations(TorchDispatchMode):
    """Counts the operations under it. Views are none, and memory that is only taken is no launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.tensors = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        aliases = [a.alias_info for a in func._schema.returns]
        writes = not aliases or any(alias is None or alias.is_write for alias in aliases)
        self.launches += writes and "empty" not in func.__name__
        for made in _tensors(out):
            if made.untyped_storage().data_ptr() not in given:
                self.tensors += 1
                self.bytes += made.untyped_storage().nbytes()
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def counted(call: Callable[[], object], run: bool = True) -> Counts:
    """What the call does once it is steady. run: False notes launches of our kernels and leaves them out, for counting in
    Triton's interpreter, which takes minutes; how many there are hangs on sizes, not on values.
    """
    operations, kernels, pairs = Operations(), list[str](), [0]
    with ExitStack() as stack:
        stack.enter_context(noted_kernels(kernels, run))
        for _ in range(STEADY):
            call()
        kernels.clear()
        stack.enter_context(_lists(pairs))
        flops = stack.enter_context(FlopCounterMode(display=False, custom_mapping={ON_CPU: _flops_on_cpu}))
        stack.enter_context(operations)
        call()
    return Counts(
        operations.launches + len(kernels), len(kernels), operations.tensors, operations.bytes,
        flops.get_total_flops() // 2, pairs[0],
    )  # fmt: skip


def _flops_on_cpu(q: Any, k: Any, v: Any, *_rest: Any, out_shape: Any = None, **_options: Any) -> int:
    """Of dense attention, by shapes."""
    return int(sdpa_flop_count(q, k, v))


@contextmanager
def noted_kernels(names: list[str], run: bool) -> Iterator[None]:
    """Notes every launch of a kernel of ours. In Triton's interpreter a kernel is many operations; they are not counted."""
    if version_of("triton") is None:
        yield
        return
    from sparvar_kernels.backends.triton.binary import Launcher

    launch = Launcher.__call__

    def noted(self: Launcher, grid: tuple[int, int, int], *arguments: Any) -> None:
        names.append(self.kernel.__name__)
        if run:
            with _disable_current_modes():
                launch(self, grid, *arguments)

    with mock.patch.object(Launcher, "__call__", noted):
        yield


@contextmanager
def _lists(pairs: list[int]) -> Iterator[None]:
    """Adds up the (query, key) pairs of every list that gathered attention reads, and what pooled and near-far heads read in
    their own way."""
    gathered, near_far = (vars(layer_cpu)[name] for name in ("gathered_attention", "near_far_attention"))

    def add(q: torch.Tensor, lists: KeyLists, heads: Sequence[int]) -> None:
        with _disable_current_modes():  # tiles at an edge hold fewer queries
            pairs[0] += round(q.shape[0] * len(heads) * float((lists.lengths * lists.tiles.counts).double().sum(-1).mean()))

    def noted(q: torch.Tensor, k: Any, v: Any, lists: KeyLists, heads: Sequence[int], *rest: Any) -> None:
        add(q, lists, heads)
        gathered(q, k, v, lists, heads, *rest)

    def noted_near_far(
        q: torch.Tensor, k: Any, v: Any, problem: AttentionProblem, heads: Sequence[int], variant: NearFar, *rest: Any
    ) -> None:
        with _disable_current_modes():
            lists = variant.lists(problem.schedule, problem.scale_index, str(q.device))
        add(q, lists, heads)
        near_far(q, k, v, problem, heads, variant, *rest)

    pool = vars(pooled_cpu)["pool_keys"]

    def noted_pool(q: torch.Tensor, *rest: Any) -> Any:
        made = pool(q, *rest)
        pairs[0] += q.shape[:3].numel() * made[0].shape[2]
        return made

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(pooled_cpu, "pool_keys", noted_pool))
        stack.enter_context(mock.patch.multiple(layer_cpu, gathered_attention=noted, near_far_attention=noted_near_far))
        if version_of("triton") is not None:
            from sparvar_kernels.backends.triton.layer import Gather
            from sparvar_kernels.backends.triton.table import Column

            on_gpu = Gather.__call__

            def launched(self: Gather, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> None:
                if q.stride(3) == k.stride(3) == v.stride(3) == 1:  # else it calls itself with copies
                    with _disable_current_modes():
                        table = self.stage.table.long()
                        rows = table[:, Column.END_ROW] - table[:, Column.FIRST_ROW]
                        pairs[0] += q.shape[0] * int((rows * table[:, Column.COUNT]).sum())
                on_gpu(self, q, k, v, *rest, **named)

            stack.enter_context(mock.patch.object(Gather, "__call__", launched))
        yield
