"""An adapter of a live model that somebody else built, from nothing but `generate(prompt, seed) -> picture`.

    adapter = LiveModel(model, generate, ["a red cube", "a lake at dawn"])
    sparvar_tune.tune(model, generate=..., prompts=...)         # makes one

The model is of a family `apply` knows (Infinity, HART, VAR); attention goes in by the same hooks and out again after every
picture. The untouched model is the baseline: a dense picture has no hook of ours in it. Whole images are drawn, as nobody but
`generate` knows how to stop one: up to the scale where a policy begins the model's own attention runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.problem import DTYPES
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters.instance_forward import replace_method
from sparvar_tune.adapters.live_attention import Inside, schedule_of
from sparvar_tune.adapters.opening import call
from sparvar_tune.adapters.protocol import Pair, Parts
from sparvar_tune.adapters.registry import recognise
from sparvar_tune.adapters.steps import attach
from sparvar_tune.adapters.whole_images import WholeImages, as_picture, begin_image
from sparvar_tune.catalog import models
from sparvar_tune.catalog.models import Model, own_model
from sparvar_tune.measure.fidelity import compare_pictures

Generate = Callable[[Any, int], Any]  # (one of the prompts, seed) -> a picture, as `as_picture` takes it
SAME_DB = 30.0  # two pictures of one (prompt, seed) are at least so close on a device whose sums have no fixed order
FIRST: Pair = (0, 1)


class LiveModel(WholeImages):
    """See the module docstring.

    generate: draws one picture from the prompt and the seed alone, with `model`. prompts: what it may be given, each another
    class. row: the model's row, where its name is known; None: that of the table whose shapes and sizes these are, else one of
    its own. name: of that one. Draws two to three pictures. Raises ValueError, in one line: a model no family knows, a
    `generate` that draws without it or differently each time, a picture of no known kind.
    """

    def __init__(
        self, model: Any, generate: Generate, prompts: Sequence[Any], *, name: str | None = None, row: Model | None = None,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        if not callable(generate):
            raise ValueError(f"generate: got a {type(generate).__name__}, want a function generate(prompt, seed) -> picture")
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
            raise ValueError("prompts: want a list of at least one, each what generate(prompt, seed) takes")
        self.family, self.parts = recognise(model)
        self.generate, self.prompts = generate, tuple(prompts)
        self.steps = tuple(getattr(self.family, "STEPS", ()))
        own, schedule = self._watched()
        dense = SparseAttention(
            Policy(("A" * self.parts.heads,) * self.parts.layers, ()), schedule, softmax_scale=self.parts.softmax_scale,
            logit_bound=self.parts.logit_bound,
        )  # fmt: skip
        seen = _Shapes(dense)
        ours = self._inside(FIRST, Inside(seen, 0, dense))
        assert seen.rows is not None and seen.dtype is not None  # what was called for the image is known by now
        self._compare(own, ours)
        found = row or _row(self.parts, schedule, seen.rows, seen.dtype, name)
        reason = _why_not(found, self.parts, schedule, seen.rows, seen.dtype)
        if reason:
            raise ValueError(f"model {found.slug}: {reason}")
        super().__init__(
            found, device=_device(self.parts.model), classes=[str(p) for p in self.prompts], weights=self.parts.model,
            temperature=temperature,
        )  # fmt: skip
        self.schedule = schedule
        self.dense = SparseAttention(dense.policy, schedule, softmax_scale=self.softmax_scale, logit_bound=self.logit_bound)

    def untouched(self, pair: Pair) -> Tensor:
        """The picture the model draws with nothing of ours in it."""
        label, seed = pair
        with torch.no_grad():
            return as_picture(self.generate(self.prompts[label], seed))

    def finish(self, state: Any, attend: Any, redraw_from: int | None = None) -> Tensor:
        pair, until = state
        if redraw_from is not None:
            raise ValueError(f"{self.model.slug}: it draws whole images, whose noise cannot be drawn anew in between")
        if attend is self.dense:
            return self.untouched(pair)
        begin_image(attend)
        return self._inside(pair, Inside(attend, until, self.dense))

    def _inside(self, pair: Pair, attend: Inside) -> Tensor:
        """The picture with `attend` in the model. Raises ValueError where it was not used from begin to end of one image."""
        hooks: Any = attach(self.family, self.parts, attend)  # type: ignore[arg-type]
        try:
            picture = self.untouched(pair)
        finally:
            hooks.undo()
        live = getattr(hooks, "live", hooks)
        reason, images = getattr(live, "reason", None), getattr(live, "images", 1)  # families of other packages may not say
        if reason:
            raise ValueError(f"generate: {reason}")
        if images != 1:
            raise ValueError(f"generate: it ran this model for {images} images, want one each time it is called")
        return picture

    def _watched(self) -> tuple[Tensor, ScaleSchedule]:
        """An untouched picture, and the schedule it was drawn by."""
        found: list[Any] = []
        first = self.parts.attentions[0]
        own = type(first).forward

        def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
            if not found:
                given = inspect.signature(own).bind(first, *args, **kwargs).arguments
                found.append(self.parts.schedule or schedule_of(given.get("scale_schedule")))
            return inner(*args, **kwargs)

        spy = replace_method(first, "forward", forward)
        try:
            picture = call("generate", lambda: self.untouched(FIRST))
        finally:
            spy.undo()
        if not found:
            raise ValueError("generate: it drew a picture without this model; give the model it draws with")
        if isinstance(found[0], str):
            raise ValueError(f"generate: {found[0]}")
        return picture, found[0]

    def _compare(self, own: Tensor, ours: Tensor) -> None:
        """Raises ValueError where the same pair drew another picture and that is not for our hooks' sake."""
        if torch.equal(own, ours):
            return
        again = self.untouched(FIRST)
        if own.shape == again.shape == ours.shape:
            psnr = compare_pictures(again, own)["psnr"]
            if psnr >= SAME_DB:
                return
        else:
            psnr = 0.0
        raise ValueError(f"generate: drawn twice, prompt 0 with seed {FIRST[1]} gives two pictures (PSNR {psnr:.1f} dB); seed "
                         "every generator it uses from its seed")  # fmt: skip


