"""The passes around attention against an fp64 oracle written here: plain loops and definitions, nothing of theirs."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreted import in_interpreter
from tolerances import DTYPES, assert_rounded_once
from torch import Tensor

from sparvar_kernels.path import append_qkv, gated_silu, residual_norm
from sparvar_kernels.path.append import PAIRS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def turned(x: Tensor, table: Tensor, pairs: str) -> Tensor:
    """One head's vector x [D] fp64 turned by its token's table."""
    half, out = len(x) // 2, torch.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if pairs == "interleaved" else (i, i + half)
        (cos_a, sin_a), (cos_b, sin_b) = (table[a], table[b]) if pairs == "rotate_half" else (table[i], table[i])
        out[a], out[b] = x[a] * cos_a - x[b] * sin_a, x[b] * cos_b + x[a] * sin_b
    return out


def wanted_append(qkv, q_scale, normalise, rotation, pairs, eps):  # type: ignore[no-untyped-def]
    """q [B, L, H, D] and k of the definition, fp64, a vector at a time."""
    found = qkv.double()[:, :, :2].clone()
    for b in range(qkv.shape[0]):
        for t in range(qkv.shape[1]):
            for part in range(2):
                for h in range(qkv.shape[3]):
                    x = found[b, t, part, h]
                    if normalise:
                        x = x / max(math.sqrt(float((x * x).sum())), eps)
                    if part == 0 and q_scale is not None:
                        x = x * float(q_scale[h])
                    if rotation is not None:
                        table = rotation if rotation.ndim == 3 else rotation[b]
                        x = turned(x, table[t].double(), pairs)
                    found[b, t, part, h] = x
    return found[:, :, 0], found[:, :, 1]


def check_append(
    dtype=torch.bfloat16, dim=64, heads=3, length=5, batch=2, spare=0, start=3, normalise=True, scaled=True, pairs=None,
    per_row=False, gap=0, given=False, device="cpu", eps=1e-12,
) -> None:  # fmt: skip
    """gap: numbers between tokens of qkv; spare: rows of the cache beyond the batch; given: q's buffer comes from outside."""
    g = torch.Generator().manual_seed(dim + 7 * length)
    wide = torch.full((batch, length, 3 * heads * dim + gap), math.nan, dtype=dtype, device=device)
    wide[..., : 3 * heads * dim] = torch.randn(batch, length, 3 * heads * dim, generator=g).to(dtype)
    qkv = wide[..., : 3 * heads * dim].unflatten(-1, (3, heads, dim))
    if normalise:
        qkv[0, 0, :2, 0] = 0  # a vector without a length stays zero
    places = start + length + 4
    caches = [torch.full((batch + spare, heads, places, dim), math.nan, dtype=dtype, device=device) for _ in range(2)]
    factor = (torch.rand(heads, generator=g) * 20 + 1).to(device) if scaled else None
    channels = dim if pairs == "rotate_half" else dim // 2
    angles = torch.randn((batch, length, channels) if per_row else (length, channels), generator=g) * 3
    rotation = torch.stack((angles.cos(), angles.sin()), -1).to(device) if pairs else None
    memory = torch.full((batch, length, heads, dim), math.nan, dtype=dtype, device=device) if given else None
    before = wide.clone()
    q = append_qkv(
        qkv, *caches, start, query=memory, q_scale=factor, normalise=normalise, rotation=rotation, pairs=pairs or "halves",
        eps=eps,
    )  # fmt: skip
    what = f"{dtype} {dim} {length} {pairs} {normalise} {scaled}"
    want_q, want_k = wanted_append(qkv.cpu(), factor, normalise, rotation.cpu() if pairs else None, pairs, eps)
    assert q.shape == (batch, heads, length, dim) and q.transpose(1, 2).is_contiguous() and q.dtype == dtype
    assert memory is None or q.data_ptr() == memory.data_ptr()
    assert torch.equal(wide.nan_to_num(9), before.nan_to_num(9)), "the product's output was written to"
    assert_rounded_once(q.transpose(1, 2).cpu(), want_q, f"q {what}")
    place = slice(start, start + length)
    assert_rounded_once(caches[0][:batch, :, place].transpose(1, 2).cpu(), want_k, f"k {what}")
    assert torch.equal(caches[1][:batch, :, place].transpose(1, 2), qkv[:, :, 2]), f"v {what}"
    for cache in caches:  # nothing else
        assert int((~cache.isnan()).sum()) == batch * heads * length * dim, what


