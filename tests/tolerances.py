"""How far from the fp64 oracle a kernel may be, by dtype, and why: relative L2 over the whole output, and worst element.

The oracle sees the same rounded inputs, so what is allowed is the kernel's own rounding.
"""

from __future__ import annotations

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
