"""An adapter of a live model that somebody else built, from nothing but `generate(prompt, seed) -> picture`.

    adapter = LiveModel(model, generate, ["a red cube", "a lake at dawn"])
    sparvar_tune.tune(model, generate=..., prompts=...)         # makes one

The model is of a family `apply` knows (Infinity, HART, VAR), and its pictures are drawn on the path that `apply` takes. That is
the fused path on a GPU: dense and tuned alike, so that a ratio of their times is sparsity's alone, and kept on the model until
`close`, as graphs are captured once. Elsewhere, and for attention that somebody watches, hooks go in and out with every picture,
and a dense picture is the untouched model's. Whole images are drawn, as nobody but `generate` knows how to stop one: up to the
scale where a policy begins the model's own attention runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.geometry.problem import DTYPES
from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_kernels.policy import Policy
from sparvar_tune import fused
from sparvar_tune.adapters import steps
from sparvar_tune.adapters.instance_forward import Replaced, replace_method
from sparvar_tune.adapters.live_attention import Inside, schedule_of
from sparvar_tune.adapters.opening import call
from sparvar_tune.adapters.protocol import Pair, Parts
from sparvar_tune.adapters.registry import recognise
from sparvar_tune.adapters.whole_images import WholeImages, as_picture, begin_image
from sparvar_tune.catalog import models
from sparvar_tune.catalog.models import Model, own_model
from sparvar_tune.measure.fidelity import compare_pictures

Generate = Callable[[Any, int], Any]  # (one of the prompts, seed) -> a picture, as `as_picture` takes it
SAME_DB = 30.0  # two pictures of one (prompt, seed) are at least so close on a device whose sums have no fixed order
FIRST: Pair = (0, 1)
SAMPLE = 3  # pictures that say how far our dense path is from the untouched model


class LiveModel(WholeImages):
    """See the module docstring.

    generate: draws one picture from the prompt and the seed alone, with `model`. prompts: what it may be given, each another
    class. row: the model's row, where its name is known; None: that of the table whose shapes and sizes these are, else one of
    its own. name: of that one. path: as `apply` takes it. Draws two to four pictures. Raises ValueError, in one line: a model no
    family knows, a `generate` that draws without it or differently each time, a picture of no known kind, a path="fused" that
    is not legal.

    why_not_fused: why its pictures are not drawn on the fused path, or None.
    """

    def __init__(
        self, model: Any, generate: Generate, prompts: Sequence[Any], *, name: str | None = None, row: Model | None = None,
        temperature: float = 1.0, path: str = "auto",
    ) -> None:  # fmt: skip
        if not callable(generate):
            raise ValueError(f"generate: got a {type(generate).__name__}, want a function generate(prompt, seed) -> picture")
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
            raise ValueError("prompts: want a list of at least one, each what generate(prompt, seed) takes")
        self.family, self.parts = recognise(model)
        if any(isinstance(vars(m).get("forward"), Replaced) for m in (*self.parts.blocks, *self.parts.attentions)):
            raise ValueError("model: something of ours is on it, applied or of another LiveModel; undo that first, or close it")
        self.generate, self.prompts = generate, tuple(prompts)
        self.steps = tuple(getattr(self.family, "STEPS", ()))
        self._fused: fused.FusedPath | None = None
        self.why_not_fused: str | None = None
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
        self._yardsticks: tuple[tuple[str, float, float], ...] | None = None
        self._put_on(path)

    def close(self) -> None:
        """Takes out of the model what its pictures were drawn on; they are then drawn on the attention path."""
        if self._fused is not None:
            self._fused.undo()
        self._fused, self.picture_path, self.why_not_fused = None, "", "this adapter is closed"

    def __enter__(self) -> LiveModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def untouched(self, pair: Pair) -> Tensor:
        """The picture the model draws with nothing of ours in it."""
        with self._off():
            return self._drawn(pair)

    def finish(self, state: Any, attend: Any, redraw_from: int | None = None) -> Tensor:
        pair, until = state
        if redraw_from is not None:
            raise ValueError(f"{self.model.slug}: it draws whole images, whose noise cannot be drawn anew in between")
        if self._runs_fused(attend, until):
            return self._on_fused(pair, attend)
        if attend is self.dense:
            return self.untouched(pair)
        begin_image(attend)
        with self._off():
            return self._inside(pair, Inside(attend, until, self.dense))

    def prepare(self, attend: Any) -> bool:
        if not self._runs_fused(attend, 0):
            return False
        assert self._fused is not None
        self._fused.serve(None if attend is self.dense else attend)
        with self._steps(attend):
            missing = self._fused.images_to_warm
        for _ in range(missing):
            self._on_fused(FIRST, attend)
        return True

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        """How far the dense pictures of the fused path are from the untouched model's, which sum in another order."""
        if self._fused is not None and self._yardsticks is None:
            pairs = [(label % self.num_classes, 1) for label in range(SAMPLE)]
            found = [compare_pictures(self._on_fused(pair, self.dense), self.untouched(pair)) for pair in pairs]
            psnr, ssim = (fmean(f[name] for f in found) for name in ("psnr", "ssim"))
            self._yardsticks = (("dense on the fused path, against the untouched model", psnr, ssim),)
        return self._yardsticks or ()

    # On the fused path

    def _put_on(self, path: str) -> None:
        """The fused path, where `apply` would take it and this model's images run on it."""
        made = fused.put_on(self.family, self.parts, None, path)
        self.why_not_fused = made.why_not_fused
        if made.fused is None:
            return
        assert isinstance(made.fused, fused.FusedPath), "models in the box, which have adapters of their own, were refused before"
        self._fused, self.picture_path = made.fused, "fused path" + (", CUDA graphs" if self.parts.on_gpu else "")
        try:
            self._on_fused(FIRST, self.dense)
        except ValueError as error:
            self.close()
            self.why_not_fused = str(error)
            if path == "fused":
                raise

    def _runs_fused(self, attend: Any, until: int) -> bool:
        """Whether a picture, by `attend` from scale `until` on, is drawn on the fused path."""
        if self._fused is None or not isinstance(attend, SparseAttention) or self._fused.why_not_serve(attend):
            return False
        rules, decided = attend.policy.rules, (rule.variant.decision_scale for rule in attend.policy.rules)
        begins = [r.scale_index for r in rules] + [s for s in decided if s is not None]
        begins += [step.from_scale for step in attend.policy.steps]
        return until <= min(begins, default=until)

    def _on_fused(self, pair: Pair, attend: SparseAttention) -> Tensor:
        assert self._fused is not None
        before = self._fused.images
        self._fused.serve(None if attend is self.dense else attend)
        with self._steps(attend):
            picture = self._drawn(pair)
        if self._fused.reason:
            raise ValueError(f"generate: {self._fused.reason}")
        self._require_one(self._fused.images - before)
        return picture

    @contextmanager
    def _steps(self, attend: SparseAttention) -> Iterator[None]:
        """The generation steps of a policy around the fused path, as `apply` puts them; it does the others itself."""
        with steps.put_on(self.family, self.parts, attend, [False]):
            yield

    @contextmanager
    def _off(self) -> Iterator[None]:
        """While it lasts the model draws as if the fused path were not on it."""
        was = self._fused is not None and self._fused.enabled
        if self._fused is not None:
            self._fused.enabled = False
        try:
            yield
        finally:
            if self._fused is not None:
                self._fused.enabled = was

    # By hooks around every picture

    def _drawn(self, pair: Pair) -> Tensor:
        label, seed = pair
        with torch.no_grad():
            return as_picture(self.generate(self.prompts[label], seed))

    def _require_one(self, images: int) -> None:
        if images != 1:
            raise ValueError(f"generate: it ran this model for {images} images, want one each time it is called")

    def _inside(self, pair: Pair, attend: Inside) -> Tensor:
        """The picture with `attend` in the model. Raises ValueError where it was not used from begin to end of one image."""
        hooks: Any = steps.attach(self.family, self.parts, attend)  # type: ignore[arg-type]
        try:
            picture = self._drawn(pair)
        finally:
            hooks.undo()
        live = getattr(hooks, "live", hooks)
        reason, images = getattr(live, "reason", None), getattr(live, "images", 1)  # families of other packages may not say
        if reason:
            raise ValueError(f"generate: {reason}")
        self._require_one(images)
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
