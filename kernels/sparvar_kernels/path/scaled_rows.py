"""Rows made ready for a product of 8-bit numbers: each scaled to its format's range, with what comes before in the same pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path.door import FLOATS, Form, by_triton, check_plain, form, on_device, why_not_contiguous, why_not_like

E4M3 = torch.float8_e4m3fn
LEAST = 1e-12  # a row whose largest value is smaller is scaled as if it were this
MOST_ROW = 1 << 15


class Format(NamedTuple):
    """An 8-bit format. largest: its largest value. capability: of the first GPUs that convert to and multiply it."""

    dtype: torch.dtype
    largest: float
    capability: tuple[int, int]


# E4M3: 4 exponent bits, 3 of mantissa. int8: whole numbers, so that sums are exact; nearer to rows without outliers
FORMATS = {"e4m3": Format(E4M3, 448.0, (8, 9)), "int8": Format(torch.int8, 127.0, (8, 0))}
NAMES = {f.dtype: name for name, f in FORMATS.items()}
First = Literal["none", "gelu", "silu"]


class ScaledRows(NamedTuple):
    """About rows.float() * scales. rows: E4M3 or int8 [..., C]; scales: fp32 [..., 1]."""

    rows: Tensor
    scales: Tensor


def scaled_rows(x: Tensor, first: First = "none", up: Tensor | None = None, fmt: str = "e4m3") -> ScaledRows:
    """Each row of x [..., C], or of what `first` makes of it, scaled so that its largest |value| is the format's, and rounded.

    x, up   of one shape and dtype (bf16, fp16 or fp32), contiguous, C of 1..32768.
    first   "gelu": the tanh form of GELU. "silu": silu(x) * up, SwiGLU's gate, and only then is there an `up`. Both in fp32,
            then rounded to x's dtype, so that it is the same as the two passes one after the other.
    fmt     "e4m3" (8-bit floats) or "int8", of `FORMATS`.

    With a = max(largest |value| of the row, 1e-12) and m = 448 of E4M3, 127 of int8: rows = value * (m / a), rounded to nearest,
    ties to even, and scales = a / m, both divisions in fp32. A row of zeros stays one. Of a row with a NaN or an infinity the
    E4M3 rows hold a NaN, and the scale is one with int8, so that all of a product's row is NaN.

    On a GPU of the format's capability (8.9 or more, of int8 8.0) this is one kernel on the device of x that never waits, so it
    can be captured in a CUDA graph; elsewhere plain torch, the same to the bit but for the exponential. Raises ValueError, in one
    line, for anything else.
    """
    device = x.device
    check_plain({"x": x, "up": up}, device)
    forms = form(x), form(up)
    reason = why_not_scaled_rows(*forms, first, fmt)
    if reason:
        raise ValueError(reason)
    if not converts(device, fmt):
        return scaled(_first(x, first, up), fmt)
    out, dtype = empty_rows(x.shape, device, fmt), FORMATS[fmt].dtype
    if x.numel() == 0:
        return ScaledRows(out.rows.to(dtype), out.scales)
    from sparvar_kernels.backends.triton.binary import pointer
    from sparvar_kernels.path.triton.scaled_rows import scaled_rows_launch

    run, grid = scaled_rows_launch(*forms, first, fmt, device)
    on_device(device, run, grid, pointer(x), pointer(x if up is None else up), pointer(out.rows), pointer(out.scales))
    return ScaledRows(out.rows.to(dtype), out.scales)


def empty_rows(shape: torch.Size, device: torch.device, fmt: str) -> ScaledRows:
    """Memory that a kernel writes scaled rows into. Triton's interpreter cuts off where E4M3 is rounded to, so there the kernels
    write fp32, which torch rounds."""
    dtype = FORMATS[fmt].dtype if device.type == "cuda" or fmt == "int8" else torch.float32
    return ScaledRows(torch.empty(shape, dtype=dtype, device=device), torch.empty(*shape[:-1], 1, device=device))


def converts(device: torch.device, fmt: str) -> bool:
    """Whether the kernels that make scaled rows of a format run here."""
    return by_triton(device) and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= FORMATS[fmt].capability)


def scaled(y: Tensor, fmt: str) -> ScaledRows:
    """The rule above on rows y [..., C] as they are."""
    y = y.float()
    largest = y.abs().amax(-1, keepdim=True).clamp_min_(LEAST)
    most = torch.full_like(largest, FORMATS[fmt].largest)  # by a number torch divides as by its reciprocal, which rounds twice
    rows, scales = y * (most / largest), largest / most
    if fmt == "int8":  # of what is not finite the scale is NaN: x - x is
        rows, scales = rows.round_(), scales.add_(largest - largest)
    return ScaledRows(rows.to(FORMATS[fmt].dtype), scales)


@lru_cache(maxsize=4096)
def why_not_scaled_rows(x: Form, up: Form, first: str, fmt: str) -> str | None:
    """Why tensors of these forms cannot be scaled, or None."""
    assert x is not None
    if fmt not in FORMATS:
        return f"fmt: got {fmt!r}, want {' or '.join(FORMATS)}"
    if first not in ("none", "gelu", "silu"):
        return f"first: got {first!r}, want none, gelu or silu"
    if not x[0] or not 1 <= x[0][-1] <= MOST_ROW:
        return f"x: got {tuple(x[0])}, want [..., C] with C of 1..{MOST_ROW}"
    if (up is None) == (first == "silu"):
        return f"up: got {'none' if up is None else 'one'} with first={first!r}, want one exactly with silu"
    shape = tuple(x[0])
    reason = why_not_like("x", x, FLOATS, shape) or why_not_like("up", up, (x[2],), shape)
    return reason or why_not_contiguous("x", x) or why_not_contiguous("up", up)


def _first(x: Tensor, first: str, up: Tensor | None) -> Tensor:
    """The pass before the scaling, rounded to x's dtype."""
    if first == "gelu":
        return F.gelu(x.float(), approximate="tanh").to(x.dtype)
    return x if up is None else (F.silu(x.float()) * up.float()).to(x.dtype)
