"""The command `explain`: what would run on this machine, and why."""

from __future__ import annotations

from sparvar_tune.cli.console import say
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import Asked, print_answer
from sparvar_tune.cli.options import ExplainOptions
from sparvar_tune.runtime.explain import explained


def run(options: ExplainOptions) -> ExitCode:
    found = explained(options.subject.load(options.profile))
    if options.json:
        print_answer("explain", ExitCode.DONE, Asked.of(options.subject), found)
    else:
        say(found.words)
    return ExitCode.DONE
