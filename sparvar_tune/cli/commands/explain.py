"""The command `explain`: what would run on this machine, and why."""

from __future__ import annotations

from sparvar_tune.cli.console import say
from sparvar_tune.cli.options import ExplainOptions


def run(options: ExplainOptions) -> int:
    say(options.subject.load(options.profile).explain())
    return 0
