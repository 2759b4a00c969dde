"""What a GPU worker does: times launch configurations of one layer at one scale, by events, in alternation with dense.

It runs in a process of its own (`workers`), so an illegal access or a hang costs one task. A task comes and its times go as
JSON values; which GPU it is, CUDA_VISIBLE_DEVICES says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import variant_to_dict
from sparvar_tune.catalog.gpus import detect_gpu
from sparvar_tune.launch_search.layer_call import Bench, in_graph
from sparvar_tune.measure.timing import interleaved
from sparvar_tune.profile.reader import Reader, to_plain
from sparvar_tune.profile.schema import Workload

WARM_S = 0.3  # of work before times that decide: by then an H100 has left its idle clock of 345 MHz
# Bits of NVML's clock event reasons that mean the chip ran slower than it was asked to.
SLOWED = {0x4: "power cap", 0x8: "slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}


@dataclass(frozen=True)
class Task:
    """Times `configs` of a layer's kind at a scale, `rounds` calls each in turn; with dense in the same turns if asked."""

    scale_index: int
    layer: int
    configs: tuple[TritonConfig, ...]
    rounds: int
    dense: bool
    again: int = 0  # how often it was measured before and not believed


@dataclass(frozen=True)
class Clocks:
    """The GPU in the middle of a task: SM clock, board power, temperature, and why it ran slower than asked, if it did."""

    sm_mhz: int
    power_w: float
    celsius: int
    slowed: tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """Milliseconds of every call: of dense attention (none if not asked for) and of each configuration, in order.

    setup_ms: what the first configuration took on the host before its first call was done: lists, tables, loading.
    """

    dense_ms: tuple[float, ...]
    tuned_ms: tuple[tuple[float, ...], ...]
    setup_ms: float
    clocks: Clocks | None

    def why_not(self) -> str | None:
        rows = (*self.tuned_ms, self.dense_ms)
        good = self.tuned_ms and all(self.tuned_ms) and all(0 < ms < 1e9 for row in rows for ms in row)
        return None if good else "want times above 0 of at least one configuration"


def payload_of(task: Task, workload: Workload, policy: Policy, mode: str, gpu: str) -> dict[str, Any]:
    """What a worker is sent."""
    return {
        "workload": asdict(workload), "policy": exact(policy), "mode": mode, "gpu": gpu, "task": asdict(task)
    }  # fmt: skip


def exact(policy: Policy) -> dict[str, Any]:
    """What times depend on of the policy, as JSON values with every digit: no step of the generation, in the form of old logs."""
    rules = [{**asdict(r), "variant": variant_to_dict(r.variant)} for r in policy.rules]
    return {"heads": list(policy.heads), "rules": rules, "skip_scales": []}


def time_task(payload: dict[str, Any]) -> dict[str, Any]:
    """The worker's target: `Times` as JSON values. Raises whatever a launch raises, and ValueError on another GPU than asked."""
    if (here := _gpu()) != payload["gpu"]:
        raise ValueError(f"got a {here}, want a {payload['gpu']}: let CUDA_VISIBLE_DEVICES name GPUs of one kind")
    t = payload["task"]
    task = Task(**{**t, "configs": tuple(TritonConfig(**c) for c in t["configs"])})
    key = repr((payload["workload"], payload["policy"], task.scale_index, task.layer))
    if key not in _kept:  # tasks come sorted, so the last bench is the one wanted next
        _kept.clear()
        torch.cuda.empty_cache()
        workload = Reader().read(Workload, payload["workload"], "workload")
        policy = Reader().value(Policy, payload["policy"], "policy")
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        _kept[key] = Bench(policy, workload.problems(), task.layer, task.scale_index, l2_bytes=l2)
    times: dict[str, Any] = to_plain(_time(_kept[key], task, payload["mode"]))
    return times


_kept: dict[str, Bench] = {}


@lru_cache(maxsize=1)
def _gpu() -> str:
    return detect_gpu().slug


def _time(bench: Bench, task: Task, mode: str) -> Times:
    ways: dict[str, Callable[[], object]] = {}
    begun = time.perf_counter()
    for i, config in enumerate(task.configs):
        attend = bench.attention(config)
        ways[str(i)] = lambda attend=attend: bench.call(attend)  # type: ignore[misc]
        if i == 0:
            bench.call(attend)
            torch.cuda.synchronize()
            setup_ms = (time.perf_counter() - begun) * 1e3
    if task.dense:
        ways["dense"] = bench.dense
    if mode == "graph":
        ways = {name: in_graph(way, len(bench.sets)) for name, way in ways.items()}
    if task.dense:  # its times decide: steady clocks first
        until = time.monotonic() + WARM_S
        while time.monotonic() < until:
            bench.dense()
            torch.cuda.synchronize()
    seen: list[Clocks] = []
    spent = interleaved(ways, task.rounds, watch=lambda: seen.extend(_clocks()) if task.dense else None)
    tuned = tuple(tuple(spent[str(i)]) for i in range(len(task.configs)))
    return Times(tuple(spent.get("dense", ())), tuned, setup_ms, seen[0] if seen else None)


def _clocks() -> list[Clocks]:
    """The clocks now; empty where NVML cannot be asked (nvidia-ml-py is optional)."""
    with suppress(Exception):  # a permission, a driver, a virtual GPU: times are good without it
        import pynvml as nvml

        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        why = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return [Clocks(
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            tuple(name for bit, name in SLOWED.items() if why & bit),
        )]  # fmt: skip
    return []
