"""An adapter in a few lines, for a model that draws a picture from its first scale to its last in one go.

    class Mine(WholeImages):
        def draw(self, label, seed, attend):
            ...  # the picture; out = attend(q, k, v, layer, scale_index) wherever a block attends

    def open_model(device):
        model = ...
        return Mine(own_model("mine", schedule, layers=..., ...), device=device, classes=["a red cube", ...], weights=model)

Nothing is parked: a picture that a search finishes again is drawn again from the first scale on, with dense attention up to the
scale where it was to go on. So a search takes longer than with a `start` and `finish` of one's own, and finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters.protocol import Adapter, Pair
from sparvar_tune.adapters.weights import weights_sha256
from sparvar_tune.catalog.models import Model

State = tuple[Pair, int]  # the pair, and the scale from which on another attention may run


class WholeImages(Adapter):
    """See the module docstring. model: the row, of `own_model`. classes: what can be drawn, such as prompts.

    weights: a module or a mapping of tensors, hashed; what the certificate holds for.
    """

    def __init__(
        self, model: Model, *, device: str, classes: Sequence[str], weights: Any, temperature: float = 1.0
    ) -> None:  # fmt: skip
        self.model, self.device, self.temperature = model, str(device), float(temperature)
        self.schedule = model.schedule()
        self.softmax_scale, self.logit_bound = model.softmax_scale, model.logit_bound
        self.names = tuple(classes)
        self.num_classes = len(self.names)
        self.weights_sha256 = weights_sha256(weights)
        self.dense, self.dense_name = all_dense(model), "torch scaled_dot_product_attention"

    def draw(self, label: int, seed: int, attend: Any) -> Any:
        """The picture of class `label` from the noise of `seed` and nothing else, as `as_picture` takes it.

        attend(q, k, v, layer, scale_index): q [B, H, Nq, D], k and v [B, H, Nk, D] of all tokens so far -> [B, H, Nq, D].
        Scales in `attend.skip_scales` are left out.
        """
        raise NotImplementedError(f"{type(self).__name__} has no draw(label, seed, attend)")

    def start(self, pair: Pair, until: int) -> Any:
        return pair, until

    def finish(self, state: Any, attend: Any, redraw_from: int | None = None) -> Tensor:
        if redraw_from is not None:
            raise ValueError(f"{self.model.slug}: it draws whole images, whose noise cannot be drawn anew in between")
        (label, seed), until = state
        begin_image(attend)
        with torch.no_grad():
            return as_picture(self.draw(label, seed, FromScale(self.dense, attend, until)))

    def classes(self) -> Sequence[str]:
        return self.names


class FromScale:
    """Attention that is `before` up to scale `until` and `after` from there on."""

    def __init__(self, before: Any, after: Any, until: int) -> None:
        self.before, self.after, self.until = before, after, until
        self.skip_scales: tuple[int, ...] = after.skip_scales
        self.policy: Policy | None = getattr(after, "policy", None)  # its steps, for a model that can do more than skip

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        out: Tensor = (self.before if scale_index < self.until else self.after)(q, k, v, layer, scale_index)
        return out


def begin_image(attend: Any) -> None:
    """Forgets what an attention keeps of the last image, if it keeps anything."""
    getattr(attend, "reset", lambda: None)()


def all_dense(model: Model) -> SparseAttention:
    """Dense attention for every layer and scale of a model: the baseline."""
    policy = Policy(("A" * model.heads,) * model.layers, ())
    return SparseAttention(policy, model.schedule(), softmax_scale=model.softmax_scale, logit_bound=model.logit_bound)


def as_picture(found: Any) -> Tensor:
    """[1, 3, H, W] fp32 in 0..1 of one RGB picture as programs keep it.

    found: a PIL image, a NumPy array [H, W, 3] of uint8, a tensor [3, H, W] or [H, W, 3] of uint8 or [3, H, W] of floats in
    0..1; arrays and tensors may have a first axis of length 1. Raises ValueError, in one line, for anything else.
    """
    t = found
    if hasattr(t, "convert") and hasattr(t, "getbands"):  # PIL
        import numpy as np

        t = np.asarray(t.convert("RGB"))
    if hasattr(t, "__array_interface__"):
        if str(t.dtype) != "uint8":
            raise ValueError(f"picture: got an array of {t.dtype}, want uint8 [H, W, 3]")
        t = torch.from_numpy(t.copy())
    if not isinstance(t, Tensor):
        raise ValueError(f"picture: got a {type(found).__name__}, want a PIL image, a NumPy array or a tensor")
    t = t.detach()
    t = t[0] if t.ndim == 4 and t.shape[0] == 1 else t
    if t.dtype == torch.uint8 and t.ndim == 3 and t.shape[-1] == 3 and t.shape[0] != 3:
        t = t.permute(2, 0, 1)
    if t.ndim != 3 or t.shape[0] != 3 or 0 in t.shape:
        raise ValueError(f"picture: got {list(getattr(found, 'shape', t.shape))}, want one RGB picture, [3, H, W] or [H, W, 3]")
    if t.dtype == torch.uint8:
        return (t.float() / 255)[None]
    if not t.is_floating_point():
        raise ValueError(f"picture: got a tensor of {t.dtype}, want floats in 0..1 or uint8")
    t = t.float()
    low, high = (float(x) for x in torch.aminmax(t))
    if not -1e-3 <= low <= high <= 1 + 1e-3:
        raise ValueError(f"picture: got values {low:.3g}..{high:.3g}, want 0..1 (and no NaN)")
    return t.clamp(0, 1)[None]
