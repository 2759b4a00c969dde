"""The command `show`: a profile in words, the tables of GPUs and models, the trials of a search as CSV."""

from __future__ import annotations

from sparvar_tune.catalog import gpus, models
from sparvar_tune.cli.console import print_profile, say
from sparvar_tune.cli.options import ShowOptions
from sparvar_tune.profile import store


def run(options: ShowOptions) -> int:
    if options.gpus or options.models:
        _show_tables(options)
    elif options.trials:
        from sparvar_tune.ways.trials import trials_of

        assert options.subject
        say(trials_of(options.subject, options.storage).to_csv(index=False, float_format="%.5g").rstrip())
    elif options.profile:
        if options.seal:
            store.seal(options.profile)
            say(f"{options.profile}: sealed: it has the checksum of what it now says, for which nobody measured anything")
        print_profile(store.load(options.profile), options.profile)
    else:
        subject = options.subject
        assert subject
        tuned = subject.load()
        if tuned.profile is None or tuned.path is None:
            todo = f"run sparvar-tune --gpu {subject.gpu.slug} --model {subject.model.slug}"
            raise ValueError(f"nothing to show: {'; '.join(tuned.reasons)}; {todo}")
        print_profile(tuned.profile, tuned.path)
    return 0


def _show_tables(options: ShowOptions) -> None:
    if options.gpus:
        for gpu in gpus.GPUS.values():
            rates = "measured, not predicted"
            if gpu.sms:
                rates = f"{gpu.sms} SMs, {gpu.memory_gbps:g} GB/s, {gpu.bf16_tflops:g} TFLOP/s bf16"
            say(f"{gpu.slug:12} {gpu.name:28} {rates}")
    if options.models:
        for model in models.MODELS.values():
            sizes = ", ".join(f"{r} ({len(a)} aspects)" for r, a in model.resolutions.items())
            say(f"{model.slug:14} {model.layers} layers, {model.heads} x {model.head_dim} heads, {model.dtype}; {sizes}")
