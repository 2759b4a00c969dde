"""The command `bench`: whether a profile became worse on this machine or in this version, against a baseline file."""

from __future__ import annotations

from dataclasses import asdict

from sparvar_tune.cli.console import note, say, status
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import Asked, print_answer
from sparvar_tune.cli.options import BenchOptions
from sparvar_tune.profile.schema import ProfileError
from sparvar_tune.profile.store import require_writable
from sparvar_tune.regression import baseline
from sparvar_tune.regression.profile_facts import measure


def run(options: BenchOptions) -> ExitCode:
    subject, path = options.subject, options.baseline
    tuned = subject.load(options.profile)
    if tuned.profile is None:
        raise ValueError(f"nothing to bench: {'; '.join(tuned.reasons)}")
    was = None
    if path is not None and not options.write:
        try:
            was = baseline.load(path)
        except ProfileError as error:
            raise ValueError(str(error) if path.exists() else f"{path}: no such file; --write makes it") from None
    if path is not None and options.write:
        require_writable(path)
    speak = note if options.json else say
    facts = measure(tuned.profile, subject.gpu, status)
    for fact in facts:
        speak(f"{fact.name}: {fact.words}")
    compared = baseline.compare(was.facts, facts) if was else None
    if path is not None and options.write:
        baseline.save(facts, path)
        speak(f"wrote {len(facts)} facts to {path}")
    for line in compared.lines if compared else ():
        speak(line)
    code = ExitCode.DONE if compared is None or compared.good else ExitCode.FAILED
    if options.json:
        print_answer("bench", code, Asked.of(subject), {
            "profile": str(tuned.path), "facts": [fact.plain for fact in facts], "baseline": str(path) if path else None,
            "written": options.write, "compared": asdict(compared) if compared else None,
        })  # fmt: skip
    return code
