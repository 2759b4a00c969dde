"""Models opened from a checkout of their authors' code, with weights that lie in a folder or are random.

    sparvar-tune --model infinity-2b --source CHECKOUT --weights FOLDER --prompts FILE
    sparvar-tune --model infinity-2b --source CHECKOUT --weights random        # a dry run at real shapes

A file a family; each has `open_live(row, size, device, place)`. Random weights have no text encoder and no decoder: a prompt
stands for a text of its own, and one product makes the picture. Nothing is imported before a model is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparvar_tune.catalog.models import Model, own_model
from sparvar_tune.live.live_model import LiveModel

RANDOM = "random"
FAMILIES = {
    "infinity": "sparvar_tune.live.checkouts.infinity",
    "hart": "sparvar_tune.live.checkouts.hart",
    "var": "sparvar_tune.live.checkouts.var",
}
MARKS = {"infinity": "infinity/models/infinity.py", "hart": "hart/modules/networks/basic_hart.py", "var": "models/var.py"}
MOST_BYTES, MOST_PROMPTS = 1 << 22, 10_000
DRY_PROMPTS = tuple(f"dry run {i}" for i in range(10))


@dataclass(frozen=True)
class Place:
    """Where a model comes from. weights: None for random ones. prompts: what is drawn; VAR's are numbers of its classes."""

    source: Path
    weights: Path | None
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, row: Model, source: Path | str, weights: Path | str | None, prompts: Path | str | Sequence[str] | None) -> Place:
        """Checked as far as can be without importing anything. Raises ValueError: one line that says what is missing.

        prompts: a text file, a line each, or the prompts; None for random weights and for VAR.
        """
        if row.family not in FAMILIES:
            raise ValueError(f"--source: {row.slug} is not opened from a checkout; {', '.join(FAMILIES)} are")
        source, mark = Path(source).expanduser(), MARKS[row.family]
        if not (source / mark).is_file():
            raise ValueError(f"--source {source}: no checkout of {row.source}, it has no {mark}")
        if weights is None:
            raise ValueError("--source: want --weights FOLDER too, or --weights random for a dry run at real shapes")
        folder = None if str(weights) == RANDOM else Path(weights).expanduser()
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--weights {folder}: no such folder; want one, or {RANDOM}")
        if prompts is None and folder is not None and row.family != "var":
            raise ValueError("--weights: want --prompts FILE too, a prompt a line")
        found = prompts_of(prompts) if prompts is not None else DRY_PROMPTS
        if row.family == "var":
            found = found if prompts is not None else tuple(map(str, range(1000)))
            wrong = [p for p in found if not (p.isascii() and p.isdigit() and int(p) < 1000)]
            if wrong:
                raise ValueError(f"--prompts: got {wrong[0][:40]!r}, want numbers of ImageNet classes, 0..999, a line each")
        return cls(source.resolve(), folder, found)

    def row(self, row: Model, resolution: str, aspect: str) -> Model:
        """The table's row; for random weights one of another name, so that no profile of theirs passes for the model's."""
        if self.weights is not None:
            return row
        return own_model(
            f"{row.slug}-{RANDOM}", row.schedule(resolution, aspect), layers=row.layers, heads=row.heads, head_dim=row.head_dim,
            dtype=row.dtype, softmax_scale=row.softmax_scale, logit_bound=row.logit_bound, guidance_batch=row.guidance_batch,
            family=row.family,
        )  # fmt: skip


def prompts_of(given: Path | str | Sequence[str]) -> tuple[str, ...]:
    """Prompts of a text file, a line each, empty lines left out, or those given. Raises ValueError, OSError."""
    lines: Sequence[str]
    if isinstance(given, (str, Path)):
        path = Path(given).expanduser()
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"--prompts {path}: over {MOST_BYTES} bytes")
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {path}: not UTF-8") from None
    else:
        lines = given
    if not all(isinstance(line, str) for line in lines):
        raise ValueError("prompts: want text")
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not 1 <= len(found) <= MOST_PROMPTS:
        raise ValueError(f"--prompts: got {len(found)}, want 1..{MOST_PROMPTS}, a line each")
    return found


def open_checkout(place: Place, row: Model, size: tuple[str, str], device: str) -> LiveModel:
    """The adapter of a row's model at (resolution, aspect) from a checkout. Raises ValueError, in one line."""
    model, generate, temperature = importlib.import_module(FAMILIES[row.family]).open_live(row, size, device, place)
    return LiveModel(model, generate, place.prompts, row=place.row(row, *size), temperature=temperature)
