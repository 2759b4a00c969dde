"""silu(gate) * up in one pass."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparvar_kernels.backends.triton.binary import TYPES, Launcher, launcher
from sparvar_kernels.path.door import Form
from sparvar_kernels.path.triton.launch import PathBuild

BLOCK, WARPS = 2048, 4


@triton.jit
def gated_silu_kernel(gate_ptr, up_ptr, many, EVEN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (block of BLOCK numbers). EVEN: the last block is whole, too; only then are accesses 16 bytes wide."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        mask = tl.full([BLOCK], 1, tl.int1)
    else:
        mask = at < many
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(gate_ptr + at, (gate / (1.0 + tl.exp(-gate)) * up).to(gate_ptr.dtype.element_ty), mask=mask)


def gated_silu_build(dtype: torch.dtype, even: bool = True, aligned: bool = True) -> PathBuild:
    """What a call launches; even: the count is a multiple of BLOCK; aligned: addresses are multiples of 16 bytes."""
    types = {"gate_ptr": f"*{TYPES[dtype]}", "up_ptr": f"*{TYPES[dtype]}", "many": "i64"}
    return PathBuild.of(gated_silu_kernel, types, {"EVEN": even, "BLOCK": BLOCK}, {"num_warps": WARPS, "num_stages": 1}, aligned)


@lru_cache(maxsize=4096)
def gated_silu_launch(gate: Form, up: Form, device: torch.device) -> tuple[Launcher, tuple[int, int, int], int]:
    """The binary for tensors of this form, how many programs it is, and how many numbers there are."""
    assert gate is not None and up is not None
    many = gate[0].numel()
    build = gated_silu_build(gate[2], many % BLOCK == 0, gate[3] == up[3] == 0)
    return launcher(build, device), (-(-many // BLOCK), 1, 1), many
