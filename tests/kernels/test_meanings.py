"""A planner that comes to choose or order keys otherwise must raise its meaning: held by digests of lists and tables."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from places import TESTS

sys.path.insert(0, str(TESTS / "golden"))
import meanings  # isort: skip

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def changed() -> list[str]:
    """What is not as recorded, with what to do."""
    recorded, now = json.loads(meanings.FILE.read_text()), meanings.measured()
    out = []
    for kind, row in now.items():
        before = recorded.get(kind)
        if before is None or row["meaning"] != before["meaning"]:
            out.append(f"{kind}: meaning {row['meaning']} is not recorded: run python tests/golden/meanings.py")
        elif row["digests"] != before["digests"]:
            where = [name for name, d in row["digests"].items() if before["digests"].get(name) != d]
            out.append(f"{kind}: other lists at {', '.join(where)}: raise its meaning, then run python tests/golden/meanings.py")
    return out


@needs_triton
def test_what_a_meaning_stands_for_is_as_recorded():
    assert changed() == []


@needs_triton
@pytest.mark.parametrize("kind", ["csla", "cs4a", "pooled", "triton"])
def test_another_order_of_keys_is_noticed(kind, monkeypatch):
    """The planner's keys back to front, its lists otherwise the same: which profiles then mean something else is said."""
    from sparvar_kernels.backends.triton import work
    from sparvar_kernels.variants.cs4a import planner as cs4a
    from sparvar_kernels.variants.csla import planner as csla

    if kind == "csla":
        real = csla.csla_lists

        def backwards(*arguments):
            lists = real(*arguments)
            keys = lists.keys.clone()
            keys[..., :2] = keys[..., :2].flip(-1)
            return type(lists)(lists.tiles, keys, lists.counts)

        monkeypatch.setattr(csla, "csla_lists", backwards)
    elif kind == "cs4a":
        real = cs4a.expand
        monkeypatch.setattr(cs4a, "expand", lambda *arguments: real(*arguments).flip(-1))
    elif kind == "pooled":
        real = meanings.pool_keys
        monkeypatch.setattr(meanings, "pool_keys", lambda *arguments: tuple(t.flip(2) for t in real(*arguments)))
    else:
        real = work.work_table
        monkeypatch.setattr(work, "work_table", lambda *arguments: torch.flip(real(*arguments), [0]))
    work.shared_stage.cache_clear()
    said = changed()
    work.shared_stage.cache_clear()
    assert any(line.startswith(f"{kind}: other lists") and "raise its meaning" in line for line in said), said


@needs_triton
def test_a_raised_meaning_must_be_recorded(monkeypatch):
    from sparvar_kernels.variants import Csla

    monkeypatch.setattr(Csla, "meaning", Csla.meaning + 1)
    assert [line for line in changed() if line.startswith("csla: meaning")]