APPENDS = (
    *({"dtype": dtype, "dim": dim, "pairs": "interleaved", "spare": i % 2, "gap": 16 * (i % 2)}
      for i, (dtype, dim) in enumerate((d, n) for d in DTYPES for n in (32, 64, 96, 128))),
    *({"dtype": dtype, "pairs": pairs, "per_row": True, "normalise": False, "scaled": False, "given": True}
      for dtype, pairs in zip(DTYPES, PAIRS, strict=True)),
    {"pairs": "rotate_half", "dim": 96, "normalise": False}, {"pairs": "halves", "dim": 96, "heads": 4, "scaled": False},
    {"pairs": "rotate_half", "dim": 32, "per_row": True}, {"length": 1, "start": 0}, {"length": 13, "dim": 128, "heads": 2},
    {"length": 67, "dim": 32, "heads": 4, "pairs": "interleaved", "batch": 1}, {"gap": 5, "dim": 32, "heads": 6},
    {"heads": 4, "scaled": False}, {"normalise": False, "dim": 20},
    {"normalise": False, "scaled": False, "dim": 6, "batch": 1, "pairs": "interleaved"},
    {"batch": 1, "spare": 3, "heads": 1, "eps": 20.0},
)  # fmt: skip


def run_appends(cases=APPENDS) -> int:  # type: ignore[no-untyped-def]
    for job in cases:
        check_append(**job)
    return len(cases)


def wanted_norm(x, update, gate, norm, scale, shift, weight, bias, offset, eps, add_one):  # type: ignore[no-untyped-def]
    """(the stream, its norm), fp64, a row at a time; the stream is rounded to its dtype before the norm."""
    stream, out = x.double().clone(), torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        at = [t if t is None or t.ndim == 1 else t[b] for t in (gate, scale, shift, offset)]
        g, s, h, o = (None if t is None else t.double() for t in at)
        for i in range(x.shape[1]):
            row = stream[b, i]
            if update is not None:
                row = row + update[b, i].double() * (1 if g is None else g)
                stream[b, i] = row
                row = row.to(x.dtype).double()
            row = row if o is None else row + o
            if norm == "layer":
                row = row - row.mean()
            row = row / torch.sqrt((row * row).sum() / len(row) + eps)
            row = row if weight is None else row * weight.double()
            row = row if bias is None else row + bias.double()
            row = row if s is None else row * (s + 1 if add_one else s)
            out[b, i] = row if h is None else row + h
    return stream, out


