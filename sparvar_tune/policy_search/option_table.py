"""Measures the `OptionTable`: every option of the menu on every head, on captured Q, K, V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune.measure.capture import Recorder
from sparvar_tune.measure.timing import CLOCK, Clock, Stopwatch
from sparvar_tune.policy_search.menu import OptionTable, menu


def measure_table(
    capture: Recorder, dense_outputs: dict[tuple[int, int], torch.Tensor], dense_ms: dict[int, float],
    schedule: ScaleSchedule, *, device: str, softmax_scale: float, logit_bound: float | None,
    progress: Callable[[str], None], clock: Clock = CLOCK,
) -> OptionTable:  # fmt: skip
    """Errors and times of all options.

    dense_outputs[layer, scale] [B, H, Nq, D] and dense_ms[scale] (one layer, all heads) come from `dense_pass`. Each option
    is run through the real entry point in all heads at once.
    """
    scales = tuple(dense_ms)
    layers = 1 + max(layer for layer, _ in capture.calls)
    heads = next(iter(capture.calls.values()))[0].shape[1]
    stopwatch = Stopwatch(device, clock)
    error: dict[int, dict[str, Any]] = {s: {"dense": ((0.0,) * heads,) * layers} for s in scales}
    time_ms: dict[int, dict[str, float]] = {s: {"dense": dense_ms[s] / heads} for s in scales}
    decision_ms: dict[str, float] = {}
    for name in menu(schedule, scales[-1]):
        if name == "dense":
            continue
        rules = {s: options[name] for s in scales if name in (options := menu(schedule, s))}
        attend = SparseAttention(
            Policy.uniform(layers, heads, rules), schedule, softmax_scale=softmax_scale, logit_bound=logit_bound
        )
        spent = dict.fromkeys(scales, 0.0)
        errors: dict[int, list[tuple[float, ...]]] = {s: [] for s in rules}
        for layer in range(layers):
            for s in scales:
                made: list[torch.Tensor] = []
                spent[s] += stopwatch(lambda: made.append(attend(*capture.calls[layer, s], layer, s))) / layers  # noqa: B023
                if s in rules:
                    errors[s].append(head_errors(made[0], dense_outputs[layer, s]))
        for s in rules:
            time_ms[s][name] = spent[s] / heads
            error[s][name] = tuple(errors[s])
        if any(variant.decision_scale is not None for variant in rules.values()):
            decision_ms[name] = max(0.0, spent[scales[0]] - dense_ms[scales[0]]) / heads
        progress(name)
    return OptionTable(error, time_ms, decision_ms)


def head_errors(sparse: torch.Tensor, dense: torch.Tensor) -> tuple[float, ...]:
    """Per head: squared error over the squared output of all heads together; outputs [B, H, Nq, D]."""
    wrong = (sparse - dense).float().square().sum((0, 2, 3))
    return tuple((wrong / dense.float().square().sum()).tolist())


def dense_pass(
    capture: Recorder, dense: Any, scales: range, device: str, clock: Clock = CLOCK
) -> tuple[dict[tuple[int, int], torch.Tensor], dict[int, float]]:
    """Dense outputs by (layer, scale) and mean time of one layer (ms) by scale."""
    stopwatch = Stopwatch(device, clock)
    layers = 1 + max(layer for layer, _ in capture.calls)
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    spent = dict.fromkeys(scales, 0.0)
    for layer in range(layers):
        for s in scales:
            made: list[torch.Tensor] = []
            spent[s] += stopwatch(lambda: made.append(dense(*capture.calls[layer, s], layer, s))) / layers  # noqa: B023
            outputs[layer, s] = made[0]
    return outputs, spent
