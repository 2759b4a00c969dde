"""The report on time against PSNR: its arithmetic, on made-up numbers."""

from __future__ import annotations

import json

import pytest

from lab import fronts


@pytest.fixture
def raw() -> dict:
    def way(method: str, setting: str, ratio: float, db: float) -> dict:
        return {"method": method, "setting": setting, "ms": [1000 / ratio, 2000 / ratio], "psnr": [db + 2, db - 2]}

    both = f"{fronts.SKIP} + {fronts.ATTENTION}"
    return {
        "model": "pocketvar", "date": "2026-01-01", "machine": {"name": "a machine", "threads": 2}, "versions": {"torch": "2"},
        "pairs": [[0, 5], [1, 6]], "class_levels": [32.0, 28.0, 36.0], "wanted": {"near-lossless": 34.0, "paper": 30.0},
        "dense_ms": [1000.0, 2000.0], "load": 0.5, "processors": 2,
        "ways": [
            way(fronts.ATTENTION, "price 9", 2.0, 33.0), way(fronts.ATTENTION, "price 1", 3.0, 29.0),
            way(fronts.SKIP, "scale 12", 2.4, 30.0), way(both, "price 9", 3.5, 29.0), way(both, "price 1", 4.0, 27.0),
        ],
    }  # fmt: skip


def test_points_are_brought_to_all_classes(raw):
    """Drawn were the classes of 32 and 28 dB; that of 36 dB lifts the mean by 2."""
    found = fronts.points(raw)
    assert [(p.speedup, p.psnr) for p in found[:3]] == [(2.0, 35.0), (3.0, 31.0), (2.4, 32.0)]


def test_what_a_method_reaches_at_a_psnr(raw):
    found = fronts.points(raw)
    assert fronts.reached(found, fronts.ATTENTION, 34.0) == pytest.approx(2.25)
    assert fronts.reached(found, fronts.ATTENTION, 30.0) == 3.0 and fronts.reached(found, fronts.SKIP, 34.0) is None
    text = fronts.markdown(raw, "plot.svg")
    assert not fronts.is_open(found, fronts.ATTENTION, 32.0) and not fronts.is_open(found, fronts.SKIP, 30.0)
    assert "- near-lossless: no two together are so close. The best alone is sparse attention, 2.25x." in text
    both = f"{fronts.SKIP} + {fronts.ATTENTION}"
    said = "reaches 3.75x. The best alone is sparse attention, 3.00x. Ratio: 1.25, of what was drawn: sparse attention may"
    assert f"- paper: {both} {said}" in text


def test_report_and_plot_come_out_of_the_raw_numbers(raw, tmp_path):
    pytest.importorskip("matplotlib")
    source, out = tmp_path / "raw.json", tmp_path / "report.md"
    source.write_text(json.dumps(raw))
    assert fronts.main(["--from", str(source), "--out", str(out)]) == 0
    first = out.with_suffix(".svg").read_bytes()
    assert fronts.main(["--from", str(source), "--out", str(out)]) == 0 and out.with_suffix(".svg").read_bytes() == first
    assert b"near-lossless" in first and out.read_text() == fronts.markdown(raw, "report.svg")
    assert fronts.main(["--pairs", "0"]) == 2


def test_a_certificate_is_by_the_bound(raw):
    """Of pairs that chose nothing, every class twice: the fastest that was drawn and whose bound holds, and nothing between."""
    raw |= {"pairs": [[c, i] for c in range(3) for i in range(2)], "held_out": True, "dense_ms": [1000.0] * 6}
    for way, ratio, spread in zip(raw["ways"], (2.0, 3.0, 2.4, 2.5, 4.0), (0.1, 0.1, 0.1, 3.0, 0.1), strict=True):
        base = 35.0 if ratio < 4 else 33.0
        way |= {"ms": [1000 / ratio] * 6, "psnr": [base + c + d for c in (-4, 0, 4) for d in (-spread, spread)]}
    found = fronts.points(raw)
    assert found[0].psnr == pytest.approx(35.0) and 34.6 < found[0].bound < 35.0 and found[3].bound < 34.0
    both = f"{fronts.SKIP} + {fronts.ATTENTION}"
    assert [fronts.certified(found, m, 34.0) for m in (fronts.ATTENTION, fronts.SKIP, both)] == [3.0, 2.4, None]
    assert f"- paper: {both} reaches 4.00x. The best alone is sparse attention, 3.00x. Ratio: 1.33" in fronts.markdown(
        raw, "plot.svg"
    )
