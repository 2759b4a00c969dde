"""The command `check-adapter`: every promise of an adapter tried, a line each."""

from __future__ import annotations

from sparvar_tune.adapters import ADAPTERS, load_adapter
from sparvar_tune.adapters.opening import make
from sparvar_tune.catalog.models import find_model
from sparvar_tune.cli.console import say
from sparvar_tune.cli.options import CheckAdapterOptions
from sparvar_tune.ways.check_adapter import check_adapter


def run(options: CheckAdapterOptions) -> int:
    failed, count, name, device = 0, 0, options.model, options.device
    for check in check_adapter(load_adapter(find_model(name), device) if name in ADAPTERS else make(name, device)):
        count += 1
        failed += check.reason is not None
        text = check.reason or check.note
        say(f"{'FAIL' if check.reason else 'ok  '} {check.name}{f': {text}' if text else ''}")
    say(f"{failed} of {count} checks failed" if failed else f"all {count} checks hold: sparvar-tune --model {name}")
    return 1 if failed else 0
