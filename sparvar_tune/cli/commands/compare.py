"""The command `compare`: dense, the paper's fixed setting and every tuned profile in one table, interleaved in one run."""

from __future__ import annotations

from typing import Any

from sparvar_tune.catalog.names import PRESETS
from sparvar_tune.cli.compare_table import comparison
from sparvar_tune.cli.console import require_here, say, status
from sparvar_tune.cli.options import CompareOptions
from sparvar_tune.measure.lpips import Lpips
from sparvar_tune.measure.pairs import held_out_pairs
from sparvar_tune.policy_search.certify import run_pairs
from sparvar_tune.policy_search.judge import make_attention
from sparvar_tune.policy_search.menu import PAPER_SCALES, paper_policy
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import silicon, versions


def run(options: CompareOptions) -> int:
    subject, model = options.subject, options.subject.model
    require_here("compare", subject)
    adapter = subject.adapter
    ways: dict[str, Any] = {"dense": adapter.dense}
    if (scales := len(adapter.schedule)) >= PAPER_SCALES:
        ways["paper's fixed setting"] = make_attention(adapter, paper_policy(adapter.schedule, model.layers, model.heads))
    else:
        say(f"left out the paper's fixed setting: {model.slug} has {scales} scales, it needs {PAPER_SCALES} at least")
    for quality in PRESETS:
        tuned = subject.load(quality=quality)
        if tuned.profile is None:
            say(f"left out {quality}: {'; '.join(tuned.reasons)}")
        else:
            ways[f"tuned, {quality}"] = tuned.sparse_attention()
    more = (Lpips(options.lpips).metric(),) if options.lpips else ()
    pairs = held_out_pairs(adapter.num_classes, options.pairs)
    outcomes = run_pairs(adapter, ways, pairs, status, more)
    text, raw = comparison(outcomes, pairs, adapter, more, silicon(subject.gpu, True), versions())
    say(text)
    if options.out:
        store.write_atomic(options.out, text.encode())
        store.write_atomic(options.out.with_suffix(".json"), raw.encode())
        say(f"wrote {options.out} and {options.out.with_suffix('.json')}")
    return 0
