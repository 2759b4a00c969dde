"""The command `check-adapter`: every promise of an adapter tried, a line each."""

from __future__ import annotations

from sparvar_tune.adapters.opening import make
from sparvar_tune.cli.console import say
from sparvar_tune.cli.options import CheckAdapterOptions
from sparvar_tune.ways.check_adapter import check_adapter


def run(options: CheckAdapterOptions) -> int:
    failed, count = 0, 0
    for check in check_adapter(make(options.model, options.device)):
        count += 1
        failed += check.reason is not None
        text = check.reason or check.note
        say(f"{'FAIL' if check.reason else 'ok  '} {check.name}{f': {text}' if text else ''}")
    say(f"{failed} of {count} checks failed" if failed else f"all {count} checks hold: sparvar-tune --model {options.model}")
    return 1 if failed else 0
