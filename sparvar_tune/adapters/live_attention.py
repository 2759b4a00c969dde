"""Sparse attention inside a live model: which call is which scale, when the model's own attention runs, and the way back.

The scale of a call is read off the cache: as many keys as are there, so many tokens came before. Where a call fits no scale of
the policy's schedule, or the image has another schedule, the model's own attention runs for the rest of the image, a warning
says why, and `reason` keeps it. Layers and scales that the policy leaves dense always run the model's own code.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune.adapters.attention_names import attention_names, forward_with
from sparvar_tune.adapters.instance_forward import Replaced, Undos, replace_method, why_not_replace
from sparvar_tune.adapters.protocol import Parts
from sparvar_tune.generation import SkipScales
from sparvar_tune.generation.halves import HalvesApart, another, decides_apart

# model -> the scale from which on only the conditional half runs; set by guidance.py
DROPPED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def why_not_fits(found: Parts, attend: SparseAttention) -> str | None:
    """Why this attention does not fit the model, or None. A schedule that comes with each call is looked at there."""
    reason = attend.policy.why_not(attend.schedule, found.layers, found.heads)
    if reason:
        return reason
    if attend.softmax_scale != found.softmax_scale:
        return f"softmax_scale is {found.softmax_scale:g}, the profile is for {attend.softmax_scale:g}"
    if attend.logit_bound is not None and (found.logit_bound is None or found.logit_bound > attend.logit_bound * (1 + 1e-6)):
        bound = "nothing bounds" if found.logit_bound is None else f"|logit| <= {found.logit_bound:g} bounds"
        return f"{bound} its logits, the profile needs |logit| <= {attend.logit_bound:g}"
    if found.schedule is not None:
        return other_schedule(found.schedule, attend.schedule)
    return None


def other_schedule(got: ScaleSchedule, want: ScaleSchedule) -> str | None:
    if got == want:
        return None
    if got.prefix != want.prefix:
        return f"{got.prefix} tokens come before the first grid, the profile is for {want.prefix}"
    words = [f"{len(s)} scales up to {s.aspect()}" for s in (got, want)]
    return f"the image has {words[0]}, the profile is for {words[1]}" + (" with other grids between" * (words[0] == words[1]))


class Inside:
    """Any attention as `attend(q, k, v, layer, scale_index)` from scale `until` on, in the place of a `SparseAttention`.

    attend: one, or something that wraps one as its `inner` (a stopwatch), or anything else that stands for `dense`. What is
    sparse comes here; what stands for dense attention gets every call.
    """

    def __init__(self, attend: Any, until: int, dense: SparseAttention) -> None:
        self.attend, self.target = attend, attend
        while not isinstance(self.target, SparseAttention):
            self.target = getattr(self.target, "inner", dense)
        self.policy = self.target.policy
        if attend.skip_scales != self.target.skip_scales:  # it has no policy of its own, and says so itself
            self.policy = replace(self.policy, steps=(SkipScales(attend.skip_scales),) if attend.skip_scales else ())
        every, scales = not self.target.policy.rules and attend is not self.target, range(len(self.target.schedule))
        self.sparse = [[s >= until and (every or _is_sparse(plans[s])) for s in scales] for plans in self.target.plans]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        out: Tensor = self.attend(q, k, v, layer, scale_index)
        return out


class LiveAttention(Undos):
    """Sparse attention in a live model. `reason`: why the last image ran dense (from some call on), None if it did not.

    images: how many were begun.
    about: what the reason is about, "schedule" or "batch".
    """

    def __init__(self, found: Parts, attend: SparseAttention) -> None:
        super().__init__()
        self.parts, self.attend = found, attend
        self.reason: str | None = None
        self.about = ""
        self.starts = {start: s for s, start in enumerate(attend.schedule.starts[:-1])}
        self.thinned = any(step.thins for step in attend.policy.steps)  # then caches are not the schedule's from some scale on
        self.sparse = attend.sparse if isinstance(attend, Inside) else [[_is_sparse(p) for p in plans] for plans in attend.plans]
        self.images = 0
        self._twin: SparseAttention | None = None  # serves the unconditional half where the halves decide apart
        self._serving: Any = attend  # or both of them
        self._rows, self._halved, self._scale = 0, False, 0
        self._said: set[str] = set()
        self._drawing = threading.Lock()

    # What happens in a call of layer `layer`

    def scale_of(self, layer: int, cached: int, x: Tensor, given: ScaleSchedule | str | None) -> int | None:
        """The scale of a call on x [B, N, C] with `cached` keys before it, or None when the model's own attention runs.

        given: the call's own schedule, or what is wrong with it.
        """
        rows, length = x.shape[:2]
        if layer == 0 and cached == 0:
            self._begin(rows, given)
        if self.reason is not None or (cached == 0 and length == self.attend.schedule.prefix):
            return None
        s = self.starts.get(cached)
        if s is None or length != self.attend.schedule.num_queries(s):
            if self.thinned:
                return None
            self._give_up(f"{length} tokens after {cached} are no scale of the profile's schedule")
            return None
        if not self.sparse[layer][s]:
            return None
        if rows not in ((self._rows, self._rows // 2) if self._halved else (self._rows,)) and self._takes(layer, s):
            self._give_up(f"scale {s} has {rows} batch rows, but its decision scale had {self._rows}", "batch")
            return None
        self._scale = s
        return s

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, Nq, D] by the policy at the scale that `scale_of` found."""
        out: Tensor = self._serving(q, k, v, layer, self._scale)
        return out

    def _begin(self, rows: int, given: ScaleSchedule | str | None) -> None:
        self.reset()
        self.images += 1
        self.reason, self._rows = None, rows
        reason = given if isinstance(given, str) else given and other_schedule(given, self.attend.schedule)
        if reason:
            self._give_up(reason)
        dropped = DROPPED.get(self.parts.model)
        self._halved, self._serving = dropped is not None and rows % 2 == 0, self.attend
        if self._halved and decides_apart(self.attend, dropped):
            self._twin = self._twin or another(self.attend)
            self._serving = HalvesApart(self.attend, self._twin, rows)

    def _takes(self, layer: int, s: int) -> bool:
        """Whether a scale takes something from a decision scale."""
        return any(variant.decision_scale is not None for variant, _ in self.attend.plans[layer][s].groups)

    def _give_up(self, reason: str, about: str = "schedule") -> None:
        self.reason, self.about = reason, about
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"the model's own attention runs for this image: {reason}", stacklevel=2)

    def _pausable(self) -> list[Replaced]:
        return [change for change in super()._pausable() if change.body != self.generate]  # one image at a time, always

    # An image

    def reset(self) -> None:
        """Forgets the image."""
        self.attend.reset()
        if self._twin is not None:
            self._twin.reset()

    def generate(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """One image at a time; after an exception the caches are closed, so that the next image is right."""
        if not self._drawing.acquire(blocking=False):
            raise RuntimeError("this model is drawing an image already; draw one at a time, or load it twice")
        try:
            return inner(*args, **kwargs)
        except BaseException:
            self.reset()
            close_caches(self.parts)
            raise
        finally:
            self._drawing.release()


def _is_sparse(plan: Any) -> bool:
    return bool(plan.records) or any(variant.reads != "everything" for variant, _ in plan.groups)


def close_caches(found: Parts) -> None:
    for attention in found.attentions:
        attention.kv_caching(False)


def attach(
    found: Parts, attend: SparseAttention, parameters: Sequence[str], bias: str, schedule: str | None = None,
    generate: str = "autoregressive_infer_cfg", without: Sequence[str] = (),
) -> LiveAttention:  # fmt: skip
    """Puts `attend` into every layer. Raises ValueError, and changes nothing, when it does not fit.

    parameters: of an attention's forward, in order. bias: that of a mask, None while images are drawn. schedule: that of the
    grids, if each call brings them. without: those set to None in a sparse call. generate: the method that draws an image.
    """
    reason = why_not_fits(found, attend)
    if reason:
        raise ValueError(f"this profile does not fit the model: {reason}")
    for i, module in enumerate(found.attentions):
        reason = why_not_replace(module)
        if reason:
            raise ValueError(f"the attention of block {i}: {reason}")
    live = LiveAttention(found, attend)
    for layer, module in enumerate(found.attentions):
        live.add(replace_method(module, "forward", _body(live, layer, module, tuple(parameters), bias, schedule, tuple(without))))
    live.add(replace_method(found.model, generate, live.generate))
    return live


def _body(
    live: LiveAttention, layer: int, module: Any, parameters: tuple[str, ...], bias: str, schedule: str | None,
    without: tuple[str, ...],
) -> Any:  # fmt: skip
    sparse_forward = forward_with(module, attention_names(lambda q, k, v: live.run(layer, q, k, v)))
    per_token = module.num_heads * module.head_dim

    def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if not module.caching or module.training or given.get(bias) is not None:
            return inner(*args, **kwargs)  # training, or a whole sequence at once: not an image being drawn
        x, k = given["x"], module.cached_k
        cached = 0 if k is None else k.numel() // (k.shape[0] * per_token)
        grids = schedule_of(given.get(schedule)) if schedule and layer == 0 and cached == 0 else None
        if live.scale_of(layer, cached, x, grids) is None:
            return inner(*args, **kwargs)
        return sparse_forward(**{**given, **dict.fromkeys(without)})

    return forward


def schedule_of(triples: Any) -> ScaleSchedule | str:
    """The schedule of [(1, h, w), ...], or what is wrong with it."""
    if not triples:
        return "the call brings no scale_schedule"
    if any(t != 1 for t, _, _ in triples):
        return "the call draws several frames; only pictures are known"
    return ScaleSchedule(tuple((int(h), int(w)) for _, h, w in triples))
