"""Where emojivar's files are: its weights are too large for everybody's wheel, so they have a distribution of their own.

In a checkout it is weights/emojivar, and nothing needs to be installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "sparvar_tune_emojivar"
HOW = "pip install 'sparvar-tune[emojivar]' brings them, in a checkout pip install ./weights/emojivar"


def place(name: str) -> Path:
    """A file of the distribution, such as "emojivar.safetensors"; of a checkout, which may not have it, where neither is here."""
    checkout = Path(__file__).parents[2] / "weights" / "emojivar" / PACKAGE
    found = None if checkout.is_dir() else find_spec(PACKAGE)
    return (checkout if found is None or found.origin is None else Path(found.origin).parent) / name
