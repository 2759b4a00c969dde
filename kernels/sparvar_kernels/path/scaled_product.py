"""The product of 8-bit rows that gives more than the hardware's library does: fp32 or fp16, and GELU in the same pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, check_plain, form, on_device, why_not_contiguous, why_not_like
from sparvar_kernels.path.scaled_rows import FORMATS, NAMES, ScaledRows, converts

Then = Literal["none", "gelu"]
SIDE = 16  # both sides of a weight are a multiple of this where the kernel runs
MOST_ROWS = 1 << 22


def scaled_product(
    x: ScaledRows, weight: ScaledRows, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32, then: Then = "none"
) -> Tensor:
    """[..., N]: what `then` makes of (x.rows @ weight.rows^T) * x.scales * weight.scales^T + bias, rounded once to out_dtype.

    x        of `scaled_rows`: rows [..., K], scales [..., 1], as weight has [N, K] and [N, 1]; contiguous, of one format.
    bias     [N] in out_dtype, which is bf16, fp16 or fp32.
    then     "gelu": the exact form of GELU.

    Sums are fp32, of int8 exact. On a GPU of the format's capability, K and N multiples of 16, this is one kernel on the device
    of x that never waits; its tensor cores keep fewer bits of a sum of E4M3 on the way (relative errors of 1e-4). On a CPU that
    multiplies 8-bit integers torch's own product of them, elsewhere plain torch. Raises ValueError, in one line, for anything
    else.
    """
    device = x.rows.device
    given = {"x.rows": x.rows, "weight.rows": weight.rows, "x.scales": x.scales, "weight.scales": weight.scales, "bias": bias}
    check_plain(given, device)
    forms = [form(t) for t in given.values()]
    reason = why_not_scaled_product(*forms, out_dtype, then)
    if reason:
        raise ValueError(reason)
    outputs, inputs = weight.rows.shape
    if not converts(device, NAMES[weight.rows.dtype]) or inputs % SIDE or outputs % SIDE or x.rows.numel() == 0:
        with torch.autocast(device.type, enabled=False):
            y = sums_of(x.rows, weight.rows).mul_(weight.scales.view(-1))
            y = y.mul_(x.scales) if bias is None else torch.addcmul(bias.float(), y, x.scales)
        return (F.gelu(y) if then == "gelu" else y).to(out_dtype)
    out = torch.empty(*x.rows.shape[:-1], outputs, dtype=out_dtype, device=device)
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.scaled_product import scaled_product_launch

    # Triton's interpreter has no E4M3
    emulated = device.type == "cpu" and weight.rows.dtype != torch.int8
    rows, columns = (t.rows.float() if emulated else t.rows for t in (x, weight))
    run, grid, many = scaled_product_launch(forms[0], forms[1], (forms[2], forms[3]), forms[4], out_dtype, then == "gelu", device)
    last = out if bias is None else bias
    on_device(device, run, grid, *(pointer(t) for t in (rows, columns, x.scales, weight.scales, last, out)), many)
    return out


def multiplies_int8() -> bool:
    """Whether this CPU has instructions for products of 8-bit integers (AVX-512 VNNI); without them torch's own may saturate."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def sums_of(rows: Tensor, weight: Tensor) -> Tensor:
    """[..., N] fp32: rows [..., K] times weight [N, K], both of one 8-bit format, in plain torch."""
    if weight.dtype != torch.int8:
        return rows.float() @ weight.float().t()
    if rows.device.type == "cpu" and rows.numel() and multiplies_int8():
        return torch._int_mm(rows.reshape(-1, rows.shape[-1]), weight.t()).float().view(*rows.shape[:-1], -1)
    return (rows.double() @ weight.double().t()).float()  # exact


@lru_cache(maxsize=4096)
def why_not_scaled_product(
    rows: Form, weight: Form, row_scales: Form, scales: Form, bias: Form, out: torch.dtype, then: str
) -> str | None:
    """Why tensors of these forms cannot be multiplied, or None."""
    assert rows is not None and weight is not None and row_scales is not None and scales is not None
    if then not in ("none", "gelu"):
        return f"then: got {then!r}, want none or gelu"
    if out not in FLOATS:
        return f"out_dtype: got {out}, want {' or '.join(map(str, FLOATS))}"
    if len(weight[0]) != 2 or not weight[0].numel():
        return f"weight.rows: got {tuple(weight[0])}, want [N, K]"
    outputs, inputs = weight[0]
    if not rows[0] or rows[0][:-1].numel() > MOST_ROWS:
        return f"x.rows: got {tuple(rows[0])}, want [..., K] with at most {MOST_ROWS} rows"
    if weight[2] not in NAMES:
        return f"weight.rows: got {weight[2]}, want {' or '.join(str(f.dtype) for f in FORMATS.values())}"
    wanted = (
        ("x.rows", rows, weight[2], (*rows[0][:-1], inputs)), ("weight.rows", weight, weight[2], (outputs, inputs)),
        ("x.scales", row_scales, torch.float32, (*rows[0][:-1], 1)), ("weight.scales", scales, torch.float32, (outputs, 1)),
        ("bias", bias, out, (outputs,)),
    )  # fmt: skip
    for name, t, dtype, shape in wanted:
        reason = why_not_like(name, t, (dtype,), shape) or why_not_contiguous(name, t)
        if reason:
            return reason
    return None
