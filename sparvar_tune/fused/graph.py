"""A function's launches as one CUDA graph, and where they cannot be one, why."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.catalog.names import first_line


class Replays:
    """What draws with a model's blocks as one, by graphs where it may. work: the `Workspace` of the last image, or None."""

    found: Parts
    use_graphs: bool
    work: Any

    @property
    def why_not_graphs(self) -> str | None:
        """Why launches are not replayed as graphs, or None."""
        if not self.use_graphs or not self.found.on_gpu:
            return "graphs are off" if self.found.on_gpu else "the model is on no GPU"
        reason: str | None = None if self.work is None else self.work.why_not_graphs
        return reason


def captured(run: Callable[[], object], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph | str:
    """A graph of what `run` launches, or in one line why there is none; nothing is computed by it.

    pool: of `torch.cuda.graph_pool_handle`: memory that graphs share which are replayed one after another. `run` must have run
    before, so that all it launches is compiled.
    """
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    try:
        return _captured(first, run, device, pool)
    except torch.OutOfMemoryError:  # what PyTorch keeps for later cannot be given back while capturing
        torch.cuda.empty_cache()
    try:
        return _captured(second, run, device, pool)  # the first still holds the pool, which is gone for good without any holder
    except torch.OutOfMemoryError as error:
        return f"its launches cannot be captured: {first_line(error)}"


def held_bytes(pool: Any) -> int:
    """Memory of the device that the graphs of a pool hold."""
    found = (s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) == tuple(pool))
    return sum(int(s["total_size"]) for s in found)


def _captured(
    graph: torch.cuda.CUDAGraph, run: Callable[[], object], device: torch.device, pool: Any
) -> torch.cuda.CUDAGraph | str:
    side, reason = _side(device), None
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(side):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        except torch.OutOfMemoryError:
            _ended(graph, pool)
            raise
        except RuntimeError as error:  # what waits for the GPU or allocates outside PyTorch is refused while capturing
            reason = first_line(error)
        except BaseException:
            _ended(graph, pool)
            raise
        broken = _ended(graph, pool)
    torch.cuda.current_stream(device).wait_stream(side)
    reason = reason or broken
    return graph if reason is None else f"its launches cannot be captured: {reason}"


@lru_cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: PyTorch keeps a workspace of products for each stream."""
    return torch.cuda.Stream(device)


def _ended(graph: torch.cuda.CUDAGraph, pool: Any) -> str | None:
    """Ends the capture; why what was captured is no graph, or None."""
    try:
        _end(graph)
    except RuntimeError as error:
        _recover(pool)
        return first_line(error)
    return None


def _end(graph: torch.cuda.CUDAGraph) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # some work is nothing for some models
        graph.capture_end()


def _recover(pool: Any) -> None:
    """What PyTorch leaves undone where a capture was broken: without it the next random number of the device raises.

    Its allocator goes on giving memory of the pool to the stream, and its generator believes that it is being captured until
    another capture ends well.
    """
    if pool is not None:
        with contextlib.suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    after = torch.cuda.CUDAGraph()
    after.capture_begin(capture_error_mode="thread_local")  # of nothing: there may be no memory left
    _end(after)