def check_norm(
    x_dtype=torch.float32, dtype=torch.bfloat16, out_dtype=torch.bfloat16, channels=96, length=5, batch=2, norm="layer",
    given=("update", "gate", "scale", "shift"), flat=False, add_one=True, gap=0, vectors=torch.float32, eps=1e-6, device="cpu",
) -> None:  # fmt: skip
    """given: the operands; flat: gate [C] instead of [B, C]; gap: numbers between rows of the update."""
    g = torch.Generator().manual_seed(channels + length)
    x = (torch.randn(batch, length, channels, generator=g) * 2 + 3).to(x_dtype).to(device)
    wide = torch.full((batch, length, channels + gap), math.nan, dtype=dtype, device=device)
    wide[..., :channels] = torch.randn(batch, length, channels, generator=g).to(dtype)
    operands: dict[str, Tensor] = {"update": wide[..., :channels]}
    for name in ("gate", "scale", "shift", "weight", "bias", "offset"):
        shape = (channels,) if flat or name in ("weight", "bias") else (batch, channels)
        pair = torch.randn(*shape[:-1], 2, shape[-1], generator=g).to(vectors).to(device)
        operands[name] = pair.select(-2, 1)  # a view, as the parts of an adaLN's output are
    operands = {name: t for name, t in operands.items() if name in given}
    before = x.cpu().clone()
    y = residual_norm(x, norm=norm, eps=eps, out_dtype=out_dtype, add_one=add_one, **operands)
    cpu = {name: operands[name].cpu() if name in operands else None for name in
           ("update", "gate", "scale", "shift", "weight", "bias", "offset")}  # fmt: skip
    stream, want = wanted_norm(before, **cpu, norm=norm, eps=eps, add_one=add_one)
    what = f"{x_dtype} {out_dtype} {channels} {norm} {given}"
    if "update" in given:
        assert_rounded_once(x.cpu(), stream, f"x {what}")
        if x_dtype != torch.float32:  # what the norm saw: the oracle's own sum may round the other way by a tie
            want = wanted_norm(x.cpu(), **{**cpu, "update": None}, norm=norm, eps=eps, add_one=add_one)[1]
    else:
        assert torch.equal(x.cpu(), before), what
    if norm == "none":
        assert y is x
        return
    assert y.dtype == out_dtype and y.is_contiguous() and y.data_ptr() != x.data_ptr()
    assert_rounded_once(y.cpu(), want, f"y {what}")


ADALN, RMS = ("update", "gate", "scale", "shift"), ("update", "weight")
NORMS = (
    *({"x_dtype": a, "dtype": b, "out_dtype": c} for a, b, c in (
        (DTYPES[0], DTYPES[1], DTYPES[1]), (DTYPES[0], DTYPES[2], DTYPES[2]), (DTYPES[0], DTYPES[0], DTYPES[0]),
        (DTYPES[1], DTYPES[1], DTYPES[1]), (DTYPES[2], DTYPES[0], DTYPES[0]), (DTYPES[0], DTYPES[1], DTYPES[0]))),
    {"x_dtype": DTYPES[2], "dtype": DTYPES[2], "out_dtype": DTYPES[2], "norm": "rms", "given": RMS, "vectors": DTYPES[2]},
    {"norm": "rms", "given": ("update", "weight", "bias", "gate"), "flat": True, "channels": 64, "vectors": DTYPES[1]},
    {"given": ("scale", "shift"), "channels": 100}, {"given": ("scale",), "add_one": False, "channels": 1},
    {"given": ("update",), "norm": "none", "x_dtype": DTYPES[2]}, {"given": ("update", "gate"), "norm": "none", "length": 1},
    {"given": ("update", "weight", "bias"), "flat": True}, {"gap": 16, "flat": True, "add_one": False}, {"gap": 3, "batch": 1},
    {"given": ("offset", "scale", "shift")}, {"given": ("offset", "weight", "bias"), "flat": True, "channels": 65},
    {"given": ("offset", "update", "gate"), "x_dtype": DTYPES[2], "norm": "rms"},
    {"given": (), "channels": 129, "length": 3}, {"given": ("shift",), "norm": "rms", "channels": 640, "eps": 0.5},
)  # fmt: skip


def run_norms() -> int:
    for job in NORMS:
        check_norm(**job)
    return len(NORMS)


def check_gated(dtype: torch.dtype, *shape: int, device: str = "cpu") -> None:
    """In memory with NaN around, which stays."""
    g, many = torch.Generator().manual_seed(sum(shape)), math.prod(shape)
    memory = torch.full((2, many + 64), math.nan, dtype=dtype, device=device)
    memory[:, 32 : 32 + many] = (torch.randn(2, many, generator=g) * 8).to(dtype)
    gate, up = (row[32 : 32 + many].view(shape) for row in memory)
    wide = memory.cpu().double()[:, 32 : 32 + many]
    want, before = (wide[0] / (1 + torch.exp(-wide[0])) * wide[1]).view(shape), up.clone()
    assert gated_silu(gate, up) is gate
    assert_rounded_once(gate.cpu(), want, f"{dtype} {shape}")
    assert torch.equal(up, before) and int(memory.isnan().sum()) == 128


