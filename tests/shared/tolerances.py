"""How far from the fp64 oracle a kernel may be, by dtype, and why: relative L2 over the whole output, and worst element.

The oracle sees the same rounded inputs, so what is allowed is the kernel's own rounding.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

TOLERANCES = {
    "fp64": 1e-12,  # sums of up to 10**4 terms at 2**-53
    "fp32": 5e-6,  # sums of up to 10**4 terms at 2**-24, exp() good to 2 ulp, logits up to 20
    "fp16": 2e-3,  # output and (in Triton) probabilities rounded to 2**-11, the residual subtracts two such outputs
    "bf16": 1.2e-2,  # the same at 2**-8
}
# Column mass is summed in fp32 from fp32 scores whatever the input dtype.
MASS_TOLERANCE = 2e-5
# The worst element against the largest one: rounding there is 2 to 4 times the root mean square, so one wrong row of a
# hundred, which relative L2 of a long output may hide, does not pass.
WORST = 4


def relative(out: Tensor, ref: Tensor) -> float:
    """Relative L2 error of `out` against the oracle's fp64 `ref`."""
    return float((out.double() - ref).norm() / ref.norm())


def assert_close(out: Tensor, ref: Tensor, dtype: str, slack: float = 1) -> None:
    """Fails unless `out` is within `slack` times the table of `ref`, in relative L2 and in its worst element."""
    assert out.shape == ref.shape
    assert bool(torch.isfinite(out).all()), f"{int((~torch.isfinite(out)).sum())} of {out.numel()} elements not finite"
    error, worst = relative(out, ref), float((out.double() - ref).abs().max() / ref.abs().max())
    limit = TOLERANCES[dtype] * slack
    assert error < limit and worst < WORST * limit, f"relative L2 {error:.3g}, worst {worst:.3g}, want < {limit:.3g}"


# The passes around attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding to the dtype, as a share of the number itself, and fp32 arithmetic of sums that may cancel.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TIMES = 2 if os.environ.get("TRITON_INTERPRET") == "1" else 1  # Triton's interpreter cuts bits off where a GPU rounds
ARITHMETIC = 3e-6


def assert_rounded_once(got: Tensor, want: Tensor, what: str) -> None:
    """Every element within one rounding of the oracle's fp64."""
    assert got.shape == want.shape and bool(torch.isfinite(got).all()), f"{what}: not finite or of another shape"
    over = (got.double() - want).abs() - 1.001 * TIMES * ROUNDING[got.dtype] * want.abs()
    tiny = TIMES * 2.0**-24 if got.dtype == torch.float16 else 0.0  # subnormal
    assert float(over.max()) <= tiny + ARITHMETIC * float(want.abs().max()), f"{what}: {float(over.max()):.3g} over"
