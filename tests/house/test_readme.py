"""README's tables are what the files say, its prose has no figure of its own, its links lead somewhere and its Python runs."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from places import ROOT

from lab import readme_tables
from sparvar_tune.policy_search.certify import SHARES, confidence_of

TEXT = readme_tables.README.read_text("utf-8")


def test_tables_are_what_the_files_say():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert readme_tables.with_tables(TEXT) == TEXT, "run python -m lab.readme_tables"


def test_prose_states_no_figure_of_its_own():
    prose = re.sub(r"<!-- table: .*?<!-- end -->", "", TEXT, flags=re.S)
    figures = re.findall(r"\b\d[\d.,]*\s?(?:x\b|dB|ms\b|us\b|s\b|TFLOP|GB/s|minutes|MiB|GiB)", prose)
    assert not figures, "a figure belongs into a table that a command writes"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_to_files(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), f"{page}: {link}"


def test_every_command_is_in_readme():
    from sparvar_tune.cli.parser import COMMANDS

    assert set(re.findall(r"^\| `sparvar-tune (\w[\w-]*)", TEXT, re.M)) == set(COMMANDS) - {"tune"}


def test_readmes_python_runs(home):
    """The lines as they stand, with the model in the box."""
    from sparvar_tune.pocketvar.model import load_pocketvar

    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    names: dict[str, object] = {"model": load_pocketvar()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), names)
    names["applied"].undo()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_python_of_using_a_profile_runs(home):
    """One after another as they stand; what wants the public code is read alone."""
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "use.md").read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    for i, code in enumerate(snippets):
        read = compile(code, f"docs/use.md, snippet {i + 1}", "exec")
        if not code.startswith("# the public code of "):
            exec(read, names)
    assert names["dense"].profile is None and names["applied"].tuned is names["dense"]
    assert names["picture"].shape == (1, 3, 192, 256) and names["out"].shape == names["q"].shape


def test_the_page_on_tuning_says_what_bounds_are_at():
    """The words that `show` and a run print, of each attempt at certification."""
    page = " ".join((ROOT / "docs" / "tune.md").read_text("utf-8").split())
    said = [f"at {confidence_of(attempt):.1%}" for attempt in range(len(SHARES))]
    assert f'"bounds {said[0]}" in a profile' in page and all(one in page for one in said)


def test_whole_pictures_report_is_what_its_raw_numbers_say():
    import json

    from lab.whole_image.report import render

    raw = ROOT / "reports" / "whole-image-h100.json"
    assert render(json.loads(raw.read_text("utf-8"))) == raw.with_suffix(".md").read_text("utf-8")


def test_a_first_picture_says_on_which_host_it_was():
    from lab.whole_image.host import TIMES, host
    from lab.whole_image.report import render

    ticks = iter([t for ms in (30, 20, 40, 90, 10) for t in (0.0, ms / 1e3)])
    here = host(lambda: next(ticks))
    assert TIMES == 5 and here["host"] and here["python_loop_ms"] == pytest.approx(30)
    row = {
        "model": "m", "grids": [[1, 1], [2, 2]], "tokens": 5, "images": 1, "date": "2000-01-01", "host": "CPU X",
        "apply_and_first_ms": 2000.0, "next_ms": [900.0, 400.0], "captured_bytes": 2**29,
    }  # fmt: skip
    text = render([row, row | here])
    assert "0.40 | 0.50 | CPU X | - |" in text and f"0.40 | 0.50 | {here['host']} | 30 |" in text
