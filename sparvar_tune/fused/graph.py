"""A function's launches as one CUDA graph, and where they cannot be one, why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(
    run: Callable[[], object], device: torch.device, pool: Any = None, side: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph | str:
    """A graph of what `run` launches, or in one line why there is none; nothing is computed by it.

    pool: memory that graphs share which are replayed one after another; side: the stream to capture on, one for all graphs of a
    pool, as it keeps memory apart by stream. `run` must have run before, so that all it launches is compiled.
    """
    graph, side = torch.cuda.CUDAGraph(), side or torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    reason: str | None = None
    with torch.cuda.device(device), torch.cuda.stream(side):
        graph.capture_begin(pool=pool or torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        try:
            run()
        except torch.OutOfMemoryError:
            _ended(graph)
            raise
        except RuntimeError as error:  # what waits for the GPU or allocates outside PyTorch is refused while capturing
            reason = f"{error}".partition("\n")[0] or type(error).__name__
        except BaseException:
            _ended(graph)
            raise
        broken = _ended(graph)
    torch.cuda.current_stream(device).wait_stream(side)
    return graph if reason is None and broken is None else f"its launches cannot be captured: {reason or broken}"


def _ended(graph: torch.cuda.CUDAGraph) -> str | None:
    """Ends the capture; why what was captured is no graph, or None."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        return f"{error}".partition("\n")[0]
    return None
