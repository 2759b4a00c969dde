"""Pictures for people: dense and tuned side by side, captioned."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sparvar_tune.profile.store import write_atomic
from sparvar_tune.report.pictures import to_image

SCALE, MARGIN, CAPTION = 2, 16, 44
INK, PAPER = (25, 25, 28), (255, 255, 255)


def side_by_side(panels: list[tuple[Tensor, str, str]]) -> Image.Image:
    """One row of (picture [3, H, W], title, second line), each enlarged twice, with room for the captions."""
    height, width = (SCALE * n for n in panels[0][0].shape[1:])
    sheet = Image.new("RGB", (MARGIN + len(panels) * (width + MARGIN), MARGIN + height + CAPTION + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, title, line) in enumerate(panels):
        left = MARGIN + i * (width + MARGIN)
        sheet.paste(to_image(picture).resize((width, height), Image.Resampling.LANCZOS), (left, MARGIN))
        draw.text((left, MARGIN + height + 6), title, INK, ImageFont.load_default(18))
        draw.text((left, MARGIN + height + 28), line, INK, ImageFont.load_default(14))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Writes the PNG in one step. Raises ProfileError when the file cannot be written."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
