"""The fastest of cuBLASLt's algorithms for a product, where somebody looked for it.

For a product of many rows the library proposes some eight, and PyTorch takes the first: a guess, none is timed. Of Infinity's
products at 2048 x 2048 the best takes up to 10 % less than the first on an H200, whose clock is held down by its power. Here
they are timed, as cuDNN's benchmark mode does for convolutions. Only those that give the same bits as the library's first are
taken, so that a picture does not depend on which was the fastest that day.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from sparvar_kernels.path.cublaslt import ALIGNMENT, MatrixProduct, ProductForm, Proposal

LEAST_ROWS = 12_000  # one picture of 1024 x 1024 has 8192 at most: it gains 1 %, and looking costs its first one 0.3 s
TIMES = 5
HALF = (torch.bfloat16, torch.float16)


class Fastest(NamedTuple):
    product: MatrixProduct
    proposal: Proposal

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        self.product(x, weight, bias, y, self.proposal)


_FOUND: dict[ProductForm, Fastest | None] = {}
_LOCK = threading.Lock()


def fastest(form: ProductForm, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None = None) -> Fastest | None:
    """What `look_for` found for a form, if it can read and write these tensors as they are."""
    found = _FOUND.get(form)
    if found is None or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, y))):
        return None
    n, k = form.outputs, form.inputs
    fits = (
        x.shape[-1] == k and x.numel() == form.batch * form.rows * k
        and weight.shape[-2:] == ((k, n) if form.turned else (n, k)) and weight.numel() == form.batch * n * k
        and (bias is None or bias.shape == (n,))
        and (y is None or (y.shape == (form.batch, form.rows, n) and y.dtype == torch.float32))
    )  # fmt: skip
    reads = [t for t in (x, weight, bias) if t is not None]
    alike = all(t.dtype == form.dtype for t in reads)
    lie = all(
        t.device == form.device and t.is_contiguous() and not t.data_ptr() % ALIGNMENT
        for t in (x, weight, bias, y) if t is not None
    )  # fmt: skip
    return found if fits and alike and lie else None


def is_many(rows: int) -> bool:
    """Whether a product of so many rows is looked for."""
    return rows >= LEAST_ROWS


def is_worth_it(form: ProductForm) -> bool:
    """Whether `look_for` looks."""
    return form.device.type == "cuda" and form.dtype in HALF and is_many(form.batch * form.rows)


def is_found(form: ProductForm) -> bool:
    """Whether an algorithm was found."""
    return _FOUND.get(form) is not None


def look_for(form: ProductForm) -> None:
    """Times a form's algorithms, once, on numbers of no meaning. Waits for the device: not while a graph is captured."""
    if form in _FOUND or not is_worth_it(form):
        return
    with _LOCK, torch.cuda.device(form.device), torch.no_grad():
        if form not in _FOUND:
            try:
                _FOUND[form] = _timed(MatrixProduct(form))
            except RuntimeError:  # no room for the look, or a library that refuses: torch's own product will do
                _FOUND[form] = None


def _timed(product: MatrixProduct) -> Fastest | None:
    form = product.form
    if not product.proposals:
        return None
    own = torch.Generator(form.device).manual_seed(0)

    def some(*shape: int, dtype: torch.dtype = form.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=form.device).normal_(generator=own)

    x = some(form.batch, form.rows, form.inputs)
    weight = some(form.batch, form.outputs, form.inputs).mul_(form.inputs**-0.5)  # turned, as many
    bias = some(form.outputs) if form.bias else None
    shape, dtype = (form.batch, form.rows, form.outputs), torch.float32 if form.adds else form.dtype
    wanted, y = some(*shape, dtype=dtype), some(*shape, dtype=dtype)
    before = wanted.clone() if form.adds else y
    product(x, weight, bias, wanted, product.proposals[0])
    alike: list[Proposal] = []
    for proposal in product.proposals:
        try:
            product(x, weight, bias, y.copy_(before) if form.adds else y.fill_(torch.nan), proposal)
        except RuntimeError:
            continue
        if torch.equal(y, wanted):
            alike.append(proposal)
    begun, ended = ([[torch.cuda.Event(enable_timing=True) for _ in alike] for _ in range(TIMES)] for _ in range(2))
    for at, end in zip(begun, ended, strict=True):  # in turn, as the clock goes down while the GPU works
        for proposal, a, b in zip(alike, at, end, strict=True):
            a.record()
            product(x, weight, bias, y, proposal)
            b.record()
    torch.cuda.current_stream().synchronize()
    times = [min(begun[t][i].elapsed_time(ended[t][i]) for t in range(TIMES)) for i in range(len(alike))]
    return Fastest(product, alike[times.index(min(times))]) if alike else None
