"""A module's call as one CUDA graph, where its hundreds of small launches take the host longer than the GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from sparvar_tune.fused.graph import captured, held_bytes
from sparvar_tune.fused.product import why_not_owned
from sparvar_tune.fused.watched import Watched, place

# What is larger keeps the GPU busy without a graph. HART's decoder, of 1.9 GiB before its sums were made in place, does not: run
# eagerly its launches took the host 5 ms longer than an H100.
MOST_BYTES = 1 << 31


class ModuleGraph:
    """Calls of one kind of tensors: the first runs eagerly, the second is captured, later ones are replayed.

    One kind is kept at a time. A kind is what a graph cannot change any more: shapes, dtypes, device, autocast, PyTorch's
    switches for convolutions and products, and where the weights lie. module: all that runs, whose weights and hooks are
    looked at at each call. A graph that would hold more than MOST_BYTES is let go of, and calls of its kind stay eager.
    why_not: why the last call ran eagerly, None where it did not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self._parts = module, Watched([module], place)
        self.why_not: str | None = "it was not called yet"
        self._kind: Hashable = None
        self._graph: torch.cuda.CUDAGraph | str | None = None
        self._given: tuple[Tensor, ...] = ()
        self._out = torch.empty(0)

    def __call__(self, run: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """run(*given), in memory of its own; run: always the same function of these tensors."""
        kind = self._kind_of(given)
        self.why_not = self._why_not(given)
        if self.why_not or kind != self._kind:
            self.forget()
            if self.why_not is None:
                self.why_not, self._kind = "it is the first of its kind", kind
            return run(*given)
        if self._graph is None:
            self._graph = self._captured(run, given)
        if isinstance(self._graph, str):
            self.why_not = self._graph
            return run(*given)
        with torch.no_grad():
            for mine, t in zip(self._given, given, strict=True):
                mine.copy_(t)
            self._graph.replay()
            return self._out.clone()

    def forget(self) -> None:
        """Gives back the graph and its memory."""
        self._kind = self._graph = None
        self._given, self._out = (), torch.empty(0)

    def _captured(self, run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph | str:
        with torch.inference_mode(False), torch.no_grad():
            self._given = tuple(torch.empty_like(t, requires_grad=False) for t in given)
            on = torch.is_autocast_enabled("cuda")
            # what autocast casts while capturing lies in the graph's memory: nobody may find it in autocast's cache afterwards
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=on, cache_enabled=False):

                def launch() -> None:
                    self._out = run(*self._given)

                graph = captured(launch, given[0].device, pool := torch.cuda.graph_pool_handle())
        if not isinstance(graph, str) and (held := held_bytes(pool)) > MOST_BYTES:
            graph = f"its graph would hold {held / 2**30:.1f} GiB, want at most {MOST_BYTES / 2**30:.1f}"
        if isinstance(graph, str):
            self._given, self._out = (), torch.empty(0)
        return graph

    def _kind_of(self, given: tuple[Tensor, ...]) -> Hashable:
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        return (
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in given),
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, products.allow_tf32),
            self._parts.state(),
        )  # fmt: skip

    def _why_not(self, given: tuple[Tensor, ...]) -> str | None:
        """Why launches alone would not be the whole of the call of the parts that `_kind_of` found, or None."""
        for name, module in self._parts.modules:
            reason = why_not_owned(module)
            if reason:
                return f"{name or type(module).__name__}: {reason}"
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *self.module.parameters())):
            return "a gradient is asked for"
        return None
