"""The command `doctor`: what this machine can do, what is missing, and the command that mends what is wrong."""

from __future__ import annotations

from dataclasses import asdict

from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import print_answer
from sparvar_tune.cli.machine_checks import WRONG, look
from sparvar_tune.cli.options import DoctorOptions


def run(options: DoctorOptions) -> ExitCode:
    found = []
    for seen in look():
        found.append(seen)
        if not options.json:
            print(seen.words, flush=True)
    code = ExitCode.FAILED if any(seen.state == WRONG for seen in found) else ExitCode.DONE
    if options.json:
        print_answer("doctor", code, {"seen": [asdict(seen) for seen in found]})
    return code
