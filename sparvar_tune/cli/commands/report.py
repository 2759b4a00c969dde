"""The command `report`: one page about a profile, or its Markdown twin."""

from __future__ import annotations

from sparvar_tune.cli.console import say, status
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.options import ReportOptions
from sparvar_tune.profile.store import require_writable, write_atomic
from sparvar_tune.report.make import make


def run(options: ReportOptions) -> ExitCode:
    require_writable(options.out)
    data = make(options.request, status).encode()
    write_atomic(options.out, data)
    say(f"wrote {options.out} ({len(data) / 1e6:.2f} MB)" if len(data) >= 10_000 else f"wrote {options.out}")
    return ExitCode.DONE
