"""NVIDIA's cuBLASLt as PyTorch loaded it, by its C interface: a product by each of the algorithms that it proposes.

PyTorch takes the first, of a list that may need room beside the operands; here none does. Numbers of enumerations are those of
cublasLt.h, which NVIDIA keeps from version to version.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparvar_kernels.path.door import on_device

ALIGNMENT = 256  # bytes; what the library takes for granted of every address
PROPOSALS = 16
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
_FP32_SUMS = 68  # CUBLAS_COMPUTE_32F
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # cublasLtMatmulDescAttributes_t
_BATCH, _BATCH_STRIDE = 5, 6  # cublasLtMatrixLayoutAttribute_t
_EPILOGUES = {(False, False): 1, (True, False): 4, (False, True): 32, (True, True): 36}  # by (bias, GELU in its tanh form)


class ProductForm(NamedTuple):
    """y [batch, rows, outputs] of x [batch, rows, inputs] and weight [batch, outputs, inputs], all contiguous, with fp32 sums.

    turned: weight is [batch, inputs, outputs]. bias [outputs]. gelu: the tanh form of it, of the sums. adds: y is fp32 and what
    it holds is added to, else it has the operands' dtype.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    rows: int
    outputs: int
    inputs: int
    turned: bool = False
    bias: bool = False
    gelu: bool = False
    adds: bool = False


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("status", c_int), ("waves", c_float), ("reserved", c_int * 4),
    )  # fmt: skip


class MatrixProduct:
    """A product of one form. proposals: the library's, its best guess first, none of which takes room beside its operands;
    empty where it has none or is not there."""

    def __init__(self, form: ProductForm) -> None:
        self.form, self.proposals = form, list[Proposal]()
        if _library() is None:
            return
        self._lock = threading.Lock()  # a bias is told to the description before each call
        self._description = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self._description), _FP32_SUMS, _TYPES[torch.float32])
        self._describe(_TRANSPOSE_A, c_int32(not form.turned))
        self._describe(_EPILOGUE, c_int32(_EPILOGUES[form.bias, form.gelu]))
        # the library's matrices are column by column, so that ours are their transposes: y^T = weight x^T
        n, k = form.outputs, form.inputs
        self._weight = self._layout(form.dtype, *((n, k) if form.turned else (k, n)))
        self._x = self._layout(form.dtype, k, form.rows)
        self._y = self._layout(torch.float32 if form.adds else form.dtype, n, form.rows)
        self.proposals = self._proposed()

    def _describe(self, attribute: int, value: c_int32 | c_uint64) -> None:
        _call("cublasLtMatmulDescSetAttribute", self._description, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def _layout(self, dtype: torch.dtype, high: int, wide: int) -> c_void_p:
        layout = c_void_p()
        _call("cublasLtMatrixLayoutCreate", byref(layout), _TYPES[dtype], c_uint64(high), c_uint64(wide), c_int64(high))
        for attribute, value in ((_BATCH, c_int32(self.form.batch)), (_BATCH_STRIDE, c_int64(high * wide))):
            _call("cublasLtMatrixLayoutSetAttribute", layout, attribute, byref(value), c_size_t(ctypes.sizeof(value)))
        return layout

    def _proposed(self) -> list[Proposal]:
        preference, many = c_void_p(), c_int()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))  # no workspace unless one is allowed
        found = (Proposal * PROPOSALS)()
        status = _library().cublasLtMatmulAlgoGetHeuristic(  # type: ignore[union-attr]
            _handle(self.form.device), self._description, self._weight, self._x, self._y, self._y, preference, PROPOSALS, found,
            byref(many),
        )  # fmt: skip
        _call("cublasLtMatmulPreferenceDestroy", preference)
        return [] if status else [one for one in found[: many.value] if one.status == 0 and one.workspace == 0]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, proposal: Proposal) -> None:
        """Into y, on the current stream of its device. Raises RuntimeError where the library refuses."""
        on_device(self.form.device, self._launch, x, weight, bias, y, proposal)

    def _launch(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, proposal: Proposal) -> None:
        a, b, c = (c_void_p(t.data_ptr()) for t in (weight, x, y))
        stream = c_void_p(torch.cuda.current_stream(self.form.device).cuda_stream)
        with self._lock:
            if bias is not None:
                self._describe(_BIAS_POINTER, c_uint64(bias.data_ptr()))
            _call(
                "cublasLtMatmul", _handle(self.form.device), self._description,
                byref(c_float(1.0)), a, self._weight, b, self._x, byref(c_float(self.form.adds)), c, self._y, c, self._y,
                byref(proposal.algorithm), c_void_p(), c_size_t(0), stream,
            )  # fmt: skip


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The library of the CUDA that PyTorch was built with, or None."""
    cuda = torch.version.cuda
    if cuda is None:
        return None
    major = cuda.partition(".")[0]
    for name in (f"libcublasLt.so.{major}", f"cublasLt64_{major}.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@lru_cache(maxsize=64)
def _handle(device: torch.device) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", byref(handle))
    return handle


def _call(name: str, *arguments: object) -> None:
    """Raises RuntimeError for any status but success."""
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name}: got status {status}")
