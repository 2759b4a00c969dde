"""Products by the library's fastest algorithm, and what adds them to the stream, against fp64 oracles."""

from __future__ import annotations

import contextlib
import ctypes
from importlib.util import find_spec

import pytest
import torch
from interpreted import in_interpreter
from tolerances import assert_rounded_once
from torch import Tensor

from sparvar_kernels.path import add_linear, cublaslt, fastest_product, gated_weight, linear
from sparvar_kernels.path.added_linear import added_form
from sparvar_kernels.path.cublaslt import ProductForm
from sparvar_kernels.path.linear import linear_form

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(device)


def check_added(dtype: torch.dtype, turned: bool, batch=2, length=5, inputs=24, outputs=7, device="cpu") -> float:
    """The largest error over what one rounding of the sum to fp32 and its order may be."""
    x, stream = numbers(batch, length, inputs, dtype=dtype, device=device), numbers(batch, length, outputs, device=device)
    weight = numbers(batch, inputs, outputs, dtype=dtype, device=device)
    weight = weight.mT if turned else weight.mT.contiguous()
    before = stream.cpu().double()
    add_linear(stream, x, weight)
    want, size = before.clone(), before.abs()
    for b in range(batch):
        for k in range(inputs):  # an outer product at a time
            one = x[b, :, k].cpu().double()[:, None] * weight[b, :, k].cpu().double()
            want[b] += one
            size[b] += one.abs()
    return float(((stream.cpu().double() - want).abs() / size).max()) / 2.0**-22


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_added(dtype, turned):
    assert check_added(dtype, turned) < 1


def check_gated_weight(dtype: torch.dtype, outputs: int, inputs: int, batch: int = 2, device: str = "cpu") -> None:
    weight, both = numbers(outputs, inputs, dtype=dtype, device=device), numbers(batch, 2, outputs, device=device)
    got = gated_weight(weight, both[:, 1])  # a view, as a gate is
    want = torch.stack([torch.stack([row * g for row, g in zip(weight.cpu().double(), gate, strict=True)])
                        for gate in both[:, 1].cpu().double()])  # fmt: skip
    assert got.dtype == dtype and got.is_contiguous()
    assert_rounded_once(got.cpu(), want, f"{dtype} {outputs} {inputs}")


GATED = [(dtype, *sizes) for dtype in DTYPES for sizes in ((5, 24, 2), (3, 2050, 1), (1, 1, 3))]


def run_gated() -> int:
    for job in GATED:
        check_gated_weight(*job)
    return len(GATED)


def test_a_weight_times_its_gates():
    assert run_gated() == len(GATED)


@needs_triton
@pytest.mark.slow
def test_a_weight_times_its_gates_in_the_interpreter():
    assert in_interpreter("test_products", "t.run_gated()") == len(GATED)


