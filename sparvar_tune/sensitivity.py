"""Measures the `Table` of a frame: every option of its menu on every head, on captured Q, K, V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.policy import Policy
from sparvar_kernels.scales import ScaleSchedule
from sparvar_tune.capture import Recorder
from sparvar_tune.measure import Stopwatch
from sparvar_tune.policies import Frame, Table, menu


def measure_table(
    capture: Recorder, dense_outputs: dict[tuple[int, int], torch.Tensor], dense_ms: dict[int, float],
    schedule: ScaleSchedule, frame: Frame, *, device: str, softmax_scale: float, logit_bound: float | None,
    progress: Callable[[str], None],
) -> Table:  # fmt: skip
    """Errors and times of one frame's options.

    dense_outputs[layer, scale] [B, H, Nq, D] and dense_ms[scale] (one layer, all heads) come from `dense_pass`, shared by
    all frames. Each option is run through the real entry point in all heads at once.
    """
    scales = frame.sparse_scales(schedule)
    layers = 1 + max(layer for layer, _ in capture.calls)
    heads = next(iter(capture.calls.values()))[0].shape[1]
    stopwatch = Stopwatch(device)
    error: dict[int, dict[str, Any]] = {s: {} for s in scales}
    time_ms: dict[int, dict[str, float]] = {s: {} for s in scales}
    for name in menu(schedule, frame, scales[-1]):
        rules = {s: menu(schedule, frame, s)[name] for s in scales}
        attend = SparseAttention(
            Policy.uniform(layers, heads, {} if name == "dense" else rules), schedule,
            softmax_scale=softmax_scale, logit_bound=logit_bound,
        )  # fmt: skip
        spent = dict.fromkeys((frame.decision_scale, *scales), 0.0)
        errors: dict[int, list[tuple[float, ...]]] = {s: [] for s in scales}
        for layer in range(layers):
            for s in (frame.decision_scale, *scales) if name != "dense" else ():
                made: list[torch.Tensor] = []
                spent[s] += stopwatch(lambda: made.append(attend(*capture.calls[layer, s], layer, s))) / layers  # noqa: B023
                if s in errors:
                    errors[s].append(head_errors(made[0], dense_outputs[layer, s]))
        decides = getattr(rules[scales[-1]], "decision_scale", None) is not None
        extra = max(0.0, spent[frame.decision_scale] - dense_ms[frame.decision_scale]) if decides else 0.0
        for s in scales:
            ms = dense_ms[s] if name == "dense" else spent[s] + extra / len(scales)
            time_ms[s][name] = ms / heads
            error[s][name] = tuple(errors[s]) or ((0.0,) * heads,) * layers
        progress(name)
    return Table(frame, error, time_ms)


def head_errors(sparse: torch.Tensor, dense: torch.Tensor) -> tuple[float, ...]:
    """Per head: squared error over the squared output of all heads together; outputs [B, H, Nq, D]."""
    wrong = (sparse - dense).float().square().sum((0, 2, 3))
    return tuple((wrong / dense.float().square().sum()).tolist())


def dense_pass(
    capture: Recorder, dense: Any, scales: range, device: str
) -> tuple[dict[tuple[int, int], torch.Tensor], dict[int, float]]:
    """Dense outputs by (layer, scale) and mean time of one layer (ms) by scale."""
    stopwatch = Stopwatch(device)
    layers = 1 + max(layer for layer, _ in capture.calls)
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    spent = dict.fromkeys(scales, 0.0)
    for layer in range(layers):
        for s in scales:
            made: list[torch.Tensor] = []
            spent[s] += stopwatch(lambda: made.append(dense(*capture.calls[layer, s], layer, s))) / layers  # noqa: B023
            outputs[layer, s] = made[0]
    return outputs, spent
