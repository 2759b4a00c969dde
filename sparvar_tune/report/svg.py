"""matplotlib's SVG made a part of a page: colours the page's style sheet decides, ids of its own, text in the page's font.

A chart is drawn with stand-in colours, one for each CSS colour (`Ink`). Afterwards they are replaced, so that a chart follows
the page into dark mode without being drawn twice.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)
# parse_math: a name from a file may hold a $; hashsalt and date: the same report twice is the same bytes
STYLE = {"svg.fonttype": "none", "text.parse_math": False, "axes.unicode_minus": False}


class MissingLibrary(ValueError):
    """A library of the extra `report` is not here."""


def need(name: str) -> None:
    """Raises MissingLibrary, one line, where a module of the extra `report` cannot be imported."""
    import importlib

    try:
        importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary(
            f"report: {error.name or name} is not installed; pip install 'sparvar-tune[report]', or give --format md"
        ) from None


@dataclass
class Ink:
    """CSS colours and what stands for them while a chart is drawn."""

    made: dict[str, str] = field(default_factory=dict)

    def __call__(self, css: str) -> str:
        """The stand-in for a CSS colour such as "var(--tuned)"."""
        return self.made.setdefault(css, f"#{0x0A0100 + len(self.made):06x}")

    def back(self, style: str) -> str:
        for css, stand_in in self.made.items():
            style = style.replace(stand_in, css)
        return style


def draw(paint: Callable[[Figure, Ink], None], width: float, height: float, size: float, name: str, alt: str) -> str:
    """One SVG element. width, height: inches; size: of text, points; name: unique on the page; alt: what a screen reader says."""
    need("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink, out = Ink(), io.StringIO()
    line, text = ink("var(--line)"), ink("var(--text)")
    style: Any = STYLE | {
        "svg.hashsalt": name, "font.size": size, "axes.edgecolor": line, "axes.labelcolor": text, "text.color": text,
        "xtick.color": line, "ytick.color": line, "xtick.labelcolor": text, "ytick.labelcolor": text, "grid.color": line,
        "axes.linewidth": 1.0, "grid.linewidth": 0.6, "axes.titlesize": size, "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure, ink)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), ink, name, alt)


def _inline(text: str, ink: Ink, name: str, alt: str) -> str:
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                if element.tag == f"{{{SVG}}}g":
                    del element.attrib[key]
                else:
                    element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href":
                element.set(key, f"#{name}-{value[1:]}")
            elif key in ("style", "clip-path", "fill", "stroke"):
                value = re.sub(r"url\(#", f"url(#{name}-", ink.back(value))
                element.set(key, re.sub(r"font-family:[^;]*;? ?", "", re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    root.set("class", "chart")
    return re.sub(r"\s*\n\s*", " ", ElementTree.tostring(root, encoding="unicode"))
