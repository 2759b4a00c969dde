"""How commands speak: lines on stdout, a status line that the next one overwrites on stderr, a profile in words."""

from __future__ import annotations

import sys
from pathlib import Path

from sparvar_tune.profile import schema
from sparvar_tune.profile.describe import describe, describe_evidence
from sparvar_tune.ways.subject import Subject


def status(text: str) -> None:
    """A line that the next one overwrites; silent when nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text, flush=True)


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
    for note in profile.notes:
        say(f"  note: {note}")
