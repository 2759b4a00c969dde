"""What is traced: one picture of a model that can be run, or one layer's attention at every scale on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.launch_search.layer_call import random_inputs
from sparvar_tune.tracing.backends import open_session
from sparvar_tune.tracing.ranges import DeviceClock, HostClock, Span, Tracer
from sparvar_tune.tracing.seams import traced


@dataclass(frozen=True)
class Run:
    """Something to run again and again. what: it in words. capture: None, or what makes a CUDA graph of it to replay."""

    model: str
    what: str
    device: str
    draw: Callable[[], object]
    capture: Callable[[], Callable[[], object]] | None = None


def one_picture(adapter: Adapter, attend: Any, pair: Pair) -> Run:
    """One picture from noise to pixels, every scale with `attend`."""
    label = adapter.classes()[pair[0]]
    what = f"one picture ({label}, seed {pair[1]})"
    return Run(adapter.model.slug, what, adapter.device, lambda: adapter.finish(adapter.start(pair, 0), attend))


def one_layer(model: str, problems: Sequence[AttentionProblem], attend: SparseAttention, layer: int, device: str) -> Run:
    """The attention of one layer, scale by scale, on random inputs; no other part of the model."""
    last = problems[-1]
    q, k, v = random_inputs(last, device=device)
    scales = range(len(problems) - len(attend.skip_scales))
    inputs = [(q[:, :, : p.num_queries], k[:, :, : p.num_keys], v[:, :, : p.num_keys]) for p in problems]

    def draw() -> None:
        attend.reset()
        for s in scales:
            attend(*inputs[s], layer, s)

    def capture() -> Callable[[], object]:
        attend.reset()
        graphs = []
        for s in scales:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                attend(*inputs[s], layer, s)
            graphs.append(graph)

        def replay() -> None:
            for graph in graphs:
                graph.replay()

        return replay

    what = f"layer {layer} at {len(scales)} scales, random inputs, batch {last.batch}"
    return Run(model, what, device, draw, capture if device == "cuda" else None)


def spans_of(run: Run, cold: bool = False) -> list[Span]:
    """Every range of one run, with nobody else listening. cold: the first run of the process, with all that is planned once."""
    if not cold:
        with torch.inference_mode():
            run.draw()
    tracer = Tracer(run.model, HostClock() if run.device == "cpu" else DeviceClock())
    with torch.inference_mode(), traced(tracer):
        run.draw()
    return tracer.spans()


def tell(run: Run, backend: str, stem: Path, graph: bool = False) -> list[Path]:
    """One more run, its ranges told to a backend; returns the files that wrote.

    graph: the run is captured in CUDA graphs, which is when its ranges are made, and replayed inside a range "replay", where a
    profiler sees kernels by name.
    """
    session = open_session(backend, run.device)
    with torch.inference_mode(), session(stem) as made:
        tracer = Tracer(run.model, None, made.ranges)
        with traced(tracer):
            if not graph:
                run.draw()
            else:
                assert run.capture is not None
                replay = run.capture()
                with tracer.range("replay"):
                    replay()
                    torch.cuda.synchronize()
    return made.files