@pytest.mark.parametrize(("weight", "gate", "reason"), [
    (torch.zeros(3), torch.zeros(2, 3), r"weight: got \(3,\), want \[N, K\]"),
    (torch.zeros(3, 4), torch.zeros(3), r"gate: got \(3,\), want \[B, 3\]"),
    (torch.zeros(3, 4), torch.zeros(2, 4), r"gate: got \(2, 4\), want \(2, 3\)"),
    (torch.zeros(4, 3).t(), torch.zeros(2, 3), "weight: got strides .*, want its last axis contiguous"),
    (torch.zeros(3, 4), torch.zeros(2, 3).half(), "gate: got torch.float16, want torch.float32"),
    (torch.zeros(3, 4).double(), torch.zeros(2, 3), "weight: got torch.float64"),
    (torch.zeros(3, 4), torch.zeros(2, 3, requires_grad=True), "gate: got a tensor that requires grad"),
    (torch.zeros(3, 4), torch.zeros(2, 3, device="meta"), "gate: got a torch.strided tensor on meta"),
])  # fmt: skip
def test_what_is_no_weight_and_gates_is_refused_in_one_line(weight, gate, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        gated_weight(weight, gate)
    assert "\n" not in str(caught.value)


# What somebody looked for


class Told:
    """In the place of an algorithm: fills what it should write with 7."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        self.calls += 1
        y.fill_(7)


def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16, skip: int = 0) -> Tensor:
    """Zeros whose address is a multiple of what the library asks for, but for `skip` numbers."""
    many = torch.Size(shape).numel()
    flat = torch.zeros(many + 512, dtype=dtype)
    first = -flat.data_ptr() % cublaslt.ALIGNMENT // flat.element_size() + skip
    return flat[first : first + many].view(shape)


@pytest.fixture
def found(monkeypatch):
    """Forms for which an algorithm was found, by what it is."""
    table: dict[ProductForm, Told] = {}
    monkeypatch.setattr(fastest_product, "_FOUND", table)
    return table


def test_an_algorithm_is_called_with_what_it_can_read(found):
    x, weight, bias = buffer(2, 3, 8), buffer(4, 8), buffer(4)
    form = linear_form(x, weight, bias)
    run = found[form] = Told()
    assert form == ProductForm(torch.device("cpu"), torch.bfloat16, 1, 6, 4, 8, bias=True)
    assert fastest_product.fastest(form, x, weight, bias) is run
    grown = buffer(4, 8).requires_grad_()
    others = {
        "x is strided": (buffer(3, 2, 8).transpose(0, 1), weight, bias), "the weight is": (x, buffer(8, 4).t(), bias),
        "x lies between": (buffer(2, 3, 8, skip=8), weight, bias), "so does a bias": (x, weight, buffer(4, skip=1)),
        "another dtype": (x, buffer(4, 8, dtype=torch.float16), bias), "of a bias": (x, weight, buffer(4, dtype=torch.float32)),
        "another shape": (x, buffer(8, 4), bias), "a bias of another": (x, weight, buffer(1, 4)), "grad": (x, grown, bias),
    }  # fmt: skip
    for what, tensors in others.items():
        assert fastest_product.fastest(form, *tensors) is None, what
    with torch.no_grad():
        assert fastest_product.fastest(form, x, grown, bias) is run
    assert fastest_product.fastest(form._replace(gelu=True), x, weight, bias) is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_stream_is_added_to_by_an_algorithm(found, turned):
    x, stream = buffer(2, 3, 8), buffer(2, 3, 4, dtype=torch.float32)
    weight = buffer(2, 8, 4).mT if turned else buffer(2, 4, 8)
    form = added_form(weight, 2, 3, turned)
    run = found[form] = Told()
    assert form == ProductForm(x.device, x.dtype, 2, 3, 4, 8, turned=turned, adds=True)
    add_linear(stream, x, weight)
    assert run.calls == 1 and bool((stream == 7).all())
    for other in (buffer(2, 4, 3, dtype=torch.float32).transpose(1, 2), buffer(2, 3, 4, dtype=torch.float32, skip=4)):
        add_linear(other, x, weight)
        assert run.calls == 1 and not other.any(), "torch's product of zeros"
    with pytest.raises(RuntimeError):
        add_linear(buffer(2, 3, 4), x, weight)
    assert run.calls == 1


def test_what_is_not_worth_it_is_not_looked_for(found):
    form = ProductForm(torch.device("cuda", 0), torch.bfloat16, 2, fastest_product.LEAST_ROWS // 2, 64, 64)
    others = [{"device": torch.device("cpu")}, {"dtype": torch.float32}, {"rows": 100}]
    assert fastest_product.is_worth_it(form) and not any(fastest_product.is_worth_it(form._replace(**o)) for o in others)
    for other in others:
        fastest_product.look_for(form._replace(**other))
    assert not found


def test_the_library_is_asked_in_its_own_words(monkeypatch):
    """cublasLt.h: an algorithm is 8 words; its result has 96 bytes. Without the library nothing is proposed."""
    assert ctypes.sizeof(cublaslt.Proposal) == 96 and cublaslt.Proposal.workspace.offset == 64
    monkeypatch.setattr(torch.version, "cuda", None)
    cublaslt._library.cache_clear()
    assert cublaslt.MatrixProduct(ProductForm(torch.device("cpu"), torch.bfloat16, 1, 6, 4, 8)).proposals == []
    cublaslt._library.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("biased", "gelu"), [(True, False), (False, False), (True, True)])
def test_the_fastest_has_the_bits_of_torchs(found, dtype, biased, gelu):
    x, weight = numbers(2, 8192, 512, dtype=dtype, device="cuda"), numbers(768, 512, dtype=dtype, device="cuda") / 16
    bias = numbers(768, dtype=dtype, device="cuda") if biased else None
    want = linear(x, weight, bias, gelu)
    fastest_product.look_for(linear_form(x, weight, bias, gelu))
    one = fastest_product.fastest(linear_form(x, weight, bias, gelu), x, weight, bias)
    assert one is not None and torch.equal(linear(x, weight, bias, gelu), want)
    for proposal in one.product.proposals:
        y = torch.full_like(want, torch.nan)
        one.product(x, weight, bias, y, proposal)
        assert float((y - want).float().norm() / want.float().norm()) < 1e-3
    x, before = x.mul(2), want
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, weight, bias, gelu)
    x.div_(2)
    graph.replay()
    assert torch.equal(y, before)


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_are_added_on_a_gpu(found, dtype, turned):
    for job in GATED:
        check_gated_weight(*job, device="cuda")
    assert check_added(dtype, turned, device="cuda") < 1
    sizes = {"length": 6144, "inputs": 256, "outputs": 192}
    form = added_form(torch.empty(192, 256, dtype=dtype), 2, 6144, turned)._replace(device=torch.device("cuda", 0))
    plain = check_added(dtype, turned, **sizes, device="cuda:0")
    fastest_product.look_for(form)
    assert found[form] is not None and plain < 4 and check_added(dtype, turned, **sizes, device="cuda:0") < 4


def test_the_page_of_products():
    from lab.products import render

    ms = {"torch": [2.0, 2.2, 2.1], "added": [1.0, 1.1, 1.05]}
    raw = {
        "gpu": "G",
        "torch": "2",
        "cuda": "13.0",
        "date": "2026-11-29",
        "rows": [{"model": "m", "rows": 12800, "part": "down", "ms": ms}],
    }
    line = render(raw).splitlines()[-1]
    assert line.startswith("| m | 12,800 | down | 2.100 (2.040..2.160) | - | 1.050 (") and "| 2.00 (2.00..2.00) |" in line


class Refusing:
    """A library that cannot make what it proposes."""

    def __init__(self, form: ProductForm) -> None:
        self.form, self.proposals = form, [object(), object()]

    def __call__(self, *_: object) -> None:
        raise RuntimeError("cublasLtMatmul: got status 15")


def test_a_look_that_fails_leaves_torchs_product(found, monkeypatch):
    """The look is for speed alone: no room, or a library that refuses, fails no picture, now or later."""
    form = ProductForm(torch.device("cpu"), torch.bfloat16, 1, 6, 4, 8)
    monkeypatch.setattr(fastest_product, "is_worth_it", lambda form: True)
    monkeypatch.setattr(fastest_product, "MatrixProduct", Refusing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    fastest_product.look_for(form)
    assert found == {form: None} and not fastest_product.is_found(form)


def test_other_numbers_of_rows_are_not_read(found):
    x, weight, stream = buffer(2, 3, 8), buffer(2, 4, 8), buffer(2, 3, 4, dtype=torch.float32)
    form = added_form(weight, 2, 3)
    found[form] = Told()
    assert fastest_product.fastest(form, x, weight, None, stream) is not None
    assert fastest_product.fastest(form, buffer(1, 3, 8), weight, None, stream) is None
    assert fastest_product.fastest(form, x, buffer(1, 4, 8), None, stream) is None
