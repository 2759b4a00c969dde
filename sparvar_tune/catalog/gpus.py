"""The GPUs this project knows, and which of them this machine has. To add one, add a row to `GPUS`.

Peaks are the vendor's; nothing here is measured. Where a figure comes from, for every row:

* `smem_*`, `registers_per_sm`: CUDA C++ Programming Guide, table "Memory Information per Compute Capability".
* `sms`, `l2_bytes`, `memory_bytes`: what the CUDA driver reports for a whole device. The memory is a little
  under what the box says, and moves by some MiB with driver and ECC.
* bandwidth and TFLOP/s: the document named in `source`. Sparsity is never counted; where a document prints
  only the figure with sparsity, the dense one is half of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch

from sparvar_tune.catalog.names import shown, unknown_name

KIB, MIB = 1 << 10, 1 << 20
MEMORY_TOLERANCE = 0.10
DISTANCE_LIMIT = 1.0  # a factor of two in whatever two GPUs differ most in


@dataclass(frozen=True)
class Gpu:
    """One kind of silicon that tunes differently from the others.

    The CPU row has None for every number: no CPU is like another, so the CPU is always measured and the cost
    model must refuse it.

    family: "ampere", "ada", "hopper", "blackwell" or "cpu".   capability: (major, minor) of CUDA.
    smem_per_block_bytes: most shared memory one block may opt in to.   registers_per_sm: 32-bit ones.
    bf16_tflops: tensor cores, bf16 or fp16 in, fp32 accumulation, dense.
    fp32_tflops: outside the tensor cores.
    device_names: regular expressions; one must match all of torch's device name less a leading "NVIDIA ".
    """

    slug: str
    name: str
    family: str
    source: str
    capability: tuple[int, int] | None = None
    sms: int | None = None
    smem_per_block_bytes: int | None = None
    smem_per_sm_bytes: int | None = None
    registers_per_sm: int | None = None
    l2_bytes: int | None = None
    memory_bytes: int | None = None
    memory_gbps: float | None = None
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    device_names: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """torch's type of device for it."""
        return "cpu" if self.slug == "cpu" else "cuda"


