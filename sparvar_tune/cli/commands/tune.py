"""The command `tune`: says the way there is and goes it; `--from-misses` for everything that was asked for in vain."""

from __future__ import annotations

from sparvar_tune.cli.console import print_profile, say, status
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.options import TuneOptions
from sparvar_tune.profile import misses
from sparvar_tune.profile.machine import choose_gpu
from sparvar_tune.profile.schema import one_line
from sparvar_tune.ways.choose_way import choose_way
from sparvar_tune.ways.search_here import NothingMeetsTheBound
from sparvar_tune.ways.settings import Settings
from sparvar_tune.ways.subject import Subject


def run(options: TuneOptions) -> ExitCode:
    if options.subject is None:
        return _tune_misses(options)
    try:
        _tune(options.subject, options.settings, options.dry_run)
    except NothingMeetsTheBound as error:
        if options.settings.bounds:  # what was asked for by number and cannot be had is an error
            raise
        say(f"\n{options.subject.model.slug} gets no profile of this machine's own: {error}")
        say(f"what runs here is then:\n{options.subject.load().explain()}")
    return ExitCode.DONE


def _tune(subject: Subject, settings: Settings, dry_run: bool) -> None:
    way = choose_way(subject, settings)
    if dry_run:
        way.plan(say)
        return
    profile = way.run(say, status)
    say("")
    print_profile(profile, way.out)
    way.afterwards(say)


def _tune_misses(options: TuneOptions) -> ExitCode:
    """Every recorded miss of this GPU in turn; one that fails stays on the list and does not keep the others waiting."""
    gpu = choose_gpu(options.gpu)
    wanted = [m for m in misses.read() if m.gpu == gpu.slug]
    say(f"{len(wanted)} recorded misses of {gpu.slug} in {misses.file()}")
    failed = 0
    for i, m in enumerate(wanted):
        say(f"\nmiss {i + 1}/{len(wanted)}: {m.model} {m.resolution} ({m.aspect}), {m.preset}, images: {m.images}")
        try:
            subject = Subject.of(m.model, m.gpu, m.preset, m.resolution, m.aspect, m.images)
            _tune(subject, options.settings, options.dry_run)
            if not options.dry_run:
                misses.forget(m)
        except ValueError as error:  # NothingMeetsTheBound and ProfileError among them
            failed += 1
            say(f"not tuned: {one_line(str(error))}")
    return ExitCode.FAILED if failed else ExitCode.DONE
