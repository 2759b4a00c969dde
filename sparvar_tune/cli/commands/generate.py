"""The command `generate`: one picture dense and tuned from the same noise, side by side, as a PNG."""

from __future__ import annotations

import torch

from sparvar_tune.adapters import Adapter
from sparvar_tune.catalog.metrics import METRICS
from sparvar_tune.cli.console import require_here, say
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.options import GenerateOptions
from sparvar_tune.cli.picture_sheet import save_png, side_by_side
from sparvar_tune.measure.fidelity import compare_pictures
from sparvar_tune.measure.timing import Stopwatch
from sparvar_tune.policy_search.judge import first_touched
from sparvar_tune.profile.store import require_writable


def run(options: GenerateOptions) -> ExitCode:
    subject, seed = options.subject, options.seed
    require_here("generate", subject)
    require_writable(options.out)
    adapter = subject.adapter
    label = class_index(options.label, adapter)
    tuned = subject.load(options.profile)
    attend = tuned.sparse_attention() if tuned.profile else adapter.dense
    if tuned.profile is None:
        say(f"no profile: {'; '.join(tuned.reasons)}; both pictures are dense (tune first)")
    stopwatch, pictures, times = Stopwatch(adapter.device), {}, {}
    adapter.finish(adapter.start((label, seed), first_touched(adapter)), adapter.dense)  # warm-up
    for name, way in (("dense", adapter.dense), ("tuned", attend)):
        made: list[torch.Tensor] = []
        times[name] = stopwatch(lambda: made.append(adapter.finish(adapter.start((label, seed), 0), way)))  # noqa: B023
        pictures[name] = made[0]
    found = compare_pictures(pictures["tuned"], pictures["dense"])
    close = ", ".join(f"{m.title} {m.say(found[m.name])}" for m in (METRICS["psnr"], METRICS["ssim"]))  # room for two
    difference = (pictures["tuned"] - pictures["dense"]).abs() * 8
    ratio = times["dense"] / times["tuned"]
    image = side_by_side([
        (pictures["dense"][0], f"dense: {times['dense'] / 1e3:.2f} s", f"{adapter.classes()[label]}, seed {seed}"),
        (pictures["tuned"][0], f"tuned: {times['tuned'] / 1e3:.2f} s, {ratio:.2f}x",
         f"{close} against dense, same noise"),
        (difference[0], "difference x 8", "black: identical"),
    ])  # fmt: skip
    save_png(image, options.out)
    say(f"dense {times['dense'] / 1e3:.2f} s, tuned {times['tuned'] / 1e3:.2f} s ({ratio:.2f}x, one run each); "
        f"{close}; wrote {options.out}")  # fmt: skip
    return ExitCode.DONE


def class_index(text: str | None, adapter: Adapter) -> int:
    """A class by its name or number, the first for None; raises ValueError for one the model does not have."""
    names = list(adapter.classes())
    if text is None:
        return 0
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(names):
        return int(text)
    raise ValueError(f"--class {text[:40]!r}: want 0..{len(names) - 1} or one of {', '.join(names[:32])}")