_ROWS = (
    Gpu(
        slug="a100-40",
        name="NVIDIA A100 SXM4 40 GB",
        family="ampere",
        capability=(8, 0),
        sms=108,
        smem_per_block_bytes=163 * KIB,
        smem_per_sm_bytes=164 * KIB,
        registers_per_sm=65536,
        l2_bytes=40 * MIB,
        memory_bytes=40339 * MIB,
        memory_gbps=1555.0,
        bf16_tflops=312.0,
        fp32_tflops=19.5,
        # not the PCIe cards: the same chip, but 250 to 300 W instead of 400, so slower clocks under load
        device_names=(r"A100-SXM4-40GB",),
        source="NVIDIA A100 data sheet",
    ),
    Gpu(
        slug="a100-80",
        name="NVIDIA A100 SXM4 80 GB",
        family="ampere",
        capability=(8, 0),
        sms=108,
        smem_per_block_bytes=163 * KIB,
        smem_per_sm_bytes=164 * KIB,
        registers_per_sm=65536,
        l2_bytes=40 * MIB,
        memory_bytes=81051 * MIB,
        memory_gbps=2039.0,
        bf16_tflops=312.0,
        fp32_tflops=19.5,
        device_names=(r"A100-SXM4?-80GB",),
        source="NVIDIA A100 data sheet",
    ),
    Gpu(
        slug="h100-sxm",
        name="NVIDIA H100 SXM5 80 GB",
        family="hopper",
        capability=(9, 0),
        sms=132,
        smem_per_block_bytes=227 * KIB,
        smem_per_sm_bytes=228 * KIB,
        registers_per_sm=65536,
        l2_bytes=50 * MIB,
        memory_bytes=81089 * MIB,
        memory_gbps=3352.0,  # printed as 3.35 TB/s; 5120 bits x 2 x 2619 MHz
        bf16_tflops=989.4,
        fp32_tflops=66.9,
        device_names=(r"H100 80GB HBM3",),
        source="NVIDIA H100 whitepaper and data sheet, SXM5 column",
    ),
    Gpu(
        slug="h100-pcie",
        name="NVIDIA H100 PCIe 80 GB",
        family="hopper",
        capability=(9, 0),
        sms=114,
        smem_per_block_bytes=227 * KIB,
        smem_per_sm_bytes=228 * KIB,
        registers_per_sm=65536,
        l2_bytes=50 * MIB,
        memory_bytes=81008 * MIB,
        memory_gbps=2039.0,
        bf16_tflops=756.0,
        fp32_tflops=51.2,
        device_names=(r"H100 PCIe",),
        source="NVIDIA H100 whitepaper, PCIe column; bandwidth is the driver's, printed as 2 TB/s",
    ),
    Gpu(
        slug="h200",
        name="NVIDIA H200 SXM 141 GB",
        family="hopper",
        capability=(9, 0),
        sms=132,
        smem_per_block_bytes=227 * KIB,
        smem_per_sm_bytes=228 * KIB,
        registers_per_sm=65536,
        l2_bytes=60 * MIB,  # not the H100's 50, though the chip is the same
        memory_bytes=143156 * MIB,
        memory_gbps=4800.0,
        bf16_tflops=989.4,
        fp32_tflops=66.9,
        device_names=(r"H200",),
        source="NVIDIA H200 data sheet, SXM column",
    ),
    Gpu(
        slug="b200",
        name="NVIDIA B200 SXM 180 GB",
        family="blackwell",
        capability=(10, 0),
        sms=148,
        smem_per_block_bytes=227 * KIB,
        smem_per_sm_bytes=228 * KIB,
        registers_per_sm=65536,
        l2_bytes=1265 * MIB // 10,
        memory_bytes=182631 * MIB,
        # the often quoted 8 TB/s is GB200's; 7680 bits x 2 x 3996 MHz agrees
        memory_gbps=7700.0,
        bf16_tflops=2250.0,
        fp32_tflops=75.0,  # derived: 148 SMs x 128 lanes x 2 x 1.98 GHz
        device_names=(r"B200",),
        source="NVIDIA Blackwell data sheet, HGX B200 column",
    ),
    Gpu(
        slug="l40s",
        name="NVIDIA L40S 48 GB",
        family="ada",
        capability=(8, 9),
        sms=142,
        smem_per_block_bytes=99 * KIB,
        smem_per_sm_bytes=100 * KIB,
        registers_per_sm=65536,
        l2_bytes=96 * MIB,
        memory_bytes=45373 * MIB,
        memory_gbps=864.0,
        bf16_tflops=362.05,
        fp32_tflops=91.6,
        device_names=(r"L40S",),
        source="NVIDIA L40S data sheet",
    ),
    Gpu(
        slug="rtx4090",
        name="NVIDIA GeForce RTX 4090",
        family="ada",
        capability=(8, 9),
        sms=128,
        smem_per_block_bytes=99 * KIB,
        smem_per_sm_bytes=100 * KIB,
        registers_per_sm=65536,
        l2_bytes=72 * MIB,
        memory_bytes=24081 * MIB,
        memory_gbps=1008.0,
        bf16_tflops=165.2,  # GeForce tensor cores halve their rate when they accumulate in fp32
        fp32_tflops=82.6,
        device_names=(r"GeForce RTX 4090",),
        source="NVIDIA Ada GPU architecture whitepaper, appendix A",
    ),
    Gpu(
        slug="rtx5090",
        name="NVIDIA GeForce RTX 5090",
        family="blackwell",
        capability=(12, 0),
        sms=170,
        smem_per_block_bytes=99 * KIB,
        smem_per_sm_bytes=100 * KIB,
        registers_per_sm=65536,
        l2_bytes=96 * MIB,
        memory_bytes=32117 * MIB,
        memory_gbps=1792.0,
        bf16_tflops=209.5,  # as above
        fp32_tflops=104.8,
        device_names=(r"GeForce RTX 5090",),
        source="NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A",
    ),
    Gpu(slug="cpu", name="this machine's CPU", family="cpu", source="measured on the spot"),
)

GPUS: dict[str, Gpu] = {gpu.slug: gpu for gpu in _ROWS}
ALIASES = {"a100": "a100-80", "h100": "h100-sxm"}


def find_gpu(slug: str) -> Gpu:
    """The row of `slug` or of its alias; raises ValueError naming the nearest."""
    if not isinstance(slug, str) or ALIASES.get(slug, slug) not in GPUS:
        raise unknown_name("gpu", slug, GPUS)
    return GPUS[ALIASES.get(slug, slug)]


_RATES = (("SMs", "sms"), ("memory bandwidth", "memory_gbps"), ("bf16 rate", "bf16_tflops"))
_TOLD = (("SMs", "sms"), ("memory", "memory_bytes"))  # of a GPU that is in no row: all that a driver tells


def distance(a: Gpu, b: Gpu) -> float:
    """How far a launch tuned on `b` is from one for `a`: the largest |log2 ratio| of SMs, memory bandwidth and bf16 rate.

    Of a GPU that is in no row only SMs and memory are known, so these are compared.

    Infinite where the compute capability differs, whatever the family is called: binaries and limits are others then.
    """
    if a.slug == b.slug:
        return 0.0
    if a.capability is None or a.capability != b.capability:
        return math.inf
    return max(_log_ratio(a, b, field) for _, field in _told(a, b))


