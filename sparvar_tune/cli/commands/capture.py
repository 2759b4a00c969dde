"""The command `capture`: q, k and v of one dense picture, in a safetensors file."""

from __future__ import annotations

from sparvar_tune.cli.commands.generate import class_index
from sparvar_tune.cli.console import require_here, say
from sparvar_tune.cli.options import CaptureOptions
from sparvar_tune.measure.capture_file import capture_bytes, why_not_room
from sparvar_tune.profile.store import require_writable
from sparvar_tune.ways.api import capture


def run(options: CaptureOptions) -> int:
    subject, out = options.subject, options.out
    require_here("capture", subject)
    schedule = subject.model.schedule(subject.resolution, subject.aspect)
    last = len(schedule) - 1
    scales = sorted(set(options.scales)) or [last - 1, last]
    if not 0 <= scales[0] <= scales[-1] <= last:
        raise ValueError(f"--scales: got {', '.join(map(str, scales))}, want some of 0..{last}")
    size = capture_bytes(subject.model, schedule, scales)
    calls = subject.model.layers * len(scales)
    say(f"{subject.model.slug}, scales {', '.join(map(str, scales))}: {calls} calls, {size / 1e9:.3f} GB")
    reason = why_not_room(out, size)
    if reason:
        raise ValueError(reason)
    require_writable(out)
    if not options.dry_run:
        adapter = subject.adapter
        capture(adapter, (class_index(options.label, adapter), options.seed), scales=scales, out=out)
        say(f"wrote {out}; read it with sparvar_tune.measure.capture_file.CaptureFile")
    return 0
