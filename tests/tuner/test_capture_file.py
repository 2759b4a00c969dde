"""A capture in a file: what attention was given, bit for bit, whole or not there, and refused where there is no room."""

from __future__ import annotations

import json
import struct
from collections import namedtuple

import lookalikes
import pytest
import tiny
import torch
from live_images import generate_of
from safetensors.torch import load_file

import sparvar_tune
from sparvar_tune.adapters import load_adapter
from sparvar_tune.catalog.models import find_model
from sparvar_tune.cli import parser
from sparvar_tune.live import LiveModel
from sparvar_tune.measure import capture_file
from sparvar_tune.measure.capture_file import CaptureFile, CaptureWriter, capture_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_file_holds_what_attention_was_given(tmp_path, dtype):
    driven = lookalikes.Infinity(dtype)
    adapter, path = LiveModel(driven.model, generate_of(driven), [0, 1]), tmp_path / "c.safetensors"
    kept = sparvar_tune.capture(adapter, (1, 3), scales=(3, 5))
    found = sparvar_tune.capture(adapter, (1, 3), scales=(3, 5), out=path)
    assert set(found) == set(kept) and len(found) == 8
    for at, call in kept.items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[at], call, strict=True))
    size = capture_bytes(adapter.model, adapter.schedule, (3, 5))
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size == size + 8 + header
    assert sum(t.numel() * t.element_size() for t in load_file(path).values()) == size, "any reader of safetensors reads it"
    about = CaptureFile(path).about
    assert about["weights_sha256"] == adapter.weights_sha256 and json.loads(about["grids"])[5] == [8, 8] and about["seed"] == "3"
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(KeyError):
        found[0, 4]


def test_a_capture_that_fails_leaves_the_old_file(home, tmp_path, monkeypatch):
    tiny.install(monkeypatch.setattr)
    adapter, path = load_adapter(find_model("pocketvar"), "cpu"), tmp_path / "c.safetensors"
    path.write_text("old")
    given = path, adapter.dense, adapter.model, adapter.schedule, (5,)
    with (
        pytest.raises(ValueError, match="ended without"),
        CaptureWriter(*given),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), CaptureWriter(*given):
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match="came twice"),
        CaptureWriter(*given) as writer,
    ):
        for _ in range(2):
            adapter.finish(adapter.start((0, 1), 5), writer)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir() if p != home] == ["c.safetensors"]
    with pytest.raises(ValueError, match="no capture"):
        CaptureFile(path)


def test_the_command_says_how_large_and_refuses_what_does_not_fit(home, tmp_path, monkeypatch, capsys):
    tiny.install(monkeypatch.setattr)
    path = tmp_path / "c.safetensors"
    words = ["capture", "--gpu", "cpu", "--model", "pocketvar", "--class", "cat", "--scales", "5", "6", "--out", str(path)]
    assert parser.main([*words, "--dry-run"]) == 0 and not path.exists()
    assert "4 calls, 0.001 GB" in capsys.readouterr().out
    assert parser.main(words) == 0 and len(CaptureFile(path)) == 4
    path.unlink()
    assert parser.main([*words, "--dry-run", "--out", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(capture_file.shutil, "disk_usage", lambda folder: usage(capture_file.SPARE))
    cases = {"0.00 GB, ": [], "want some of 0..6": ["--scales", "7"], "no such": ["--out", "no/where"]}
    for said, more in cases.items():
        wrong = [*words, *more]
        assert parser.main(wrong) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not path.exists()
