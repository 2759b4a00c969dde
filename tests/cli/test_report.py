"""The report: its numbers are the profile's, no text of a file becomes markup, the page loads nothing, a refusal is a line."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import io
import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from command_line import refused, run
from PIL import Image
from places import ROOT

from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.trial import FinishedTrial, Knobs, Verdict
from sparvar_tune.profile import schema, store
from sparvar_tune.report import charts, cost, facts, make, pictures, render, sources, svg, tables

POCKETVAR, INFINITY, PREDICTED = (
    ROOT / "profiles" / name for name in ("cpu/pocketvar.json", "h100-sxm/infinity-8b.json", "a100-80/hart.json")
)
EVIL = "<script>alert(1)</script> $\\frac{$ {{7*7}} | @team \"'&<b"
CSV = """trial,form,time_ratio,shortfall_db,psnr,ssim,complete,front
0,paper,0.5,1.0,30.0,0.9,False,False
1,priced,0.4,-0.5,35,0.97,True,True
"""


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: dict[str, list[str]] = {"script": [], "style": []}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag if tag in self.code else self.inside

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        (self.code[self.inside] if self.inside else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@cache
def gathered(path: Path, **options) -> facts.Facts:
    return make.gather(make.ReportRequest(profiles=(path,), format="md", **options))


@cache
def html_of(path: Path) -> str:
    return render.to_html(gathered(path))


def evil_profile() -> schema.Profile:
    """pocketvar's profile with a hostile text in every field that takes one."""
    p = store.load(POCKETVAR)
    return dataclasses.replace(
        p, policy_source=EVIL, notes=(EVIL,), silicon=dataclasses.replace(p.silicon, name=EVIL),
        versions=dataclasses.replace(p.versions, torch=EVIL, sparvar_tune=EVIL),
        evidence=dataclasses.replace(
            p.evidence, metrics=(*p.evidence.metrics, (EVIL, schema.Measured(1.0, 0.9, 0.8))),
            yardsticks=(schema.Yardstick(EVIL, 30.0, 0.9),),
        ),
    )  # fmt: skip


def assert_tables_are_whole(markdown: str) -> None:
    """Every row has as many cells as its head."""
    found = re.findall(r"(?:^\|.*\n)+", markdown, re.M)
    assert len(found) >= 8
    for table in found:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()}) == 1, table


@pytest.mark.slow
def test_nothing_a_file_says_becomes_markup(tmp_path):
    path, trials, trace = tmp_path / "evil.json", tmp_path / "trials.csv", tmp_path / "t.csv"
    store.save(evil_profile(), path)
    quoted = '"' + EVIL.replace('"', '""') + '"'
    trials.write_text(CSV + f"2,{quoted},0.6,-1.0,36,0.98,True,True\n")
    trace.write_text(f"scale,step,ms\n12,{quoted},3.5\n,decoder,1.0\n")
    raw = json.loads((ROOT / "reports/cpu/pocketvar.json").read_text())
    raw["outcomes"][EVIL] = raw["outcomes"]["paper's fixed setting"]  # stands in the front's chart
    compared = tmp_path / "c.json"
    compared.write_text(json.dumps(raw))
    request = make.ReportRequest(profiles=(path,), trials=trials, traces=(trace,), compared=compared, pictures=0)
    text = make.make(request)
    page, clean = Page(text), Page(html_of(POCKETVAR))
    assert [tag for tag, _ in page.elements].count("script") == 1 and page.code["script"] == clean.code["script"]
    known = {tag for tag, _ in clean.elements} | {"h3", "circle"}
    assert {tag for tag, _ in page.elements} <= known and not any(name.startswith("on") for _, a in page.elements for name in a)
    assert page.text.count("alert(1)") >= 9 and "{{7*7}}" in page.text and "49" not in page.text.split("alert(1)")[1][:30]

    twin = make.make(dataclasses.replace(request, format="md"))
    assert "<script" not in twin and "<b" not in twin and "@team" not in twin and twin.count("alert(1)") >= 9
    assert_tables_are_whole(twin)  # its | ends no cell


