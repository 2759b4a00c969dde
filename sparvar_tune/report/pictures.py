"""Pictures dense and tuned from the same noise, and eight times their difference, as PNG data of the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from sparvar_tune.adapters import load_adapter
from sparvar_tune.catalog.metrics import METRICS
from sparvar_tune.measure.fidelity import compare_pictures
from sparvar_tune.measure.pairs import verify_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from sparvar_tune.profile.schema import Profile
    from sparvar_tune.ways.subject import Subject

TIMES = 8  # what a difference is multiplied with
MOST = 6
ROOM_BYTES = 2_200_000  # of pictures, in one page of at most 3 MB


@dataclass(frozen=True)
class PicturePair:
    """One picture both ways. dense, tuned, difference: data URIs of PNGs, width x height pixels. close: in words."""

    label: str
    seed: int
    dense: str
    tuned: str
    difference: str
    width: int
    height: int
    close: str

    @property
    def bytes(self) -> int:
        return sum(map(len, (self.dense, self.tuned, self.difference)))


def why_not(subject: Subject | None, profile: Profile) -> str | None:
    """Why no picture of this profile can be drawn here, in a sentence, or None."""
    if subject is None or subject.model.adapter is None:
        return f"{profile.workload.model} cannot be opened here: its weights and its authors' code are not part of this package."
    if not subject.is_here:
        return f"{subject.gpu.slug} is not in this machine; run the report where it is."
    if profile.workload.batch != subject.model.guidance_batch:
        return "The profile is for several images at once; the adapter draws one at a time."
    return None


def draw(
    subject: Subject | None, profile: Profile, path: Path, count: int, status: Callable[[str], None]
) -> tuple[tuple[PicturePair, ...], str]:
    """`count` pairs that no certificate used, and why there are fewer, or "".

    Pictures are looked at, not timed: whatever runs here draws them.
    """
    reason = why_not(subject, profile) or ("" if count else "None were asked for (--pictures 0).")
    if reason or subject is None:
        return (), reason
    adapter = load_adapter(subject.model, subject.gpu.device)
    if adapter.weights_sha256 != profile.workload.weights_sha256:
        return (), "The weights here are not those that the profile was tuned with."
    tuned = subject.load(path)
    attend, made, spent = tuned.sparse_attention(), list[PicturePair](), 0
    for label, seed in verify_pairs(adapter.num_classes, count):
        status(f"drawing picture {len(made) + 1} of {count}, dense and tuned")
        attend.reset()
        dense, sparse = (adapter.finish(adapter.start((label, seed), 0), way) for way in (adapter.dense, attend))
        found = compare_pictures(sparse, dense)
        height, width = dense.shape[-2:]
        shown = [_png(panel) for panel in (dense[0], sparse[0], (sparse[0] - dense[0]).abs() * TIMES)]
        pair = PicturePair(
            adapter.classes()[label], seed, shown[0], shown[1], shown[2], width, height,
            ", ".join(f"{m.title} {m.say(found[m.name])}" for m in (METRICS["psnr"], METRICS["ssim"])),
        )  # fmt: skip
        spent += pair.bytes
        if spent > ROOM_BYTES:
            return tuple(made), f"{len(made)} of {count} pictures are shown: more would make the page larger than 3 MB."
        made.append(pair)
    return tuple(made), ""


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 -> RGB image."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _png(picture: Tensor) -> str:
    out = io.BytesIO()
    to_image(picture).save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