def _told(a: Gpu, b: Gpu) -> tuple[tuple[str, str], ...]:
    return _TOLD if UNLISTED in (a.slug, b.slug) else _RATES


def nearest_first(gpu: Gpu, others: Iterable[Gpu]) -> list[Gpu]:
    """The others by `distance`; of those as far as one another the same family first."""
    return sorted(others, key=lambda g: (distance(gpu, g), g.family != gpu.family))


def _log_ratio(a: Gpu, b: Gpu, field: str) -> float:
    ours, theirs = getattr(a, field), getattr(b, field)
    return math.log2(max(ours, theirs) / min(ours, theirs)) if ours and theirs else math.inf


def apart(a: Gpu, b: Gpu) -> str:
    """What `distance` rests on, such as "2.35x in memory bandwidth (distance 1.24, at most 1 serves)"."""
    far = distance(a, b)
    if math.isinf(far):
        ours, theirs = (".".join(map(str, g.capability)) if g.capability else "none" for g in (a, b))
        return f"compute capability {theirs}, here {ours}"
    what = max(_told(a, b), key=lambda rate: _log_ratio(a, b, rate[1]))[0]
    return f"{2**far:.2f}x in {what} (distance {far:.2f}, at most {DISTANCE_LIMIT:g} serves)"


def match_gpu(name: str, capability: tuple[int, int] | None, sms: int, memory_bytes: int) -> Gpu | None:
    """The row that torch's description of a CUDA device fits, or None.

    Name, SM count and memory must all agree: boards with other memory go by the same name, and a MIG slice
    goes by its parent's name with a suffix. `capability` None is not compared.
    """
    bare = name.strip().removeprefix("NVIDIA ")
    for gpu in GPUS.values():
        if gpu.memory_bytes is None or gpu.sms != sms or capability not in (None, gpu.capability):
            continue
        if abs(memory_bytes / gpu.memory_bytes - 1) > MEMORY_TOLERANCE:
            continue
        if any(re.fullmatch(pattern, bare) for pattern in gpu.device_names):
            return gpu
    return None


def check_device(device: torch.device | str | int) -> torch.device:
    """The device that is meant; an int is a CUDA device. Raises ValueError for what is none, and for one that is not here."""
    found = None
    if isinstance(device, str | int | torch.device) and not isinstance(device, bool):
        with suppress(RuntimeError):  # torch's own refusal names forty kinds of device
            found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f'device: got {shown(repr(device), 40)}, want "cpu", "cuda", or one GPU of several such as "cuda:1"')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        here = f"torch sees {count} CUDA GPU{'s' * (count > 1)} here" if count else "torch sees no CUDA GPU here"
        raise ValueError(f"device: got {found}, but {here} (sparvar-tune doctor says why)")
    return found


UNLISTED = "unlisted"  # slug of a GPU that is in no row; no folder of profiles is called so
FAMILY = {(8, 0): "ampere", (8, 6): "ampere", (8, 9): "ada", (9, 0): "hopper", (10, 0): "blackwell", (12, 0): "blackwell"}


def device_row(device: torch.device | str | int | None = None) -> Gpu | None:
    """The row of a CUDA device (None: the current one), or a row of its own, `UNLISTED`, for what no row describes.

    None where the device is no CUDA GPU, or, for the current one, there is none. Raises ValueError as `check_device`.
    """
    meant = None if device is None else check_device(device)
    if not torch.cuda.is_available() or (meant is not None and meant.type != "cuda"):
        return None
    index = meant.index if meant is not None else None
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    found = torch.cuda.get_device_properties(index)
    capability = (found.major, found.minor)
    return match_gpu(found.name, capability, found.multi_processor_count, found.total_memory) or Gpu(
        slug=UNLISTED, name=found.name, family=FAMILY.get(capability, "other"), source="the driver", capability=capability,
        sms=found.multi_processor_count, memory_bytes=found.total_memory,
    )  # fmt: skip


def detect_gpu() -> Gpu:
    """The row of the current CUDA device, or of the CPU without CUDA; raises ValueError if that device is in no row."""
    gpu = device_row()
    if gpu is None:
        return GPUS["cpu"]
    if gpu.slug == UNLISTED:
        assert gpu.capability and gpu.memory_bytes
        raise ValueError(
            f'this GPU is "{gpu.name}", capability {gpu.capability[0]}.{gpu.capability[1]}, '
            f"{gpu.sms} SMs, {gpu.memory_bytes / 2**30:.1f} GiB: no row of "
            "sparvar_tune/catalog/gpus.py has that name, SM count and memory (a MIG slice never does). "
            f"Add a row there, or name the nearest: {', '.join(GPUS)}"
        )
    return gpu