def test_numbers_are_the_profiles_own():
    found = gathered(POCKETVAR)
    p, w = found.profile, found.work
    assert sum(part.dense_ms for part in found.parts) == pytest.approx(p.generation.dense.p50_ms)
    assert sum(part.tuned_ms for part in found.parts) == pytest.approx(p.generation.tuned.p50_ms)
    assert (w.dense_s, w.speedup, w.low, w.high, w.whole) == (4.90692, 2.39228, 2.35527, 2.45492, True)
    by_name = {row[0]: row for row in tables.speedups(found).rows}
    assert by_name["scale 12 (64x64)"][1:6] == ("302", "44", "6.77x", "6.54 to 7.08", "32")
    counts = {row[1]: row[2:] for row in tables.head_counts(found).rows}
    assert counts["dense"] == ("25", "2", "0") and all(sum(int(r[i]) for r in counts.values()) == 32 for i in range(3))
    text = Page(html_of(POCKETVAR)).text
    assert "2.39x" in text and "34.72 dB" in text and "with a confidence of 96.5%; 34.57 dB was asked for" in text


def test_a_year_costs_what_a_hand_reckons():
    found = cost.bill(cost.ImageTime(4.0, 2.0, 1.6, 2.5, True), cost.Load(images_per_day=900, price=3.0))
    assert (found.dense_per_hour, found.tuned_per_hour) == (900, 1800)
    assert (found.dense_hours, found.tuned_hours, found.saved_hours) == pytest.approx((365, 182.5, 182.5))
    assert (found.saved_low, found.saved_high, found.saved_money) == pytest.approx((365 * 0.375, 365 * 0.6, 547.5))


def test_attention_alone_is_said_to_be_that():
    """Without whole pictures the bill is of attention, per image, and a row that runs dense counts as dense."""
    found = gathered(INFINITY)
    rows, layers = found.profile.rows, found.profile.workload.layers
    dense = sum(r.dense.p50_ms for r in rows) * layers / 1e3
    assert not found.work.whole and found.work.dense_s == pytest.approx(dense)
    assert found.work.low <= found.work.speedup <= found.work.high
    text = Page(html_of(INFINITY)).text
    assert "policy is unverified" in text and "Whole pictures were not timed" in text and "images an hour" not in text
    demoted = dataclasses.replace(found, demoted={rows[-1].scale_index: "it is slower"})
    assert demoted.parts[-1].tuned_ms == demoted.parts[-1].dense_ms and demoted.work.speedup < found.work.speedup
    assert "Scale 12 runs dense: it is slower." in tables.warnings(demoted)
    batched = gathered(ROOT / "profiles/h100-sxm/infinity-8b--images-4.json")
    assert batched.images == 4 and batched.work.dense_s == pytest.approx(sum(p.dense_ms for p in batched.parts) / 4e3)


def test_predicted_times_make_no_bill():
    found = gathered(PREDICTED)
    text = Page(html_of(PREDICTED)).text
    assert found.work is None and "There is no bill" in text and "data-dense-s=" not in html_of(PREDICTED)
    assert "Times are predicted by a cost model" in text and "hart cannot be opened here" in text


