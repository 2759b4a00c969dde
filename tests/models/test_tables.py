"""The two tables. Expected numbers are typed from published templates and data sheets, not from the code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparvar_tune.catalog.gpus import ALIASES, GPUS, Gpu, detect_gpu, find_gpu, match_gpu
from sparvar_tune.catalog.models import MODELS, find_model

KIB, MIB = 1024, 1024**2
CUDA_GPUS = [gpu for gpu in GPUS.values() if gpu.family != "cpu"]

# aspect: tokens of an image at 0.06M, 0.25M, 0.60M, 1M
INFINITY_TOKENS = {
    "1.000": (521, 2521, 6425, 10521),
    "1.250": (614, 2814, 6854, 10774),
    "1.333": (665, 2657, 7085, 10973),
    "1.500": (533, 2759, 6941, 10997),
    "1.750": (472, 2628, 7220, 11252),
    "2.000": (451, 2681, 7219, 11269),
    "2.500": (555, 2555, 6805, 10805),
    "3.000": (509, 2588, 7016, 11123),
}
TRANSPOSED = {
    "1.250": "0.800",
    "1.333": "0.750",
    "1.500": "0.667",
    "1.750": "0.571",
    "2.000": "0.500",
    "2.500": "0.400",
    "3.000": "0.333",
}


# ---- GPUs


def test_gpu_slugs() -> None:
    assert list(GPUS) == [
        "a100-40", "a100-80", "h100-sxm", "h100-pcie", "h200", "b200", "l40s", "rtx4090", "rtx5090", "cpu",
    ]  # fmt: skip
    assert all(slug == gpu.slug and gpu.name and gpu.source for slug, gpu in GPUS.items())


@pytest.mark.parametrize("gpu", CUDA_GPUS, ids=lambda g: g.slug)
def test_gpu_row_is_plausible(gpu: Gpu) -> None:
    assert gpu.capability and gpu.sms and gpu.smem_per_block_bytes and gpu.smem_per_sm_bytes and gpu.l2_bytes
    assert gpu.memory_bytes and gpu.memory_gbps and gpu.bf16_tflops and gpu.fp32_tflops and gpu.device_names
    assert gpu.registers_per_sm == 65536
    # CUDA keeps 1 KiB of every block for itself
    assert gpu.smem_per_block_bytes == gpu.smem_per_sm_bytes - KIB
    assert 32 * MIB < gpu.l2_bytes < gpu.memory_bytes < 200e9
    assert gpu.fp32_tflops < gpu.bf16_tflops
    # the clock that the fp32 peak implies: a figure with sparsity or of another board would be far off
    lanes = 64 if gpu.capability == (8, 0) else 128
    assert 1.38e9 < gpu.fp32_tflops * 1e12 / (gpu.sms * lanes * 2) < 2.65e9
    # flops per byte at which a kernel stops being bound by memory
    assert 100 < gpu.bf16_tflops * 1e3 / gpu.memory_gbps < 450


def test_gpu_order() -> None:
    def column(field: str, *slugs: str) -> list[float]:
        return [getattr(GPUS[slug], field) for slug in slugs]

    gbps = column("memory_gbps", "l40s", "rtx4090", "a100-40", "rtx5090", "a100-80", "h100-sxm", "h200", "b200")
    assert gbps == sorted(gbps)
    tflops = column("bf16_tflops", "rtx4090", "rtx5090", "a100-40", "l40s", "h100-pcie", "h100-sxm", "b200")
    assert tflops == sorted(tflops)
    assert GPUS["h200"].bf16_tflops == GPUS["h100-sxm"].bf16_tflops


@pytest.mark.parametrize(
    ("capability", "per_block"),
    [((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)],
)
def test_shared_memory_follows_capability(capability: tuple[int, int], per_block: int) -> None:
    rows = [gpu for gpu in CUDA_GPUS if gpu.capability == capability]
    assert rows and all(gpu.smem_per_block_bytes == per_block * KIB for gpu in rows)


def test_cpu_row_has_no_numbers() -> None:
    cpu = find_gpu("cpu")
    numbers = (cpu.capability, cpu.sms, cpu.l2_bytes, cpu.memory_bytes, cpu.memory_gbps, cpu.bf16_tflops)
    assert cpu.family == "cpu" and set(numbers) == {None}


def test_find_gpu_and_aliases() -> None:
    assert find_gpu("h200") is GPUS["h200"]
    assert find_gpu("a100").slug == "a100-80"
    assert find_gpu("h100").slug == "h100-sxm"
    assert not set(ALIASES) & set(GPUS) and set(ALIASES.values()) <= set(GPUS)


def test_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'^gpu "h10": unknown; nearest: h100-sxm, h100-pcie, h200\. Known: a100-40, '):
        find_gpu("h10")
    with pytest.raises(ValueError, match="nearest: rtx4090"):
        find_gpu("RTX-4090")
    with pytest.raises(ValueError, match=r'^gpu "zzzz": unknown\. Known: a100-40, '):
        find_gpu("zzzz")


# name, capability, SMs, memory in MiB as torch reports them -> slug
DEVICES = [
    ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 40339, "a100-40"),
    ("A100-SXM4-40GB", (8, 0), 108, 39539, "a100-40"),
    ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 81158, "a100-80"),
    ("NVIDIA A100-SXM-80GB", (8, 0), 108, 81251, "a100-80"),
    ("NVIDIA H100 80GB HBM3", (9, 0), 132, 81082, "h100-sxm"),
    ("NVIDIA H100 PCIe", (9, 0), 114, 81008, "h100-pcie"),
    ("NVIDIA H200", (9, 0), 132, 143156, "h200"),
    ("NVIDIA B200", (10, 0), 148, 182642, "b200"),
    ("NVIDIA L40S", (8, 9), 142, 45589, "l40s"),
    ("NVIDIA GeForce RTX 4090", (8, 9), 128, 24563, "rtx4090"),
    ("NVIDIA GeForce RTX 5090", (12, 0), 170, 32120, "rtx5090"),
    # other silicon that shares a name, a chip, or both
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 16, 9984, None),
    ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", (9, 0), 132, 81082, None),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", (8, 0), 42, 19968, None),
    ("NVIDIA H100 80GB HBM3", (9, 0), 16, 9984, None),
    ("NVIDIA H100 80GB HBM3", (9, 0), 132, 65536, None),
    ("NVIDIA H100 NVL", (9, 0), 132, 95320, None),
    ("NVIDIA H200 NVL", (9, 0), 132, 143156, None),
    ("NVIDIA H800", (9, 0), 132, 81082, None),
    ("NVIDIA GH200 480GB", (9, 0), 132, 97280, None),
    ("NVIDIA A100-PCIE-40GB", (8, 0), 108, 40326, None),
    ("NVIDIA A100 80GB PCIe", (8, 0), 108, 81049, None),
    ("NVIDIA L40", (8, 9), 142, 45589, None),
    ("NVIDIA GeForce RTX 4090", (8, 9), 128, 48500, None),
    ("NVIDIA GeForce RTX 4090 D", (8, 9), 114, 24081, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, 16376, None),
    ("NVIDIA GeForce RTX 5090 D", (12, 0), 170, 32117, None),
    ("NVIDIA GeForce RTX 3090", (8, 6), 82, 24260, None),
    ("AMD Instinct MI300X", (9, 4), 304, 196592, None),
    ("", (9, 0), 132, 0, None),
]


@pytest.mark.parametrize(("name", "capability", "sms", "mib", "slug"), DEVICES)
def test_match_gpu(name: str, capability: tuple[int, int], sms: int, mib: int, slug: str | None) -> None:
    found = match_gpu(name, capability, sms, mib * MIB)
    assert (found.slug if found else None) == slug


def test_every_cuda_row_is_matched_by_some_device() -> None:
    assert {device[-1] for device in DEVICES} - {None} == {gpu.slug for gpu in CUDA_GPUS}


def test_match_gpu_checks_capability_only_when_given() -> None:
    h200 = ("NVIDIA H200", 132, 143156 * MIB)
    assert match_gpu(h200[0], (8, 0), *h200[1:]) is None
    assert match_gpu(h200[0], None, *h200[1:]) is GPUS["h200"]


def _pretend_device(monkeypatch: pytest.MonkeyPatch, name: str, sms: int, mib: int) -> None:
    device = SimpleNamespace(name=name, major=9, minor=0, multi_processor_count=sms, total_memory=mib * MIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)


def test_detect_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_device(monkeypatch, "NVIDIA H100 PCIe", 114, 81008)
    assert detect_gpu().slug == "h100-pcie"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_gpu().slug == "cpu"


def test_detect_gpu_says_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_device(monkeypatch, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16, 9984)
    with pytest.raises(ValueError, match=r'this GPU is "NVIDIA H100 80GB HBM3 MIG 1g.10gb", capability 9.0, 16 SMs, 9.8 GiB'):
        detect_gpu()


# ---- models


def test_model_slugs() -> None:
    assert list(MODELS) == [
        "infinity-2b", "infinity-8b", "infinity-8b-512", "hart",
        "var-d16", "var-d20", "var-d24", "var-d30", "var-d36", "pocketvar", "emojivar",
    ]  # fmt: skip


@pytest.mark.parametrize("slug", list(MODELS))
def test_model_row_is_plausible(slug: str) -> None:
    model = find_model(slug)
    assert model.slug == slug and model.title and model.source
    assert model.width == model.heads * model.head_dim and model.layers > 0
    assert model.head_dim in (64, 128)
    if model.attention == "cosine":
        assert (model.softmax_scale, model.logit_bound) == (1.0, 100.0)
    else:
        assert model.softmax_scale < 1 and model.logit_bound is None
    assert model.schedule() is model.schedule(model.default_resolution, model.default_aspect)
    hash(model)
    for resolution, aspects in model.resolutions.items():
        for aspect in aspects:
            schedule = model.schedule(resolution, aspect)
            areas = [h * w for h, w in schedule.grids]
            assert areas == sorted(set(areas)), "grids must grow"
            h, w = schedule.grids[-1]
            assert h / w == pytest.approx(float(aspect), rel=0.08)


@pytest.mark.parametrize("slug", ["infinity-2b", "infinity-8b"])
@pytest.mark.parametrize("aspect", list(INFINITY_TOKENS))
def test_infinity_tokens(slug: str, aspect: str) -> None:
    model = find_model(slug)
    for resolution, scales, tokens in zip(
        ("0.06M", "0.25M", "0.60M", "1M"), (7, 10, 12, 13), INFINITY_TOKENS[aspect], strict=True
    ):
        schedule = model.schedule(resolution, aspect)
        assert (len(schedule), schedule.num_tokens, schedule.prefix) == (scales, tokens, 0)
        if aspect != "1.000":
            turned = model.schedule(resolution, TRANSPOSED[aspect])
            assert turned.grids == tuple((w, h) for h, w in schedule.grids)


def test_infinity_names() -> None:
    model = find_model("infinity-8b")
    assert list(model.resolutions) == ["0.06M", "0.25M", "0.60M", "1M"]
    for aspects in model.resolutions.values():
        assert set(aspects) == set(INFINITY_TOKENS) | set(TRANSPOSED.values())
    square = model.schedule()
    assert [square.num_keys(i) for i in range(13)] == [
        1, 5, 21, 57, 121, 265, 521, 921, 1497, 2521, 4121, 6425, 10521,
    ]  # fmt: skip
    assert model.schedule("1M", "3.000").aspect() == "111x37"
    assert model.schedule("1M", "0.333").aspect() == "37x111"


def test_infinity_shapes() -> None:
    small, large = find_model("infinity-2b"), find_model("infinity-8b")
    assert (small.layers, small.width, small.heads, small.head_dim) == (32, 2048, 16, 128)
    assert (large.layers, large.width, large.heads, large.head_dim) == (40, 3584, 28, 128)
    assert (large.dtype, large.layout, large.guidance_batch) == ("bf16", "BHND", 2)


def test_hart() -> None:
    model = find_model("hart")
    schedule = model.schedule()
    assert (schedule.prefix, len(schedule)) == (300, 13)
    assert [schedule.prefix, *(schedule.num_keys(i) for i in range(13))] == [
        300, 304, 313, 329, 354, 403, 484, 628, 884, 1325, 2054, 3350, 5654, 9750,
    ]  # fmt: skip
    assert schedule.num_queries(12) == 4096
    assert (model.layers, model.width, model.heads, model.head_dim) == (24, 1536, 24, 64)
    assert (model.attention, model.softmax_scale) == ("plain", 0.03125)
    assert (model.dtype, model.layout, model.guidance_batch) == ("fp16", "BNHD", 2)


@pytest.mark.parametrize(
    ("depth", "resolution", "queries", "tokens"),
    [
        (16, "256", 256, 680),
        (20, "256", 256, 680),
        (24, "256", 256, 680),
        (30, "256", 256, 680),
        (36, "512", 1024, 2240),
    ],
)
def test_var(depth: int, resolution: str, queries: int, tokens: int) -> None:
    model = find_model(f"var-d{depth}")
    schedule = model.schedule()
    assert model.default_resolution == resolution
    assert (model.layers, model.heads, model.head_dim, model.width) == (depth, depth, 64, 64 * depth)
    assert (len(schedule), schedule.num_queries(9), schedule.num_tokens) == (10, queries, tokens)


def test_pocketvar_agrees_with_its_package() -> None:
    pocket = pytest.importorskip("sparvar_tune.pocketvar.model")
    model, config = find_model("pocketvar"), pocket.PocketConfig()
    assert (model.layers, model.heads, model.head_dim, model.width) == (8, 4, 64, 256)
    assert (model.layers, model.heads, model.head_dim, model.width) == (
        config.depth, config.heads, config.head_dim, config.width,
    )  # fmt: skip
    assert model.schedule() == config.schedule
    assert model.schedule().num_tokens == 10521
    assert (model.guidance_batch, model.dtype, model.adapter) == (1, "fp32", "pocketvar")
    if not pocket.WEIGHTS.is_file():
        pytest.skip("no pocketvar weights here: its logit bound is not checked")
    assert pocket.load_pocketvar().logit_bound <= 100.0


def test_unknown_model_resolution_and_aspect_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'^model "infinity8b": unknown; nearest: infinity-8b, .*Known: infinity-2b, '):
        find_model("infinity8b")
    with pytest.raises(ValueError, match=r'^model "var36": unknown; nearest: var-d36, '):
        find_model("var36")
    model = find_model("infinity-2b")
    with pytest.raises(ValueError, match=r'^infinity-2b resolution "0\.6M": unknown; nearest: 0\.60M, .*Known: 0\.06M, '):
        model.schedule("0.6M")
    with pytest.raises(ValueError, match=r'^infinity-2b aspect at 1M "1\.33": unknown; nearest: 1\.333, '):
        model.schedule(aspect="1.33")
    with pytest.raises(ValueError, match=r'^hart resolution "zz": unknown\. Known: 1024$'):
        find_model("hart").schedule("zz")
