"""A profile made ready for this machine: what runs, why, and one call at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.backends.dense import dense_attention
from sparvar_kernels.backends.registry import KERNELS
from sparvar_kernels.geometry.problem import DTYPES, AttentionProblem
from sparvar_kernels.policy import Policy
from sparvar_tune import adapters, fused
from sparvar_tune.adapters import Undoable
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.inputs import yes_or_no
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.catalog.names import shown
from sparvar_tune.generation import Precision
from sparvar_tune.generation.scaled_product import precision_of, why_no_gain
from sparvar_tune.profile import identity
from sparvar_tune.profile.overlay import DEMOTED, Overlay
from sparvar_tune.profile.schema import Profile, Row
from sparvar_tune.runtime.explain import explained, explained_scale


@dataclass
class Tuned:
    """A profile made ready for this machine, or the reason there is none (then everything is dense).

    reasons: how the profile was found and what differs here. demoted: scale -> why it runs dense all the same.
    sha256: of the profile file's bytes. overlay: what verify found here for exactly that file, if it did.
    One object serves one image stream; it keeps what decision scales left for later ones.
    """

    gpu: Gpu
    profile: Profile | None
    path: Path | None
    reasons: tuple[str, ...]
    demoted: dict[int, str] = field(default_factory=dict)
    sha256: str | None = None
    overlay: Overlay | None = None
    _attends: dict[float | None, SparseAttention] = field(default_factory=dict)  # by the bound of their logits

    def policy(self) -> Policy | None:
        """The policy as it will run: demoted scales have lost their rules, a demoted profile every step of the generation.

        `generation.drop_from` and `generation.skip_from` read its steps.
        """
        if self.profile is None:
            return None
        full = self.profile.policy
        if self.overlay is not None and self.overlay.verdict == DEMOTED:
            return Policy(full.heads, ())
        gone = self.refused_steps()
        return replace(
            full, rules=tuple(r for r in full.rules if r.scale_index not in self.demoted),
            steps=tuple(step for step in full.steps if step.kind not in gone),
        )  # fmt: skip

    def refused_steps(self) -> dict[str, str]:
        """Kind of step -> why the generation goes without it: what it means today, or that here it would only cost time."""
        if self.profile is None:
            return {}
        found = identity.refused_steps(self.profile)
        step = precision_of(self.profile.policy)
        slow = step and why_no_gain(step.fmt, None if self.gpu.device == "cpu" else self.gpu.capability)
        if slow:
            found.setdefault(Precision.kind, slow)
        return found

    def sparse_attention(self, logit_bound: float | None = 0.0) -> SparseAttention:
        """A fresh attention object for one image stream. Raises ValueError when there is no usable profile.

        logit_bound: of the logits that will come, None if nothing bounds them; the profile's where that is larger.
        """
        if logit_bound is not None and not (isinstance(logit_bound, float | int) and logit_bound >= 0):
            raise ValueError(f"logit_bound: got {shown(repr(logit_bound), 40)}, want a number >= 0, or None for no bound")
        policy = self.policy()
        if self.profile is None or policy is None:
            raise ValueError(f"no profile to apply: {'; '.join(self.reasons)}")
        w = self.profile.workload
        return SparseAttention(
            policy, w.schedule, softmax_scale=w.softmax_scale, logit_bound=_larger(w.logit_bound, logit_bound),
            launches={row.scale_index: launch_of(row) for row in self.profile.rows},
        )  # fmt: skip

    def compile(self, device: torch.device | str = "cuda") -> None:
        """Begins to compile what the profile's attention launches on a GPU, in the background, and returns at once.

        Called before a model's weights are loaded, while cores have little to do; its first picture then need not wait 3 to 5 s
        for it. What is still missing `apply` and the first picture make. Nothing is done on a CPU, nor without a profile.
        Raises ValueError for what is no device.
        """
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device: got {shown(repr(device), 40)}, want a GPU's name such as 'cuda:0'") from error
        if self.profile is None or place.type != "cuda" or self.gpu.device != "cuda" or not torch.cuda.is_available():
            return
        place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
        fused.read_triton()
        attend, w = self.sparse_attention(), self.profile.workload
        fused.Foreseen(attend, attend, w.heads, w.head_dim, DTYPES[w.dtype], place)

    def attention(self, problem: AttentionProblem) -> Callable[..., Tensor]:
        """`attend(q, k, v, layer=...)` for this problem; dense when the profile is not for its shape.

        Raises ValueError for what is no AttentionProblem.
        """
        _require_problem(problem)
        if self.profile is None or self._why_not(problem):
            return _Dense(problem)
        bound = _larger(self.profile.workload.logit_bound, problem.logit_bound)
        if bound not in self._attends:
            self._attends[bound] = self.sparse_attention(bound)
        attend = self._attends[bound]
        return lambda q, k, v, layer: attend(q, k, v, layer, problem.scale_index)

    def _why_not(self, problem: AttentionProblem) -> str | None:
        assert self.profile is not None
        w = self.profile.workload
        pairs = (
            ("schedule", problem.schedule, w.schedule), ("heads", problem.heads, w.heads),
            ("head_dim", problem.head_dim, w.head_dim), ("dtype", problem.dtype, w.dtype),
            ("softmax_scale", problem.softmax_scale, w.softmax_scale),
        )  # fmt: skip
        for name, got, want in pairs:
            if got != want:
                return f"dense: {name} is {got}, the profile is for {want}"
        return None

    def explain(self, problem: AttentionProblem | None = None) -> str:
        """What runs here and why, in a few lines; for one problem if given."""
        found = explained(self)
        if self.profile is None or problem is None:
            return found.words
        _require_problem(problem)
        lines = [*found.found, self._why_not(problem) or explained_scale(self, problem.scale_index).words]
        w = self.profile.workload
        if problem.batch != w.batch:
            lines.append(f"batch is {problem.batch}, tuned for {w.batch}: its gain was not measured")
        if _larger(w.logit_bound, problem.logit_bound) != w.logit_bound:
            lines.append(f"logit bound is {problem.logit_bound}, tuned for {w.logit_bound}: its gain was not measured")
        return "\n".join(lines)


def _require_problem(got: object) -> None:
    if not isinstance(got, AttentionProblem):
        raise ValueError(f"problem: got a {type(got).__name__}, want a sparvar_kernels.AttentionProblem")


class _Dense:
    """`attend(q, k, v, layer=...)` by PyTorch's dense attention, whose CPU kernel reads past a v that is shorter than k."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem, self.checked = problem, set[tuple[object, ...]]()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        form = tuple((getattr(t, "shape", None), getattr(t, "dtype", None)) for t in (q, k, v))
        if form not in self.checked:
            batch = q.shape[0] if isinstance(q, Tensor) and q.ndim and len(q) else self.problem.batch  # any batch, as sparse
            replace(self.problem, batch=batch).check_inputs(q, k, v)
            self.checked.add(form)
        return dense_attention(q, k, v, self.problem)


