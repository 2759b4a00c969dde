"""How commands speak: answers on stdout, as words or as one JSON object; how far a run is on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from sparvar_tune.profile import schema
from sparvar_tune.profile.describe import describe, describe_evidence
from sparvar_tune.ways.subject import Subject

Say = Callable[[str], None]
EVERY_S = 30.0  # between two lines of a run that nobody watches: a log of minutes, not of thousands of lines


class Progress:
    """How far a run is, on stderr: on a terminal a line that the next one overwrites, else a line every `EVERY_S` seconds.

    A text that counts, "compiling: 3/40", gets what is left by the pace so far, unless it says so itself.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self.clock = stream, clock
        self.task, self.begun, self.first = "", clock(), 0
        self.said = self.begun

    @property
    def stream(self) -> TextIO:
        return self._stream or sys.stderr

    def __call__(self, text: str) -> None:
        text = " ".join((text + self._left(text)).split())
        if self.stream.isatty():
            print(f"\r\033[K{text[:150]}", end="", file=self.stream, flush=True)
        elif self.clock() - self.said >= EVERY_S:
            self.said = self.clock()
            print(text[:150], file=self.stream, flush=True)

    def clear(self) -> None:
        """Makes room for a line that stays."""
        if self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)

    def _left(self, text: str) -> str:
        """ ", 40 s left" by the pace since this task's first text, or nothing where the text says it or does not count."""
        count = re.search(r"(\d+)/(\d+)", text)
        if count is None or " left" in text:
            return ""
        done, total, task = int(count[1]), int(count[2]), re.sub(r"\d+", "", text[: count.start()])
        if task != self.task or done <= self.first:
            self.task, self.begun, self.first = task, self.clock(), done
            return ""
        return f", {(self.clock() - self.begun) / (done - self.first) * (total - done):.0f} s left"


status = Progress()


def say(text: str) -> None:
    """A line for people."""
    status.clear()
    print(text, flush=True)


def note(text: str) -> None:
    """A line beside the answer: on stderr, where `--json` sends what is said on the way."""
    status.clear()
    print(text, file=sys.stderr, flush=True)


def require_here(command: str, subject: Subject) -> None:
    """Raises ValueError unless this machine would run on its GPU: nothing runs elsewhere than asked."""
    if not subject.is_here:
        raise ValueError(f"{command}: {subject.gpu.slug} is not in this machine; run it where it is, or leave out --gpu")


def print_profile(profile: schema.Profile, path: Path) -> None:
    w, e, g = profile.workload, profile.evidence, profile.generation
    say(f"{path}")
    say(f"  {w.model} {w.resolution} ({w.aspect}), batch {w.batch}, {profile.preset}, on {profile.silicon.name}: "
         f"{profile.state}, policy {profile.policy_state}")  # fmt: skip
    say(f"  policy: {describe(profile.policy)}")
    if e is not None:
        say(f"  pictures: {describe_evidence(e)}")
        for y in e.yardsticks:
            say(f"  yardstick: {y.name}: {y.psnr_db:.2f} dB, SSIM {y.ssim:.4f}")
    if g is not None:
        say(f"  whole picture: {g.dense.p50_ms:.0f} -> {g.tuned.p50_ms:.0f} ms, {g.speedup.median:.2f}x "
             f"(95 % interval {g.speedup.low:.2f}..{g.speedup.high:.2f}, n={g.speedup.n}) against {g.dense_name}")  # fmt: skip
    for row in profile.rows:
        config = ", ".join(f"{k}={v}" for k, v in row.config)
        if row.tuned and row.dense and row.speedup:
            cost = f"{row.dense.p50_ms:.2f} -> {row.tuned.p50_ms:.2f} ms a layer, {row.speedup.median:.2f}x"
        else:
            cost = f"{row.dense_predicted_ms:.3f} -> {row.tuned_predicted_ms:.3f} ms a layer, predicted"
        say(f"  scale {row.scale_index}: {cost} ({row.kernel}: {config})")
    for line in profile.notes:
        say(f"  note: {line}")