GATED = [(dtype, *shape) for dtype in DTYPES for shape in ((3, 5, 33), (2, 2, 1024), (1,))]


def run_gated() -> int:
    for job in GATED:
        check_gated(*job)
    return len(GATED)


def test_gated_silu_on_a_cpu():
    assert run_gated() == len(GATED)


@pytest.mark.slow
def test_append_on_a_cpu():
    assert run_appends() == len(APPENDS)


def test_residual_norm_on_a_cpu():
    assert run_norms() == len(NORMS)


@needs_triton
@pytest.mark.slow
def test_all_in_the_interpreter():
    some = "t.APPENDS[:12:3] + t.APPENDS[12:]"  # of the first twelve, every dtype by every head_dim, four
    assert in_interpreter("test_path_kernels", f"[t.run_appends({some}), t.run_norms(), t.run_gated()]") == [
        len(APPENDS) - 8, len(NORMS), len(GATED)
    ]  # fmt: skip


def hart_angles(positions: Tensor, dim: int, two: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [L, D] of HART's two rotary classes, by their formula: frequencies step by 4 of D for places (y, x)."""
    step = 4 if two else 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, step).double() / dim)
    places = positions.double() if two else positions.double().unsqueeze(-1)
    angles = places.unsqueeze(-1) * frequencies  # [L, 2 or 1, D / step]
    both = torch.cat((angles, angles), -1).flatten(1)
    return both.cos(), both.sin()