@pytest.mark.parametrize("path", [POCKETVAR, INFINITY, PREDICTED], ids=lambda p: p.stem)
def test_the_page_stands_alone(path):
    text = html_of(path)
    page = Page(text)
    for tag, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert attrs.get(name) is None or attrs[name].startswith(("#", "data:image/png;base64,")), (tag, attrs)
    assert not re.search(r"url\((?!#)|@import", text) and "://" not in text.replace("http://www.w3.org/", "")
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256("".join(page.code["script"]).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    ids = [a["id"] for _, a in page.elements if "id" in a]
    targets = re.findall(r'(?:href="|url\()#([^")]+)', text) + [
        a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a
    ]
    assert len(ids) == len(set(ids)) and set(targets) <= set(ids)
    assert len(text.encode()) < render.MOST_BYTES / 10 and "#0a01" not in text, "a stand-in colour was left"
    for tag, attrs in page.elements:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])
    if path == PREDICTED:
        again = charts.times(gathered(path))
        assert again.wide in text and again.narrow in text, "the same report twice is not the same bytes"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(which):
    """WCAG 2.2: text 4.5 to 1, parts of a chart 3 to 1, in both palettes."""
    style = (ROOT / "sparvar_tune/report/templates/page.css").read_text()
    palette = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\n\s*\}", style, re.S)[which]))
    for name in ("--text", "--muted", "--link", "--warn"):
        assert min(contrast(palette[name], palette[back]) for back in ("--paper", "--page")) >= 4.5, name
    assert contrast(palette["--text"], palette["--warn-back"]) >= 4.5
    series = [name for name in palette if re.match("--(series|dense|kind-(?!dense))", name)]
    assert len(series) == 15 and all(contrast(palette[name], palette["--on-fill"]) >= 4.5 for name in series)
    for name in (*series, "--tuned", "--best", "--paper-way"):
        assert contrast(palette[name], palette["--paper"]) >= 3, name


def journal(folder: Path, name: str = "pocketvar-0123") -> Path:
    folder.mkdir(exist_ok=True)
    study = search.open_study(folder, name, 0, False)
    found: list[FinishedTrial] = []

    def judge(knobs: Knobs) -> Verdict:
        return Verdict(0.5 + 0.01 * len(found), -0.1, {"psnr": 35.0 + 0.1 * len(found), "ssim": 0.97}, True)

    search.search(study, judge, lambda: len(found) >= 4, found.append)
    return folder / "trials.journal"


