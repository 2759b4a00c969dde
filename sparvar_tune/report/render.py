"""Facts -> a page of HTML, or Markdown for a pull request. Every text from a file is escaped by the templates' environment."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from sparvar_tune.report import charts, cost, tables
from sparvar_tune.report.facts import Facts
from sparvar_tune.report.svg import need

MOST_BYTES = 3_000_000  # of a page
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~^$])")


def need_libraries(format: str) -> None:
    """Raises MissingLibrary where a report of this format cannot be rendered; asked before half a minute of pictures is drawn."""
    need("jinja2")
    if format == "html":
        need("matplotlib")


def to_html(facts: Facts) -> str:
    """One page that loads nothing. Raises MissingLibrary; ValueError where it would be over 3 MB."""
    need_libraries("html")
    script, style = _text("page.js"), _text("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment(True).get_template("page.html").render(
        facts=facts, t=tables, charts=_charts(facts), cost=cost, script=script, style=style, script_hash=digest,
    )  # fmt: skip
    if len(page.encode()) > MOST_BYTES:
        got = f"report: the page has {len(page.encode())} bytes, want at most {MOST_BYTES}"
        raise ValueError(f"{got}; give fewer --pictures or trials")
    return page


def to_markdown(facts: Facts) -> str:
    """The same tables and sentences, for a pull request; no charts, no pictures."""
    need_libraries("md")
    text = _environment(False).get_template("page.md").render(facts=facts, t=tables)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _charts(facts: Facts) -> dict[str, charts.Chart | None]:
    painters: dict[str, Callable[[Facts], charts.Chart | None]] = {
        "front": charts.front, "times": charts.times, "steps": charts.steps, "speedups": charts.speedups, "heads": charts.heads,
    }  # fmt: skip
    return {name: paint(facts) for name, paint in painters.items()}


def _environment(html: bool) -> Any:
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("sparvar_tune.report"), undefined=jinja2.StrictUndefined, autoescape=html, trim_blocks=True,
        lstrip_blocks=True, finalize=None if html else _markdown,
    )  # fmt: skip
    return found


def _markdown(value: Any) -> str:
    """A value as text that Markdown and the HTML in it take for nothing but text, and that names nobody."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    return _MARKDOWN.sub(r"\\\1", text)


def _text(name: str) -> str:
    return files("sparvar_tune.report").joinpath("templates", name).read_text("utf-8")