class _Shapes:
    """Dense attention that keeps how its inputs look."""

    def __init__(self, inner: SparseAttention) -> None:
        self.inner, self.skip_scales = inner, inner.skip_scales
        self.rows: int | None = None
        self.dtype: str | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        self.rows, self.dtype = q.shape[0], next(name for name, dtype in DTYPES.items() if dtype == q.dtype)
        return self.inner(q, k, v, layer, scale_index)


def _row(found: Parts, schedule: ScaleSchedule, rows: int, dtype: str, name: str | None) -> Model:
    """The table's row of such a model at such a size; otherwise a row of its own."""
    for known in models.MODELS.values() if name is None else ():
        if _why_not(known, found, schedule, rows, dtype) is None:
            return known
    name = name or f"{found.family}-{found.layers}x{found.heads}x{found.head_dim}-{dtype}-{rows}"
    return own_model(
        name, schedule, layers=found.layers, heads=found.heads, head_dim=found.head_dim, dtype=dtype,
        softmax_scale=found.softmax_scale, logit_bound=found.logit_bound, guidance_batch=rows, family=found.family,
    )  # fmt: skip


def _why_not(row: Model, found: Parts, schedule: ScaleSchedule, rows: int, dtype: str) -> str | None:
    """Why a live model is not what a row says, or None."""
    pairs = (
        ("family", found.family, row.family), ("layers", found.layers, row.layers), ("heads", found.heads, row.heads),
        ("head_dim", found.head_dim, row.head_dim), ("softmax_scale", found.softmax_scale, row.softmax_scale),
        ("dtype", dtype, row.dtype), ("guidance rows", rows, row.guidance_batch),
    )  # fmt: skip
    for name, got, want in pairs:
        if got != want:
            return f"{name} of this one is {got}, want {want}"
    if not any(schedule == s for aspects in row.resolutions.values() for s in aspects.values()):
        return f"this one draws {len(schedule)} scales up to {schedule.aspect()}, none of its sizes"
    if row.logit_bound is not None and (found.logit_bound is None or found.logit_bound > row.logit_bound * (1 + 1e-6)):
        return f"the logits of this one reach {found.logit_bound or 'any value'}, want at most {row.logit_bound:g}"
    return None


def _device(model: Any) -> str:
    return str(next(model.parameters()).device)
