"""The command `compare`: dense, the paper's fixed setting and every tuned profile in one table, interleaved in one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparvar_tune.catalog.names import PRESETS
from sparvar_tune.cli.compare_table import WayResult, comparison, results
from sparvar_tune.cli.console import note, require_here, say, status
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import Asked, print_answer
from sparvar_tune.cli.options import CompareOptions
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.measure.pairs import held_out_pairs
from sparvar_tune.policy_search.certify import run_pairs
from sparvar_tune.policy_search.judge import make_attention
from sparvar_tune.policy_search.menu import PAPER_SCALES, paper_policy
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import silicon, versions
from sparvar_tune.profile.schema import Silicon, Versions, Yardstick
from sparvar_tune.ways.settings import loaded


@dataclass(frozen=True)
class LeftOut:
    """A quality without a profile here, and why."""

    quality: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class CompareAnswer:
    """pairs: how many held-out (class, seed) pairs. ways: in the table's order. written: the files of `--out`."""

    machine: Silicon
    versions: Versions
    dense_name: str
    pairs: int
    ways: tuple[WayResult, ...]
    left_out: tuple[LeftOut, ...]
    yardsticks: tuple[Yardstick, ...]
    written: tuple[str, ...]


def run(options: CompareOptions) -> ExitCode:
    subject, model = options.subject, options.subject.model
    speak = note if options.json else say
    require_here("compare", subject)
    written = (options.out, options.out.with_suffix(".json")) if options.out else ()
    store.require_writable(*written)
    adapter = subject.adapter
    ways: dict[str, Any] = {"dense": adapter.dense}
    if (scales := len(adapter.schedule)) >= PAPER_SCALES:
        ways["paper's fixed setting"] = make_attention(adapter, paper_policy(adapter.schedule, model.layers, model.heads))
    else:
        speak(f"left out the paper's fixed setting: {model.slug} has {scales} scales, it needs {PAPER_SCALES} at least")
    left_out = []
    for quality in PRESETS:
        tuned = subject.load(quality=quality)
        if tuned.profile is None:
            left_out.append(LeftOut(quality, tuned.reasons))
            speak(f"left out {quality}: {'; '.join(tuned.reasons)}")
        else:
            ways[f"tuned, {quality}"] = tuned.sparse_attention()
    more = loaded(options.metric_weights)
    if reason := Constraint({}, more).why_not(options.pairs, adapter.num_classes, getattr(adapter, "prompts", ())):
        raise ValueError(reason)
    pairs = held_out_pairs(adapter.num_classes, options.pairs)
    outcomes = run_pairs(adapter, ways, pairs, status, more)
    machine, now = silicon(subject.gpu, True), versions()
    text, raw = comparison(outcomes, pairs, adapter, more, machine, now)
    if not options.json:
        say(text)
    for path, data in zip(written, (text, raw), strict=False):
        store.write_atomic(path, data.encode())
    if written:
        speak(f"wrote {written[0]} and {written[1]}")
    if options.json:
        print_answer("compare", ExitCode.DONE, Asked.of(subject), CompareAnswer(
            machine, now, adapter.dense_name, len(pairs), results(outcomes, pairs, adapter, more), tuple(left_out),
            tuple(Yardstick(*row) for row in adapter.yardsticks()), tuple(map(str, written)),
        ))  # fmt: skip
    return ExitCode.DONE