def launch_of(row: Row) -> Launch:
    """The row's kernel and configuration as the kernels take it."""
    return Launch(row.kernel, KERNELS[row.kernel].config.from_row(row.config))


def _larger(a: float | None, b: float | None) -> float | None:
    """Of two bounds the one that holds for both; None: nothing bounds them."""
    return None if a is None or b is None else max(a, b)


class Applied:
    """A model that samples with a profile. `undo()` gives it back, in any order with others, also at the end of a `with`.

    reasons: what of the model is not as the profile was tuned for.
    """

    def __init__(self, tuned: Tuned, change: Undoable | None, reasons: tuple[str, ...] = ()) -> None:
        self.tuned, self.reasons, self._change = tuned, reasons, change

    @property
    def why_not_fused(self) -> str | None:
        """Why the fused path is not on, or did not run the last image; None if it did."""
        return getattr(self._change, "why_not_fused", "nothing is applied")

    @property
    def why_not_graphs(self) -> str | None:
        """Why the fused path's launches are not replayed as CUDA graphs, or None."""
        return getattr(self._change, "why_not_graphs", "nothing is applied")

    @property
    def why_dense(self) -> str | None:
        """Why the last image, from some call on, ran the model's own attention, such as another aspect; None if it did not."""
        return getattr(self._change, "reason", None)

    def undo(self) -> None:
        """The model attends as before; a second time it does nothing."""
        change, self._change = self._change, None
        if change is not None:
            change.undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def apply(model: Any, tuned: Tuned, path: str = "auto", graphs: bool = True) -> Applied:
    """Makes a live model sample with the profile, generation steps and all; one without a profile leaves it dense.

    path: "attention" replaces the attention alone. "fused" runs all blocks as one (sparvar_tune.fused), without a profile
    too, then with dense attention; graphs: in one CUDA graph a scale. "auto" is fused where that is legal and the model on a GPU.
    Raises ValueError when they do not fit. Warns where the model's weights are not those the certificate was made with.
    """
    if not isinstance(tuned, Tuned):
        raise ValueError(f"tuned: got a {type(tuned).__name__}, want what sparvar_tune.load_profile returned")
    yes_or_no("graphs", graphs)
    fused.check_path(path)
    if torch.cuda.is_initialized():  # the model may be on a GPU
        fused.read_triton()
    family, parts = adapters.recognise(model)
    if tuned.profile is None:
        change = fused.put_on(family, parts, None, path, graphs) if path == "fused" else None
        return Applied(tuned, change, tuned.reasons)
    w, reasons = tuned.profile.workload, []
    row = MODELS.get(w.model) if parts.family in adapters.FAMILIES else None  # other packages' families are in no row
    pairs = (
        ("family", parts.family, row.family if row else parts.family),
        ("layers", parts.layers, w.layers), ("heads", parts.heads, w.heads), ("head_dim", parts.head_dim, w.head_dim),
        ("softmax_scale", parts.softmax_scale, w.softmax_scale), ("schedule", parts.schedule or w.schedule, w.schedule),
    )  # fmt: skip
    for name, got, want in pairs:
        if got != want:
            raise ValueError(f"this profile does not fit the model: {name} is {got}, the profile is for {want}; "
                             "load the profile of this model")  # fmt: skip
    if _larger(w.logit_bound, parts.logit_bound) != w.logit_bound:
        reasons.append(f"the model's logits reach {parts.logit_bound}, the profile was tuned for {w.logit_bound}")
    told = getattr(family, "weights_sha256", adapters.weights_sha256)
    if w.weights_sha256 is not None and told(parts.model) != w.weights_sha256:
        reasons.append("the model has other weights than the profile was certified with: its bound on the picture does not hold")
        warnings.warn(f"{w.model}: {reasons[-1]}; tune again", stacklevel=2)
    return Applied(tuned, fused.put_on(family, parts, tuned.sparse_attention(parts.logit_bound), path, graphs), tuple(reasons))
