"""The entry point: one object that runs a policy over the scales of an image.

    attend = SparseAttention(policy, schedule)
    out = attend(q, k, v, layer=17, scale_index=12)      # q [B, H, Nq, D], k, v [B, H, Nk, D] -> [B, H, Nq, D]

One call may run some heads dense, others as CSLA, CS4A, pooled or reused. What a decision scale leaves behind (ranked keys,
residuals) is kept per layer and forgotten when scale 0 comes round again, so one object serves one image stream.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.backends.configs import LaunchConfig
from sparvar_kernels.backends.dense import out_like
from sparvar_kernels.backends.layer import Layer
from sparvar_kernels.backends.registry import KERNELS, default_config, kernel_for, why_not
from sparvar_kernels.geometry.problem import DTYPES, AttentionProblem, no_tensor
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy, plan_layers

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Launch:
    """How a scale is run: a kernel of the registry and its configuration (None: `default_config`)."""

    kernel: str
    config: LaunchConfig | None = None


class InOneModel:
    """What a model holds while something is put on it. Nobody could take it out of a copy, so there is none."""

    def __deepcopy__(self, memo: object) -> Any:
        raise ValueError(f"{type(self).__name__}: cannot be copied; undo it before copying the model that it is on")

    def __reduce__(self) -> Any:
        raise ValueError(f"{type(self).__name__}: cannot be saved; undo it before saving the model that it is on")


class SparseAttention(InOneModel):
    """Callable attention for one image stream; see the module docstring.

    launches: per scale_index, how it is run; others take the device's default kernel.
    Raises ValueError when the policy does not fit the schedule, when a launch is illegal for a problem, when inputs do
    not have the shapes of the schedule, when they require grad, when a scale is called before its decision scale, or when
    that was run twice for the image: one object serves one pass. Both halves of guidance go into one batch.

    On a GPU nothing waits for the device once every (layer, scale) was called once, so an image can be captured in a CUDA
    graph; under torch.compile a call is one opaque operator.
    """

    def __init__(
        self, policy: Policy, schedule: ScaleSchedule, *, softmax_scale: float = 1.0, logit_bound: float | None = None,
        launches: Mapping[int, Launch] | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.schedule = policy, schedule
        self.softmax_scale, self.logit_bound = softmax_scale, logit_bound
        for name, got, want in (("policy", policy, Policy), ("schedule", schedule, ScaleSchedule)):
            if not isinstance(got, want):
                raise ValueError(f"{name}: got a {type(got).__name__}, want a {want.__name__}")
        try:
            self.plans = plan_layers(policy, schedule)
        except (TypeError, AttributeError) as error:  # a list somewhere inside; plans are kept by the policy's value
            raise ValueError(f"policy: {error}; want tuples of values as Policy and its variants say") from None
        self.launches = dict(launches or {})
        self._ready: dict[tuple[object, ...], Any] = {}  # the layer that runs a kind of input
        self._layers: dict[tuple[object, ...], list[Layer]] = {}
        self.handle = next(_HANDLES)
        _LIVE[self.handle] = self

    @property
    def skip_scales(self) -> tuple[int, ...]:
        """Trailing scales the policy leaves out of the generation."""
        return self.policy.skip_scales

    def reset(self) -> None:
        """Forgets the image; called by itself when scale 0 comes."""
        for layers in self._layers.values():
            for layer in layers:
                layer.reset()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        try:
            if (type(layer) is not int or type(scale_index) is not int) and (  # 0.0 and False would be found below as 0 is
                reason := self._why_not_call(q, k, v, layer, scale_index)
            ):
                raise ValueError(reason)
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                raise ValueError("q, k, v: got inputs that require grad, want none: the kernels have no backward pass; "
                                 "call under torch.no_grad() or torch.inference_mode()")  # fmt: skip
            if torch.compiler.is_compiling():
                return torch.ops.sparvar_kernels.attend(q, k, v, self.handle, layer, scale_index)
            if torch.is_autocast_enabled(q.device.type):  # it would cast what kernels write to
                with torch.autocast(q.device.type, enabled=False):
                    return self(q, k, v, layer, scale_index)
            if scale_index == 0 and layer == 0:
                self.reset()
            if q.is_neg() or k.is_neg() or v.is_neg():  # a kernel reads memory, where the sign is not
                q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
            form = (layer, scale_index, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
            ready = self._ready.get(form)
            if ready is None:
                ready = self._ready[form] = self._prepare(q, k, v, layer, scale_index)
                with torch.device("cpu"):  # what a first call plans is the host's, whatever the caller's default device
                    first: Tensor = ready(q, k, v, scale_index)
                return first
            return ready(q, k, v, scale_index)
        except (AttributeError, TypeError, RuntimeError):  # what is no tensor at all costs the others nothing
            reason = self._why_not_call(q, k, v, layer, scale_index)
            if reason is None:
                raise
            raise ValueError(reason) from None

    def _why_not_call(self, q: object, k: object, v: object, layer: object, scale_index: object) -> str | None:
        """Why these are no plain tensors and no indices of this policy, or None."""
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, Tensor):
                return no_tensor(name, t)
            if t.layout != torch.strided or t.is_nested or t.device.type not in ("cpu", "cuda"):
                kind = "nested" if t.is_nested else str(t.layout)
                return f"{name}: got a {kind} tensor on {t.device}, want a plain one on a CPU or a CUDA GPU"
        for name, i, count in (("layer", layer, len(self.plans)), ("scale_index", scale_index, len(self.schedule))):
            if not isinstance(i, Integral) or isinstance(i, bool) or not 0 <= int(i) < count:
                return f"{name}={repr(i)[:40]}: want 0..{count - 1}, a whole number"
        return None

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Any:
        """Checks one kind of input and builds what runs it."""
        reason = self._why_not_call(q, k, v, layer, scale_index)
        if reason:
            raise ValueError(reason)
        if q.dtype not in _NAMES:
            raise ValueError(f"q: got {q.dtype}, want one of {', '.join(map(str, _NAMES))}")
        if q.ndim != 4:
            raise ValueError(f"q: got {tuple(q.shape)}, want four axes [B, H, N, D]")
        problems = [
            AttentionProblem(
                self.schedule, s, q.shape[0], q.shape[1], q.shape[-1], _NAMES[q.dtype], self.softmax_scale, self.logit_bound
            )
            for s in range(len(self.schedule))
        ]
        problem = problems[scale_index]
        problem.check_inputs(q, k, v)
        if k.device != q.device or v.device != q.device:
            raise ValueError(f"k, v: got {k.device}, {v.device}, want {q.device} like q")
        if problem.heads != len(self.policy.heads[layer]):
            raise ValueError(f"q: got {problem.heads} heads, want {len(self.policy.heads[layer])} as in the policy")
        kind = (q.shape[0], q.shape[1], q.shape[-1], q.dtype, q.device)
        if kind not in self._layers:
            self._layers[kind] = self._build(problems, q.device)
        ready = self._layers[kind][layer]
        return _OnDevice(ready, q.device) if q.is_cuda and torch.cuda.device_count() > 1 else ready

    def _build(self, problems: list[AttentionProblem], device: torch.device) -> list[Layer]:
        launches = [self.launches.get(s) for s in range(len(self.schedule))]
        named = {launch.kernel for launch in launches if launch is not None}
        if len(named) > 1:
            raise ValueError(f"launches: kernels {', '.join(sorted(named))} for one image; want one kernel for all scales")
        kernel = named.pop() if named else kernel_for(device.type)
        if kernel not in KERNELS:
            raise ValueError(f"launches: kernel {kernel!r}: want one of {', '.join(KERNELS)}")
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        configs = [
            launch.config if launch and launch.config is not None else default_config(problem, kernel, capability)
            for problem, launch in zip(problems, launches, strict=True)
        ]
        for problem, config in zip(problems, configs, strict=True):
            reason = why_not(problem, kernel, config, capability)
            if reason:
                raise ValueError(f"scale {problem.scale_index}: {reason}")
        make = KERNELS[kernel].load().Layer
        return [make(plans, problems, configs, str(device)) for plans in self.plans]


class _OnDevice:
    """A layer of a machine with several GPUs: whatever device is current, its kernels run on that of its inputs."""

    def __init__(self, layer: Any, device: torch.device) -> None:
        self.layer, self.device = layer, device

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale_index: int) -> Tensor:
        with torch.cuda.device(self.device):
            out: Tensor = self.layer(q, k, v, scale_index)
        return out


# torch.compile sees a call as this operator; the object behind the handle keeps what decision scales found, which is why
# calls must stay in the order of the model, as data flow between its layers makes them.
_HANDLES = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, SparseAttention] = weakref.WeakValueDictionary()


@torch.library.custom_op("sparvar_kernels::attend", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def _attend(q: Tensor, k: Tensor, v: Tensor, handle: int, layer: int, scale_index: int) -> Tensor:
    if handle not in _LIVE:
        raise ValueError("the SparseAttention this graph was compiled with is gone; keep it alive, or compile again")
    out, laid_out = _LIVE[handle](q, k, v, layer, scale_index), out_like(q)
    # what the compiler was promised; a dense pass may lay its output out otherwise
    return out if out.stride() == laid_out.stride() else laid_out.copy_(out)


@_attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, handle: int, layer: int, scale_index: int) -> Tensor:
    return out_like(q)