def test_harts_rotation_is_a_table_of_channels():
    """Its image tokens' pairs turn by two angles, which no table of pairs can say; its context tokens' by one."""
    dim, length = 32, 6
    x = torch.randn(1, length, 3, 2, dim, generator=torch.Generator().manual_seed(0))
    for positions in (torch.randint(0, 60, (length, 2)) * 1.7, torch.arange(length)):
        cos, sin = hart_angles(positions, dim, positions.ndim == 2)
        caches = [torch.zeros(1, 2, length, dim) for _ in range(2)]
        table = torch.stack((cos, sin), -1).float()
        q = append_qkv(x, *caches, 0, rotation=table, pairs="rotate_half")
        for got, part in ((q, x[:, :, 0]), (caches[0], x[:, :, 1])):
            one, two = part.double().transpose(1, 2).chunk(2, -1)
            want = part.double().transpose(1, 2) * cos + torch.cat((-two, one), -1) * sin
            assert_rounded_once(got, want, "rotate_half")
        alike = bool((table[:, : dim // 2] == table[:, dim // 2 :]).all())
        assert alike == (positions.ndim == 1)


def append_arguments(**changes):  # type: ignore[no-untyped-def]
    made = {
        "qkv": torch.zeros(2, 3, 3, 2, 16),
        "cache_k": torch.zeros(2, 2, 9, 16),
        "cache_v": torch.zeros(2, 2, 9, 16),
        "start": 0,
    }
    return {**made, **changes}


@pytest.mark.parametrize(("changes", "reason"), [
    ({"qkv": torch.zeros(2, 3, 2, 16)}, "want five axes"), ({"qkv": torch.zeros(2, 3, 2, 2, 16)}, r"want \[B, L, 3, H, D\]"),
    ({"qkv": torch.zeros(2, 3, 3, 2, 15)}, "even"), ({"qkv": torch.zeros(2, 3, 3, 2, 16).double()}, "float64"),
    ({"qkv": torch.zeros(2, 3, 3, 2, 32)[..., ::2]}, "last axis contiguous"), ({"start": 7}, r"want 0\.\.6"),
    ({"start": -1}, "start"), ({"cache_k": torch.zeros(1, 2, 9, 16)}, "B' >= 2"),
    ({"cache_v": torch.zeros(2, 2, 8, 16)}, "8 places"), ({"cache_k": torch.zeros(2, 3, 9, 16)}, "cache_k"),
    ({"cache_v": torch.zeros(2, 2, 9, 16).half()}, "float16"), ({"query": torch.zeros(2, 2, 3, 16)}, "query"),
    ({"query": torch.zeros(1, 1, 1, 16).expand(2, 3, 2, 16)}, "memory of its own"),
    ({"q_scale": torch.zeros(2).half()}, "q_scale"), ({"q_scale": torch.zeros(1, 2, 1, 1)}, "q_scale"),
    ({"rotation": torch.zeros(4, 8, 2)}, "rotation"), ({"rotation": torch.zeros(3, 8, 2), "pairs": "rotate_half"}, "rotation"),
    ({"rotation": torch.zeros(3, 8, 2).half()}, "rotation"), ({"rotation": torch.zeros(3, 16, 2)[:, ::2]}, "contiguous"),
    ({"pairs": "llama"}, "pairs"), ({"cache_k": torch.zeros(2, 2, 9, 16, requires_grad=True)}, "no backward"),
    ({"cache_v": torch.zeros(2, 2, 9, 16, device="meta")}, "cache_v"),
])  # fmt: skip
def test_append_refuses_in_one_line(changes, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        append_qkv(**append_arguments(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"x": torch.zeros(2, 16)}, r"want \[B, L, C\]"), ({"x": torch.zeros(2, 3, 16).double()}, "float64"),
    ({"x": torch.zeros(2, 1, 16).expand(2, 3, 16)}, "memory of its own"), ({"x": torch.zeros(1, 1, 20000)}, "16384"),
    ({"update": torch.zeros(2, 4, 16)}, "update"), ({"update": torch.zeros(2, 3, 32)[..., ::2]}, "last axis contiguous"),
    ({"update": None, "gate": torch.zeros(16)}, "without an update"), ({"gate": torch.zeros(2, 1, 16)}, "gate"),
    ({"scale": torch.zeros(3, 16)}, "scale"), ({"weight": torch.zeros(2, 16)}, "weight"), ({"norm": "batch"}, "norm"),
    ({"norm": "none", "bias": torch.zeros(16)}, "only adds"), ({"offset": torch.zeros(3, 16)}, "offset"),
    ({"norm": "none", "offset": torch.zeros(16)}, "only adds"), ({"out_dtype": torch.int8}, "out_dtype"),
    ({"update": torch.zeros(2, 3, 16, device="meta")}, "update"), ({"shift": torch.zeros(16, requires_grad=True)}, "no backward"),
])  # fmt: skip
def test_residual_norm_refuses_in_one_line(changes, reason):
    made = {"x": torch.zeros(2, 3, 16), "update": torch.zeros(2, 3, 16), "eps": 1e-6, "out_dtype": torch.float32}
    with pytest.raises(ValueError, match=reason) as caught:
        residual_norm(**{**made, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("gate", "up", "reason"), [
    (torch.zeros(2, 4), torch.zeros(2, 5), "up"), (torch.zeros(2, 4), torch.zeros(2, 4).half(), "float16"),
    (torch.zeros(4, 2).T, torch.zeros(2, 4), "contiguous"), (torch.zeros(2, 4), torch.zeros(4, 2, 2)[..., 0].T, "contiguous"),
    (torch.zeros(2, 4).double(), torch.zeros(2, 4).double(), "float64"), (torch.zeros(()), torch.zeros(()), "one axis"),
    (torch.zeros(4), torch.zeros(1).expand(4), "contiguous"), (torch.zeros(4, requires_grad=True), torch.zeros(4), "no backward"),
])  # fmt: skip
def test_gated_silu_refuses_in_one_line(gate, up, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        gated_silu(gate, up)
    assert "\n" not in str(caught.value)


SIZES = {"infinity-8b": (3584, 28, 128), "infinity-2b": (2048, 16, 128), "hart": (1536, 24, 64), "var-d30": (1920, 30, 64)}
CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))


def real_builds() -> list[Any]:
    """What the four models launch at a large scale."""
    from sparvar_kernels.path.triton.append import append_build
    from sparvar_kernels.path.triton.gated_silu import gated_silu_build
    from sparvar_kernels.path.triton.residual_norm import residual_norm_build

    fp32, bf16, fp16 = DTYPES
    builds = []
    for model, (channels, heads, dim) in SIZES.items():
        half = bf16 if model.startswith("infinity") else fp16
        cosine, turn = model != "hart", {"infinity-8b": 1, "infinity-2b": 1, "hart": 3, "var-d30": 0}[model]
        builds.append(append_build(half, dim, heads, 4096, normalise=cosine, scaled=cosine, turn=turn))
        if model == "hart":
            builds.append(residual_norm_build(fp16, fp16, channels, "rms", True, {"update": fp16, "weight": fp16}))
        else:
            operands = {"update": half, **dict.fromkeys(("gate", "scale", "shift"), fp32)}
            builds.append(residual_norm_build(fp32, half, channels, "layer", True, operands))
            moved = dict.fromkeys(("scale", "shift", "offset"), fp32)
            builds.append(residual_norm_build(fp32, half, channels, "layer", True, moved))
    return [*builds, gated_silu_build(fp16)]


@needs_triton
@pytest.mark.slow
def test_real_sizes_compile_without_a_spill_and_with_wide_accesses():
    """Without a GPU: what the four models launch. The one narrow access is a head's learned factor."""
    from sparvar_kernels.backends.triton.binary import compile_for, machine_code

    for i, build in enumerate(dict.fromkeys(real_builds())):
        for capability in {(9, 0) if i < 2 else CAPABILITIES[i % 5], CAPABILITIES[i % 5]}:
            text = machine_code(compile_for(build, capability))
            takes = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
            assert takes["STACK"] == takes["LOCAL"] == 0 and takes["REG"] <= 128, (build, capability, takes)
            accesses = re.findall(r"\b(?:LDG|STG)\.([A-Z0-9.]*)", text)
            narrow = sum("128" not in modifiers.split(".") for modifiers in accesses)
            assert accesses and narrow == int(dict(build.constants).get("SCALED", 0)), (build, capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_on_a_gpu(dtype):
    """Compiled: all the small forms, and full-size ones in which a program meets the grid's ends."""
    for job in APPENDS:
        check_append(**job, device="cuda")
    for job in NORMS:
        check_norm(**job, device="cuda")
    check_append(dtype, 128, 28, 101, 2, pairs="interleaved", device="cuda")
    check_append(dtype, 64, 24, 101, 2, pairs="rotate_half", per_row=True, normalise=False, scaled=False, device="cuda")
    check_norm(out_dtype=dtype, channels=3584, length=301, device="cuda")
    for job in GATED:
        check_gated(*job, device="cuda")
    check_gated(dtype, 2, 64, 4096, device="cuda")


@pytest.mark.gpu
def test_both_in_a_graph():
    """Captured once and replayed on other numbers: no wait, no allocation that moves."""

    def run() -> tuple[Tensor, Tensor]:
        q = append_qkv(qkv, *caches, 4, q_scale=factor, normalise=True, rotation=table)
        return q, residual_norm(x, update, gate, scale=gate, shift=gate, eps=1e-6, out_dtype=torch.bfloat16)

    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, 33, 3, 4, 64, generator=g, device="cuda").bfloat16()
    caches = [torch.zeros(2, 4, 50, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    factor, table = torch.rand(4, device="cuda"), torch.randn(33, 32, 2, device="cuda")
    x, update, gate = (torch.randn(*shape, device="cuda") for shape in ((2, 33, 256), (2, 33, 256), (2, 256)))
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    qkv.copy_(torch.randn_like(qkv))
    kept = torch.randn_like(x)
    x.copy_(kept)
    graph.replay()
    got, after = [t.clone() for t in (*captured, *caches)], x.clone()
    x.copy_(kept)
    assert all(torch.equal(a, b) for a, b in zip(got, (*run(), *caches), strict=True)) and torch.equal(after, x)
