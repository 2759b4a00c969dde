"""The ladder of ways to draw one picture, measured in turn in one process: what each step of our path is worth.

Wall time is from call to finished device; GPU time is the sum of its kernels and copies, read by a profiler in pictures of their
own, since a profiler slows the host. A way is one model with some changes put on; `enabled` turns a path on and off without
losing its graphs.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.whole_image.decoding import Decoding
from sparvar_tune.measure.timing import rotated

KINDS = (  # the first whose mark a kernel's name has; what has none is the decoder's or the rest
    ("attention", ("flash", "fmha", "sdpa", "gathered", "fetched", "mass_kernel", "select_kernel", "shortlist", "text_att")),
    ("convolutions", ("conv", "winograd", "implicit", "fprop")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "splitK", "cublas")),
    ("our elementwise", ("append_kernel", "residual_norm", "scaled_rows", "gated_silu", "group_norm")),
)


@dataclass
class Rung:
    """on, off: put the way on and take it off; a picture in between is this way's.

    warm: pictures after which it is as it stays.
    """

    name: str
    on: Callable[[], None]
    off: Callable[[], None]
    warm: int = 0


@contextlib.contextmanager
def using(way: Rung) -> Iterator[None]:
    way.on()
    try:
        yield
    finally:
        way.off()


@contextlib.contextmanager
def warmed(way: Rung, draw: Callable[[], object]) -> Iterator[None]:
    with using(way):
        for _ in range(way.warm):
            draw()
        yield


def flash() -> contextlib.AbstractContextManager[None]:
    """PyTorch's FlashAttention-2 for every attention without a mask."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def cudnn() -> contextlib.AbstractContextManager[None]:
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True)


def wall_ms(draw: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    draw()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


def peak_bytes(draw: Callable[[], object]) -> int:
    """The most memory PyTorch holds while drawing, what its allocator keeps for later (and graphs) included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    draw()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


def kernels(draw: Callable[[], object]) -> dict[str, Any]:
    """Device milliseconds of one picture by kind, their number, and the ten longest by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as prof:
        draw()
        torch.cuda.synchronize()
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in prof.profiler.kineto_results.events():
        if event.device_type().name == "CUDA" and event.duration_ns() and event.name() != "Context Sync":
            by_name[event.name()][0] += event.duration_ns() / 1e6
            by_name[event.name()][1] += 1
    kinds: dict[str, float] = defaultdict(float)
    for name, (ms, _) in by_name.items():
        kinds[next((kind for kind, marks in KINDS if any(mark in name for mark in marks)), "other")] += ms
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:14]
    return {
        "gpu_ms": sum(ms for ms, _ in by_name.values()), "launches": sum(int(n) for _, n in by_name.values()),
        "kinds": dict(kinds), "longest": [[name[:90], ms, n] for name, (ms, n) in longest],
    }  # fmt: skip


def climb(
    draw: Callable[[], object],
    ways: Mapping[str, Rung],
    rounds: int,
    profiled: int,
    decoding: Decoding,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Every way's wall times in rotating order, then its kernels. Ways are warm: each drew three pictures before."""
    found: dict[str, Any] = {}
    for name, way in ways.items():
        begun = time.perf_counter()
        try:
            with using(way):
                first = [wall_ms(draw) for _ in range(3)]
        except Exception as error:  # one way's failure does not cost the others
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
            say(f"{name}: {found[name]['error']}")
            continue
        found[name] = {"first_ms": first, "wall_ms": [], "decoder_ms": [], "kernels": []}
        say(f"{name}: first pictures {', '.join(f'{ms:.0f}' for ms in first)} ms ({time.perf_counter() - begun:.0f} s)")
    alive = [name for name in ways if "error" not in found[name]]
    for i in range(rounds):
        for name in rotated(alive, i):
            with warmed(ways[name], draw):
                decoding.ms()
                found[name]["wall_ms"].append(wall_ms(draw))
                found[name]["decoder_ms"].append(sum(decoding.ms()))
        say(f"round {i + 1}/{rounds}")
    for name in alive:
        with warmed(ways[name], draw):
            for _ in range(profiled):
                found[name]["kernels"].append(kernels(draw))
        k = found[name]["kernels"][-1] if found[name]["kernels"] else {}
        walls = sorted(found[name]["wall_ms"]) or found[name]["first_ms"]
        say(f"{name}: wall {walls[len(walls) // 2]:.0f} ms, GPU {k.get('gpu_ms', 0):.0f} ms, {k.get('launches', 0)} launches")
    return found
