"""Memory kept for the next tensor: by the page faults of a process, which do not depend on how busy the machine is."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch, sparvar_tune
sizes = (200 << 20, 3 << 20, 40 << 20)  # bytes: caches of a picture and the temporaries between them
kept = sparvar_tune.keep_memory() if sys.argv[1] == "kept" else False
def draw():
    held = torch.ones(sizes[0] // 4)
    for size in sizes[1:] * 3:
        torch.ones(size // 4).mul_(2)
    return held.sum()
for _ in range(4):  # where each lies settles
    draw()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
draw()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[str, int]:
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_there_for_the_next_picture():
    kept, few = faults("kept")
    assert kept == "True" and few < 1000  # 250 MB are 60,000 pages of 4 KiB
    assert few < faults("not")[1] / 4  # huge pages, where the system gives them, leave 120


def test_another_c_library_is_left_alone(monkeypatch):
    from sparvar_tune.runtime import kept_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(kept_memory.ctypes, "CDLL", lambda *_: pytest.fail("asked for"))
    assert kept_memory.keep_memory() is False


def test_the_command_line_keeps_memory_for_pictures_on_a_cpu_alone(monkeypatch, capsys):
    import sparvar_tune.runtime
    from sparvar_tune.cli import parser

    asked: list[str] = []
    monkeypatch.setattr(sparvar_tune.runtime, "keep_memory", lambda: asked.append("kept"))
    for gpu, ours, times in (("cpu", True, 1), ("cpu", False, 1), ("a100", True, 1)):
        words = ["explain", "--gpu", gpu, "--model", "pocketvar" if gpu == "cpu" else "hart"]
        assert parser._run(words, ours=ours) == 0 and len(asked) == times
    capsys.readouterr()
