"""Residual add + gate + norm + modulation in one pass over the stream."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

NORMS = {"none": 0, "layer": 1, "rms": 2}
OPERANDS = ("update", "gate", "weight", "bias", "scale", "shift", "offset")
EACH_THREAD = 16  # numbers of a row a thread holds
MOST_CHANNELS = 1 << 14


@triton.jit
def _operand(ptr, at, mask, GIVEN: tl.constexpr, other: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector every row reads: it stays in the first-level cache, which the streams go past."""
    if GIVEN:
        value = tl.load(ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    else:
        value = other
    return value


@triton.jit
def residual_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, update_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, offset_ptr, out_ptr,
    stride_xb, stride_xl, stride_ub, stride_ul, stride_gb, stride_ab, stride_sb, stride_ob, length, eps,
    NORM: tl.constexpr, UPDATE: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, ADD_ONE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, row of the batch): its channels stay in registers from the sum to the norm."""
    i_l, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < CHANNELS
    x_at = x_ptr + i_b * stride_xb + i_l * stride_xl + offs
    x = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if UPDATE:
        update_at = update_ptr + i_b * stride_ub + i_l * stride_ul + offs
        update = tl.load(update_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if GATE:
            update *= _operand(gate_ptr, i_b * stride_gb + offs, mask, GATE, 1.0)
        stored = (x + update).to(x_ptr.dtype.element_ty)
        tl.store(x_at, stored, mask=mask)
        x = stored.to(tl.float32)  # the norm sees what the stream now holds
    if NORM > 0:
        if OFFSET:
            x += _operand(offset_ptr, i_b * stride_ob + offs, mask, OFFSET, 0.0)
        if NORM == 1:
            x = tl.where(mask, x - tl.sum(x, 0) / CHANNELS, 0.0)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / CHANNELS + eps)
        if WEIGHT:
            y *= _operand(weight_ptr, offs, mask, WEIGHT, 1.0)
        if BIAS:
            y += _operand(bias_ptr, offs, mask, BIAS, 0.0)
        if SCALE:
            factor = _operand(scale_ptr, i_b * stride_ab + offs, mask, SCALE, 0.0)
            if ADD_ONE:
                factor += 1.0
            y *= factor
        if SHIFT:
            y += _operand(shift_ptr, i_b * stride_sb + offs, mask, SHIFT, 0.0)
        out_at = out_ptr + (i_b * length + i_l) * CHANNELS + offs
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


def residual_norm_build(
    x: torch.dtype, out: torch.dtype, channels: int, norm: str, add_one: bool, operands: dict[str, torch.dtype],
    aligned: bool = True,
) -> PathBuild:  # fmt: skip
    """What a call launches; operands: the dtype of each that is given, of OPERANDS."""
    types = {"x_ptr": f"*{TYPES[x]}", "out_ptr": f"*{TYPES[out]}"}
    types |= {f"{name}_ptr": f"*{TYPES[operands.get(name, x)]}" for name in OPERANDS}
    types |= {
        name: "i64" if name.endswith("b") else "i32" for name in residual_norm_kernel.arg_names if name.startswith("stride_")
    }
    types |= {"length": "i32", "eps": "fp32"}
    block = triton.next_power_of_2(channels)
    constants = {
        "NORM": NORMS[norm], **{name.upper(): name in operands for name in OPERANDS}, "ADD_ONE": add_one,
        "CHANNELS": channels, "BLOCK": block,
    }  # fmt: skip
    warps = min(max(triton.next_power_of_2(block // (32 * EACH_THREAD)), 1), 16)
    return PathBuild.of(residual_norm_kernel, types, constants, {"num_warps": warps, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def residual_norm_launch(
    x: Form, update: Form, gate: Form, weight: Form, bias: Form, scale: Form, shift: Form, offset: Form,
    out: torch.dtype, norm: str, add_one: bool, device: torch.device,
) -> tuple[Launcher, tuple[int, int, int], tuple[int, ...]]:  # fmt: skip
    """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
    assert x is not None
    batch, length, channels = x[0]
    forms = dict(zip(OPERANDS, (update, gate, weight, bias, scale, shift, offset), strict=True))
    given = {name: t for name, t in forms.items() if t is not None}
    rows = [update[1][:2] if update else (0, 0)]
    steps = [t[1][0] if t is not None and len(t[0]) == 2 and batch > 1 else 0 for t in (gate, scale, shift, offset)]
    strides = (*x[1][:2], *rows[0], *steps)
    aligned = gcd(*strides, channels) % ALIGNMENT == 0 and not any(t[3] for t in (x, *given.values()))
    build = residual_norm_build(x[2], out, channels, norm, add_one, {name: t[2] for name, t in given.items()}, aligned)
    return launcher(build, device), (length, batch, 1), (*strides, length)