def test_a_cut_journal_gives_what_it_still_holds_and_is_not_touched(tmp_path):
    path = journal(tmp_path)
    whole = sources.read_trials(path, "pocketvar")
    raw = path.read_bytes()
    last = raw.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(raw[: last + 20])  # the last line is torn: the last trial has not ended
    cut = sources.read_trials(path, "pocketvar")
    assert len(whole) == 4 and len(cut) == 3 and list(cut["psnr"]) == list(whole["psnr"])[:3]
    assert path.read_bytes() == raw[: last + 20] and [p.name for p in tmp_path.iterdir()] == ["trials.journal"]
    path.write_bytes(raw[: len(raw) // 2] + b"\xff\xfe{" + raw[len(raw) // 2 :])
    with pytest.raises(ValueError, match="cannot be read"):
        sources.read_trials(path, "pocketvar")


def test_refusals_are_one_line(tmp_path, capsys, home, monkeypatch):
    """Of another model, damaged, foreign, unwritable, without a library: exit code 2 and nothing written."""
    out, here = tmp_path / "r.html", ["--gpu", "cpu", "--model", "pocketvar", "--pictures", "0"]
    foreign, edited = journal(tmp_path / "other", "hart-0123"), tmp_path / "edited.json"
    bound = json.loads(POCKETVAR.read_text())["evidence"]["metrics"]["psnr"]["bound"]
    edited.write_text(POCKETVAR.read_text().replace(str(bound), str(round(bound - 0.0001, 4))))
    (tmp_path / "file").write_text("x")
    huge = tmp_path / "huge.csv"
    with huge.open("wb") as file:
        file.truncate(sources.MOST_BYTES + 1)
    traces = [tmp_path / f"{name}.csv" for name in ("hart", "h100", "layer", "whole")]
    for path, of in zip(traces, ("hart,cpu,", "pocketvar,h100-sxm,", "pocketvar,cpu,0", "pocketvar,cpu,"), strict=True):
        path.write_text(f"scale,step,ms,model,gpu,layer\n12,dense,3.5,{of}\n")
    cut = tmp_path / "cut.csv"
    cut.write_text("scale,step,ms,share\n12,dense,3.5,0.6\n11,den")
    infinite = tmp_path / "inf.csv"
    infinite.write_text(CSV.replace("0.5,", "inf,"))
    cases = [
        (["--profile", str(INFINITY), str(PREDICTED)], "make one for each"),
        (["--model", "hart", "--profile", str(INFINITY)], "for model infinity-8b, not hart"),
        (["--profile", str(edited)], "edited or damaged"),
        ([*here, "--trials", str(foreign)], "trials of hart, not of pocketvar"),
        ([*here, "--trials", str(POCKETVAR)], "not a journal"),
        ([*here, "--trials", str(huge)], "over 64 MiB"),
        ([*here, "--trials", str(infinite)], "want finite numbers"),
        ([*here, "--trials", str(tmp_path / "none")], "no such file"),
        ([*here, "--log", str(POCKETVAR)], "no measurement"),
        ([*here, "--trace", str(tmp_path / "file")], "no table"),
        ([*here, "--trace", str(cut)], "cut short, its shares add up to 60%"),
        ([*here, "--trace", str(traces[0])], "a trace of hart, not of pocketvar"),
        ([*here, "--trace", str(traces[1])], "a trace of h100-sxm, not of cpu"),
        ([*here, "--trace", str(traces[2]), str(traces[3])], "of layer 0's attention, but"),
        ([*here, "--compare", str(POCKETVAR)], "no raw numbers"),
        ([*here, "--price", "nan"], "--price"),
        ([*here, "--images-per-day", "0"], "--images-per-day"),
        ([*here, "--pictures", "7"], "--pictures"),
        ([*here, "--out", str(tmp_path / "file" / "r.html")], "cannot be written"),
        ([*here, "--out", str(tmp_path / "r.pdf")], "r.pdf, want a name that ends in .html or .htm or .md or .markdown"),
        ([*here, "--out", str(tmp_path / "r.md"), "--format", "html"], "r.md, want a name that ends in .html or .htm"),
        ([], "want --model"),
        (["--gpu", "l40s", "--model", "var-d30"], "nothing to report"),
    ]  # fmt: skip
    for words, said in cases:
        line = refused(capsys, "report", *([] if "--out" in words else ["--out", str(out)]), *words)
        assert said in line, (words, line)
    for library in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            assert "pip install 'sparvar-tune[report]'" in refused(capsys, "report", "--out", str(out), *here)
    assert not out.exists() and not list(tmp_path.glob("r.*"))


@pytest.mark.parametrize(("name", "asked", "want"), [
    (None, None, "html"), (None, "md", "md"), ("r.HTM", None, "html"), ("r.markdown", None, "md"), ("r.md", "md", "md"),
    ("no/suffix", None, "html"), ("no/suffix", "md", "md"),
])  # fmt: skip
def test_a_reports_format_is_that_of_its_name(name, asked, want):
    assert make.format_for(name and Path(name), asked) == want


def test_markdown_needs_no_matplotlib_and_follows_the_name(tmp_path, capsys, home, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "r.md"
    raw = ROOT / "reports/cpu/pocketvar.json"
    code, said, _ = run(capsys, "report", "--gpu", "cpu", "--model", "pocketvar", "--compare", str(raw), "--out", str(out))
    text = out.read_text()
    assert code == 0 and str(out) in said and text.startswith("# pocketvar on cpu\n")
    row = next(line for line in raw.with_suffix(".md").read_text().splitlines() if line.startswith("| paper's fixed setting"))
    speed, low, high, mean, bound = re.match(
        r"(?:[^|]*\|){3} ([\d.]+x) \(([\d.]+)\.\.([\d.]+)\) (?:\|[^|]*){2}\| ([\d.]+) \(([\d.]+)\)", row
    ).groups()
    assert "| tuned, paper | 3.15x |" in text
    assert f"| paper's fixed setting | {speed} | {low} to {high} | {mean} | {bound} | 32 |" in text
    assert_tables_are_whole(text)


def test_the_example_is_what_is_made_today():
    command = next(line for line in (ROOT / "docs/records.md").read_text().splitlines() if "pocketvar-report.md" in line)
    words = command.split("`")[-2].split()
    files = words[words.index("--profile") + 1 : words.index("--compare")]
    made = make.make(
        make.ReportRequest(profiles=tuple(ROOT / f for f in files), format="md", compared=ROOT / "reports/cpu/pocketvar.json")
    )
    assert (ROOT / "reports/cpu/pocketvar-report.md").read_text() == made, (
        f"the example is of older profiles: run {' '.join(words)}"
    )


def test_a_damaged_journal_of_the_last_run_is_said_and_left_out(home):
    request = make.ReportRequest(subject=make.Subject.of("pocketvar", "cpu"), format="md")
    folder = request.subject.run_folder()
    folder.mkdir(parents=True)
    (folder / "trials.journal").write_text("no journal")
    text = make.make(request)
    assert "Trials shown: none;" in text and "not a journal of Optuna" in text
    (folder / "trials.journal").unlink()
    journal(folder)
    assert "4 trials: the front and the fixed points" in make.make(request)


def test_a_library_that_is_missing_is_said_before_pictures_are_drawn(monkeypatch):
    def lacks(name):
        raise svg.MissingLibrary(f"report: {name} is not installed")

    monkeypatch.setattr(make, "gather", lambda request, status: pytest.fail("pictures were drawn"))
    for lacking, form in (("jinja2", "html"), ("matplotlib", "html"), ("jinja2", "md")):
        monkeypatch.setattr(render, "need", lambda name, lacking=lacking: lacks(name) if name == lacking else None)
        with pytest.raises(svg.MissingLibrary, match=f"{lacking} is not installed"):
            make.make(make.ReportRequest(profiles=(POCKETVAR,), format=form))


def test_traces_and_logs_are_shown(tmp_path):
    for way, ms in (("dense", 40.0), ("tuned", 10.0)):
        rows = f"12,dense,{ms}\n12,gathered,4.0\n11,products,6.0\n,decoder,3.0\n0,rest,0.001\n"
        (tmp_path / f"pocketvar-cpu-{way}.csv").write_text(f"scale,step,ms\n{rows}")
    log = tmp_path / "m.jsonl"
    lines = (ROOT / "reports/h100-sxm/pocketvar.jsonl").read_text().splitlines()[:5]
    log.write_text("\n".join([*lines, lines[0][:40]]))
    found = gathered(POCKETVAR, traces=tuple(sorted(tmp_path.glob("*.csv"))), log=log)
    shown = {(row[0], row[1]): row[-1] for row in tables.steps(found).rows}
    assert shown["scale 12 (64x64)", "dense"] == "44" and shown["scale 12 (64x64)", "tuned"] == "14"
    assert shown["all else", "dense"] == "3.001", "what is below a hundredth is kept, together"
    said = " ".join(tables.search(found))
    assert "1 lines are cut short" in said and f"{found.measurements.timings} timings" in said


def test_pictures_are_what_was_drawn(monkeypatch):
    """Dense, tuned and eight times their difference, pixel for pixel; why there are none is a sentence."""
    profile = store.load(POCKETVAR)
    dense, sparse = torch.rand(2, 1, 3, 16, 16).mul(255).round().div(255)
    sparse = dense + (sparse - 0.5) / 8
    attend = SimpleNamespace(reset=lambda: None)
    adapter = SimpleNamespace(
        num_classes=10, weights_sha256=profile.workload.weights_sha256, classes=lambda: ["cat"] * 10, dense="dense",
        start=lambda pair, until: pair, finish=lambda state, way: dense if way == "dense" else sparse,
    )  # fmt: skip
    monkeypatch.setattr(pictures, "load_adapter", lambda model, device: adapter)
    subject = SimpleNamespace(
        model=SimpleNamespace(adapter="x", slug="pocketvar", guidance_batch=1), gpu=SimpleNamespace(device="cpu", slug="cpu"),
        is_here=True, load=lambda path: SimpleNamespace(sparse_attention=lambda: attend),
    )  # fmt: skip
    drawn, why = pictures.draw(subject, profile, POCKETVAR, 2, lambda text: None)
    assert len(drawn) == 2 and why == "" and drawn[0].seed != drawn[1].seed
    for uri, want in ((drawn[0].dense, dense), (drawn[0].tuned, sparse), (drawn[0].difference, (sparse - dense).abs() * 8)):
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        got = torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
        assert (got - want[0].clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    adapter.weights_sha256 = "0" * 64
    assert "not those" in pictures.draw(subject, profile, POCKETVAR, 2, lambda text: None)[1]
    subject.is_here = False
    assert "not in this machine" in pictures.draw(subject, profile, POCKETVAR, 2, lambda text: None)[1]
    monkeypatch.setattr(pictures, "ROOM_BYTES", 10)
    adapter.weights_sha256, subject.is_here = profile.workload.weights_sha256, True
    assert pictures.draw(subject, profile, POCKETVAR, 2, lambda text: None)[0] == ()


# In a browser, where there is one: pip install playwright, and Debian's chromium.

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    if BROWSER is None:
        pytest.skip("no browser here")
    with playwright.sync_playwright() as p:
        yield p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    pair = pictures.PicturePair("cat", 7, *(["data:image/png;base64," + PIXEL] * 3), 256, 256, "PSNR 35.00 dB")
    path = tmp_path_factory.mktemp("report") / "r.html"
    path.write_text(render.to_html(dataclasses.replace(gathered(POCKETVAR), pictures=(pair,))))
    return path


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, page_file, width, scheme):
    """Fits its window, says nothing on the console, asks for nothing, follows the colour scheme; slider and calculator work."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or heard.append(request.url))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = [page.locator(f".{name} svg").first.is_visible() for name in ("wide", "narrow")]
    assert shown == [width > 640, width <= 640]
    paper = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
    fill = page.evaluate("getComputedStyle([...document.querySelectorAll('#time svg text')].at(-1)).fill")
    assert (paper, fill) == {
        "light": ("rgb(255, 255, 255)", "rgb(21, 25, 30)"), "dark": ("rgb(23, 27, 33)", "rgb(233, 236, 240)")
    }[scheme]  # fmt: skip

    slider = page.get_by_role("slider")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.querySelector('.over')).clipPath") == "inset(0px 0px 0px 55%)"
    assert slider.get_attribute("aria-valuetext") == "55 % dense, the rest tuned"
    assert page.evaluate("getComputedStyle(document.querySelector('.stage')).outlineStyle") == "solid"

    page.get_by_label("images a day").fill("123456")
    page.get_by_label("price of one").fill("3.5")
    load = cost.Load(images_per_day=123456, price=3.5)
    wanted = tables.cost(dataclasses.replace(gathered(POCKETVAR), load=load))[1].rows
    cells = page.locator("#cost tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.textContent))")
    assert [tuple(row) for row in cells] == [wanted[0], *wanted[1:]]
    page.get_by_label("images a day").fill("-1")
    assert page.locator("[data-cell=hours-1]").text_content() == "?"
    assert heard == []
    page.close()


def test_reading_a_comparison_of_another_model_is_refused(tmp_path):
    raw = json.loads((ROOT / "reports/cpu/pocketvar.json").read_text())
    path = tmp_path / "c.json"
    path.write_text(json.dumps(raw | {"model": "hart"}))
    with pytest.raises(ValueError, match="of hart on cpu, not of pocketvar on cpu"):
        sources.read_comparison(path, "cpu", "pocketvar")
    with pytest.raises(ValueError, match="not of pocketvar on h200"):
        sources.read_comparison(ROOT / "reports/cpu/pocketvar.json", "h200", "pocketvar")


def test_a_scale_that_is_slower_and_runs_sparse_says_why():
    p = store.load(POCKETVAR)
    slower = dataclasses.replace(p.rows[0], speedup=schema.Speedup(0.87, 0.85, 0.9, 32))
    found = dataclasses.replace(gathered(POCKETVAR), profile=dataclasses.replace(p, rows=(slower, *p.rows[1:])), demoted={})
    assert [row[6] for row in tables.speedups(found).rows] == ["sparse; ranks keys", "sparse", "sparse", ""]
    assert dict(tables.environment(found).rows)["silicon"].endswith(" threads)")
