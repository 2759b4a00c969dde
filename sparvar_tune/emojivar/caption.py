"""What emojivar is told to draw: a caption of seven words, one token each, behind a token that begins it.

A picture shows one emoji of a kind (`thing`, `which`), in one size or twice (`layout`), at a place on a 16 pixel lattice (`row`,
`column`), before a background that goes from the colour `top` to `bottom`. Classes are the things; the seed says the rest.
"""

from __future__ import annotations

import hashlib

HEIGHT, WIDTH = 192, 256  # pixels of a picture
LATTICE = 16

# The emoji of each thing, those of Twemoji; one code point each.
THINGS: dict[str, str] = {
    "cat": "😺😸😹😻😼😽🙀😿",
    "animal": "🐶🐺🦊🐻🐼🐨🐯🦁",
    "monkey": "🐵🙈🙉🙊",
    "face": "😀😄😆😎😍🥳😴🤔",
    "heart": "🧡💛💚💙💜🖤💖💝",
    "moon": "🌑🌒🌓🌔🌕🌖🌗🌘",
    "clock": "🕐🕒🕔🕖🕗🕘🕚🕛",
    "fruit": "🍎🍏🍊🍋🍌🍉🍓🍒",
    "vegetable": "🍆🥕🌽🥦🍅🥔🧅🥒",
    "cake": "🍰🎂🧁🍩🍪🥧🍮🍫",
    "drink": "☕🍵🍺🍷🍸🍹🥤🧃",
    "fish": "🐟🐠🐡🐬🐳🦈🐙🦑",
    "bird": "🐔🐧🐦🦆🦅🦉🦜🦩",
    "flower": "🌷🌹🌺🌻🌼🌸💐🥀",
    "tree": "🌲🌳🌴🌵🎄🌱🍀🍁",
    "car": "🚗🚕🚙🚓🚑🚒🚌🚚",
    "train": "🚂🚆🚇🚊🚃🚄🚅🚉",
    "boat": "⛵🚤🚢🛶",
    "ball": "⚽🏀🏈⚾🎾🏐🏉🎱",
    "book": "📕📗📘📙📓📔📖📚",
    "house": "🏠🏡🏢🏥🏦🏫🏰🏯",
    "sky": "🌍🌎🌏🪐🌞🌟⭐🌈",
    "hat": "🎩👒🎓👑🧢",
    "instrument": "🎸🎺🎻🥁🎷🎹",
}
CLASSES = tuple(THINGS)
# Side of the emoji in pixels, and the rows and columns of the lattice that leave it inside the picture. A pair's second one
# stands at the mirrored column.
LAYOUTS: dict[str, tuple[int, int, int]] = {"large": (160, 3, 7), "small": (112, 6, 10), "pair": (112, 6, 2)}
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "azure": (166, 214, 246), "navy": (34, 44, 92), "green": (126, 186, 118),
    "sand": (240, 222, 176), "rose": (244, 182, 194), "grey": (128, 134, 142), "violet": (150, 124, 204),
}  # fmt: skip

Caption = tuple[int, ...]  # an index into each slot's words
# How many words each slot has; in the model's vocabulary "unsaid" comes before them.
SLOTS: dict[str, int] = {
    "thing": len(THINGS),
    "which": max(map(len, THINGS.values())),
    "layout": len(LAYOUTS),
    "row": max(rows for _, rows, _ in LAYOUTS.values()),
    "column": max(columns for _, _, columns in LAYOUTS.values()),
    "top": len(COLOURS),
    "bottom": len(COLOURS),
}


def caption(thing: int, seed: int) -> Caption:
    """The caption of class `thing` that a seed stands for: a pure function, the same in every version of anything."""
    digest = iter(hashlib.sha256(f"{thing} {seed}".encode()).digest())

    def one_of(n: int) -> int:
        return next(digest) % n

    which = one_of(len(THINGS[CLASSES[thing]]))
    layout = one_of(len(LAYOUTS))
    _, rows, columns = list(LAYOUTS.values())[layout]
    return thing, which, layout, one_of(rows), one_of(columns), one_of(len(COLOURS)), one_of(len(COLOURS))


def say(words: Caption) -> str:
    """A caption for people, such as "😺 large, row 2, column 3, navy over sand"."""
    thing, which, layout, row, column, top, bottom = words
    glyph, colours = THINGS[CLASSES[thing]][which], list(COLOURS)
    return f"{glyph} {list(LAYOUTS)[layout]}, row {row}, column {column}, {colours[top]} over {colours[bottom]}"
