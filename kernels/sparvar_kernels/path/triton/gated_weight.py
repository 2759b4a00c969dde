"""A weight times gates: every weight is read once, whatever the number of gates."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import ALIGNMENT, TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

BLOCK = 2048


@triton.jit
def gated_weight_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, gate_ptr, out_ptr, stride_gb, stride_n, outputs, batch, BLOCK: tl.constexpr
):
    """Program (output, block of its inputs). stride_n: the inputs of an output."""
    n = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < stride_n
    weight = tl.load(weight_ptr + n * stride_n + offs, mask=mask, other=0.0).to(tl.float32)
    for b in range(batch):
        gate = tl.load(gate_ptr + b * stride_gb + n)
        out_at = out_ptr + (b * outputs.to(tl.int64) + n) * stride_n + offs
        tl.store(out_at, (gate * weight).to(out_ptr.dtype.element_ty), mask=mask)


def gated_weight_build(dtype: torch.dtype, aligned: bool = True) -> PathBuild:
    """What a call launches."""
    types = {"weight_ptr": f"*{TYPES[dtype]}", "gate_ptr": "*fp32", "out_ptr": f"*{TYPES[dtype]}", "stride_gb": "i64"}
    types |= {"stride_n": "i64", "outputs": "i32", "batch": "i32"}
    return PathBuild.of(gated_weight_kernel, types, {"BLOCK": BLOCK}, {"num_warps": 4, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def gated_weight_launch(
    weight: Form, gate: Form, device: torch.device
) -> tuple[Launcher, tuple[int, int, int], tuple[int, int, int, int]]:
    """The binary for tensors of this form, how many programs it is, and its arguments behind the pointers."""
    assert weight is not None and gate is not None
    (outputs, inputs), (batch, _), stride = weight[0], gate[0], gate[1][0]
    aligned = not (inputs | stride) % ALIGNMENT and not (weight[3] or gate[3])
    build = gated_weight_build(weight[2], aligned)
    return launcher(build, device), (outputs, triton.cdiv(inputs, BLOCK), 1), (stride, inputs, outputs, batch)
