"""The command line: words -> typed options -> a command. `sparvar-tune --gpu cpu --model pocketvar` tunes.

Every value is checked here, by the options' own rules; commands get nothing else. Nothing heavy is imported for --help.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparvar_tune import __version__
from sparvar_tune.catalog.inputs import path_of
from sparvar_tune.catalog.metrics import METRICS, WORST, find_metric
from sparvar_tune.catalog.names import DEFAULT_PRESET, PRESETS, shown, unknown_name
from sparvar_tune.cli.exit_codes import EPILOG, ExitCode
from sparvar_tune.ways.settings import BUDGET_S, COMPARE_PAIRS, MODES, PAIRS, VERIFY_BUDGET_S, VERIFY_PAIRS, seconds

if TYPE_CHECKING:
    from sparvar_tune.cli import options

COMMANDS = ("tune", "generate", "show", "explain", "verify", "compare", "capture", "trace", "report", "check", "check-adapter",
            "bench", "doctor")  # fmt: skip
GPU = "slug of the GPU table, cpu, or auto for this machine (default)"
FILE_INSTEAD = "this file instead of the one found for the machine"
DOCTOR = "say what this machine can do, what is missing and the command that mends it"
TRACERS, WAYS = ("torch", "nvtx", "proton", "nsys", "ncu"), ("tuned", "dense", "paper")


def duration(text: str) -> float:
    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def bound(way: str, after: str, text: str) -> tuple[str, float]:
    """A metric and a value of "psnr=34.5". way: "min" or "max". after: what the name may lack, such as WORST."""
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: want NAME=VALUE such as psnr=34.5") from None
    try:
        metric = find_metric(name if name.replace("-", "_").endswith(WORST) else name + after)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if (right := "min" if metric.direction == "higher" else "max") != way:
        raise argparse.ArgumentTypeError(f"{name}: {metric.direction} is closer to dense, so want --{right} {text[:40]}")
    return metric.name, number


def _bound_of(name: str, value: str) -> tuple[str, float]:
    return bound("min", "", f"{name}={value}")


def weights_of(text: str) -> tuple[str, Path]:
    """A metric and a path of "lpips=FILE"."""
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: want NAME=PATH such as lpips=alex.safetensors")
    return name, Path(path)


def whole(text: str) -> int:
    """A number of at most 19 digits; its range is the option's affair."""
    if not re.fullmatch("-?[0-9]{1,19}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: want a whole number")
    return int(text)


def path(text: str) -> Path:
    """A path; an empty one, of a variable that is not set, would be the current folder."""
    try:
        return path_of("", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: want a path") from None


class _Parser(argparse.ArgumentParser):
    """Options are written out: `--metric` would be taken for `--metric-weights`, and a new option change an old line."""

    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, **given)

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line and exit code 2, without the usage block."""
        if message.endswith("expected one argument"):
            message += '; got none, or one that begins with "-", which is written with a "=": --option=-1'
        self.exit(ExitCode.BAD_INPUT, f"sparvar-tune: {_one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="sparvar-tune", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Tunes sparse attention of next-scale image models under a picture-level fidelity bound.\n"
        "`tune` is the default command: sparvar-tune --gpu cpu --model pocketvar",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"sparvar-tune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str, model: bool = True) -> argparse.ArgumentParser:
        p: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        p.add_argument("--gpu", default="auto", help=GPU)
        p.add_argument(
            "--model",
            required=model,
            help="name of the model table, such as pocketvar; FILE.py:FUNCTION that opens "
            "one of your own; or the name of an installed package's",
        )
        p.add_argument("--quality", "--preset", dest="quality", choices=PRESETS, default=DEFAULT_PRESET,
                       help=f"how close to dense its pictures are (default {DEFAULT_PRESET})")  # fmt: skip
        p.add_argument("--resolution", help="one the model was published at (default: its largest)")
        p.add_argument("--aspect", help="height / width with three decimals, such as 1.000 (default)")
        return p

    def checkout(p: argparse.ArgumentParser) -> None:
        p.add_argument("--source", type=path, metavar="CHECKOUT", help="of the authors' code, to open the model from")
        p.add_argument("--weights", metavar="FOLDER", help="with the published weights, or random for a dry run at real shapes")
        p.add_argument("--prompts", type=path, metavar="FILE", help="what is drawn, a prompt (for VAR a class number) a line")

    def images(p: argparse.ArgumentParser) -> None:
        p.add_argument("--images", type=whole, default=1, help="how many at once the profile is for (default 1)")

    def metric_weights(p: argparse.ArgumentParser) -> None:
        needing = "; ".join(f"{m.name}: {m.wants}" for m in METRICS.values() if m.loader)
        p.add_argument("--metric-weights", type=weights_of, action="append", default=[], metavar="NAME=PATH",
                       help=f"measure this metric too, with weights of yours ({needing})")  # fmt: skip

    tune = command(
        "tune", "search a policy, certify it on held-out pictures, write the profile (the default command)", model=False
    )
    images(tune)
    checkout(tune)
    tune.add_argument("--from-misses", action="store_true", help="tune what load_profile(..., record_miss=True) did not find")
    for way, closer in (("min", "higher"), ("max", "lower")):
        names = ", ".join(m.name for m in METRICS.values() if m.direction == closer)
        for after, whose in (("", "mean"), (WORST, "worst class's mean")):
            tune.add_argument(
                f"--{way}{after.replace('_', '-')}",
                type=functools.partial(bound, way, after),
                action="append",
                default=[],
                metavar="NAME=VALUE",
                dest="bounds",
                help=f"what the confidence bound of the {whose} must reach instead of the quality's own value; of {names}",
            )
    for name in ("psnr", "ssim", "psnr-worst-class"):
        tune.add_argument(f"--min-{name}", type=functools.partial(_bound_of, name), action="append",
                          dest="bounds", metavar="VALUE", help=f"--min {name}=VALUE")  # fmt: skip
    metric_weights(tune)
    tune.add_argument(
        "--budget", type=duration, default=BUDGET_S, help=f"wall time; only the search is cut (default {BUDGET_S:g}s)"
    )
    tune.add_argument("--pairs", type=whole, default=PAIRS, help=f"held-out (class, seed) pairs (default {PAIRS})")
    tune.add_argument("--seed", type=whole, default=0, help="of the search; 0..2**31")
    tune.add_argument("--out", type=path, help="folder that gets <gpu>/<model>.json (default: this user's profiles)")
    tune.add_argument("--resume", action="store_true", help="go on after the finished trials of the last run")
    tune.add_argument("--search", action="store_true", help="search a policy here even where other silicon's can be taken over")
    tune.add_argument("--workers", type=whole, help="GPUs to time on at once (default: all that are visible and alike)")
    tune.add_argument("--mode", choices=MODES, default=MODES[0], help="how calls are launched while a GPU times them")
    tune.add_argument(
        "--merge", type=path, nargs="+", metavar="LOG", default=(), help="measurements of other runs or machines, to use as own"
    )
    tune.add_argument("--log", type=path, help="folder that gets a GPU's measurements as <gpu>/<model>.jsonl")
    tune.add_argument("--storage", metavar="URL", help="share trials with other runs: sqlite:///FILE, journal:///FILE, "
                      "postgresql://USER@HOST/NAME or mysql://USER@HOST/NAME (docs/many-machines.md)")  # fmt: skip
    tune.add_argument("--dry-run", action="store_true", help="print the space and the plan, run nothing")

    generate = command("generate", "draw one picture dense and tuned, side by side, as a PNG")
    checkout(generate)
    generate.add_argument("--class", dest="label", help="class or prompt, or its number (default: the first)")
    generate.add_argument("--seed", type=whole, default=7, help="of the noise; 0..2**62")
    generate.add_argument("--out", type=path, default=Path("sparvar.png"), help="file to write (default sparvar.png)")
    generate.add_argument("--profile", type=path, help=FILE_INSTEAD)

    show = command("show", "print a profile, or the tables with --gpus and --models", model=False)
    images(show)
    show.add_argument("--profile", type=path, help=FILE_INSTEAD)
    show.add_argument("--seal", action="store_true", help="keep a hand edit of --profile FILE: check it, rewrite its checksum")
    show.add_argument("--gpus", action="store_true", help="the table of GPUs, by the names that --gpu takes")
    show.add_argument("--models", action="store_true", help="the table of models: names, shapes, resolutions")
    show.add_argument("--trials", action="store_true", help="the trials of the last search, as CSV")
    show.add_argument("--storage", metavar="URL", help="with --trials: those of every run that shares this storage")

    explain = command("explain", "say what would run on this machine, and why")
    images(explain)
    explain.add_argument("--profile", type=path, help=FILE_INSTEAD)

    verify = command("verify", "re-time a profile on this machine and re-check its pictures; what fails runs dense from then on")
    images(verify)
    checkout(verify)
    verify.add_argument("--profile", type=path, help=FILE_INSTEAD)
    verify.add_argument("--pairs", type=whole, default=VERIFY_PAIRS,
                        help=f"pictures to draw both ways; fewer than 6 tell no gain (default {VERIFY_PAIRS})")  # fmt: skip
    verify.add_argument("--budget", type=duration, default=VERIFY_BUDGET_S,
                        help=f"wall time; rows it does not reach stay as they are (default {VERIFY_BUDGET_S:g}s)")  # fmt: skip
    verify.add_argument("--write", action="store_true", help="store the new times as this user's profile")

    compare = command("compare", "dense, the paper's fixed setting and the tuned profiles in one table, interleaved in one run")
    checkout(compare)
    compare.add_argument("--pairs", type=whole, default=COMPARE_PAIRS,
                         help=f"held-out (class, seed) pairs (default {COMPARE_PAIRS})")  # fmt: skip
    metric_weights(compare)
    compare.add_argument("--lpips", type=lambda given: ("lpips", path(given)), action="append", dest="metric_weights",
                         metavar="FILE", help="--metric-weights lpips=FILE")  # fmt: skip
    compare.add_argument("--out", type=path, help="Markdown file for the table (the raw numbers go beside it as JSON)")

    trace = command("trace", "run one annotated picture or layer: time by scale and step, and a file for a profiler's window")
    images(trace)
    trace.add_argument("--with", dest="tell", choices=TRACERS, default=TRACERS[0],
                       help="who hears of the ranges: torch.profiler (a file for Perfetto; default), NVTX, Triton's proton, or "
                       "Nsight's nsys or ncu around this command")  # fmt: skip
    trace.add_argument("--profile", type=path, help=FILE_INSTEAD)
    trace.add_argument("--way", choices=WAYS, default=WAYS[0], help="as tuned (default), dense, or the paper's fixed setting")
    trace.add_argument("--layer", type=whole, help="this layer's attention on random inputs, not a picture; models known by "
                       "their shapes alone run so anyway (layer 0)")  # fmt: skip
    trace.add_argument("--class", dest="label", help="class or prompt, or its number (default: the first)")
    trace.add_argument("--seed", type=whole, default=7, help="of the noise; 0..2**62")
    trace.add_argument("--mode", choices=MODES, default=MODES[0], help="graph: a layer captured in CUDA graphs and replayed")
    trace.add_argument("--cold", action="store_true", help="no run before it: what is planned and compiled once is in it")
    trace.add_argument("--out", type=path, default=Path("sparvar-trace"), help="folder that gets the files")

    report = command("report", "one page about a profile: front, times, heads, pictures, certificate, cost", model=False)
    images(report)
    report.add_argument("--profile", type=path, nargs="+", metavar="FILE", default=(), help="these files instead of the ones "
                        "found: the first is the report's own, the others stand beside it")  # fmt: skip
    report.add_argument("--out", type=path, help="file to write (default: report.html or report.md)")
    report.add_argument("--format", choices=("html", "md"), help="default: by the name of --out, else html; md for pull requests")
    report.add_argument("--trials", type=path, metavar="FILE", help="a search's trials.journal, or a CSV of show --trials "
                        "(default: the last search of --model here)")  # fmt: skip
    report.add_argument("--log", type=path, metavar="FILE", help="launch measurements (default: those of --model here)")
    report.add_argument("--trace", type=path, nargs="+", metavar="CSV", default=(), help="tables that sparvar-tune trace wrote")
    report.add_argument("--compare", type=path, metavar="JSON", help="raw numbers that sparvar-tune compare --out wrote")
    report.add_argument("--pictures", type=whole, default=2, help="how many to draw dense and tuned, 0..6 (default 2)")
    report.add_argument("--images-per-day", type=whole, default=100_000, help="of the cost's stated load (default 100000)")
    report.add_argument("--price", type=float, default=2.0, help="of one GPU-hour, an assumption of yours (default 2)")
    report.add_argument("--currency", default="USD", help="of the price (default USD)")

    capture = command("capture", "record q, k and v of one dense picture in a safetensors file, its size said first")
    checkout(capture)
    capture.add_argument("--class", dest="label", help="class or prompt, or its number (default: the first)")
    capture.add_argument("--seed", type=whole, default=7, help="of the noise; 0..2**62")
    capture.add_argument("--scales", type=whole, nargs="+", metavar="SCALE", help="those recorded (default: the last two)")
    capture.add_argument("--out", type=path, default=Path("capture.safetensors"), help="file to write (default "
                         "capture.safetensors)")  # fmt: skip
    capture.add_argument("--dry-run", action="store_true", help="say how large it would be, draw nothing")

    text = "check this machine: versions, silicon, every kernel against the oracle"
    check = commands.add_parser(
        "check", help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    check.add_argument("--gpu", default="auto", help=GPU)

    text = "try every promise of a model of your own that is to be tuned, a line each (docs/your-model.md)"
    own = commands.add_parser("check-adapter", help=text, description=text, epilog=EPILOG,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    own.add_argument(
        "model",
        metavar="FILE.py:FUNCTION",
        help="FUNCTION(device) returns the adapter; or the name of an entry point, pocketvar or emojivar",
    )
    own.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    bench = command("bench", "hold a profile's counts, binaries and speed-ups against a baseline file: what became worse")
    images(bench)
    bench.add_argument("--profile", type=path, help=FILE_INSTEAD)
    bench.add_argument("--baseline", type=path, metavar="FILE", help="of an earlier run; exit code 1 where something is worse")
    bench.add_argument("--write", action="store_true", help="write --baseline FILE anew; other machines' facts in it stay")

    doctor = commands.add_parser("doctor", help=DOCTOR, description=DOCTOR, epilog=EPILOG,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for p in (show, explain, verify, compare, trace, check, bench, doctor):
        p.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there (docs/json.md)")
    return top


def read_options(words: Sequence[str]) -> tuple[str, Any]:
    """The command's name and its options. Raises ValueError: an unknown name, a value out of range, options that clash."""
    w = build_parser().parse_args(words)
    from sparvar_tune.cli import options as o

    if w.command == "doctor":  # before anything that needs torch
        return w.command, o.DoctorOptions(w.json)
    from sparvar_tune.ways.subject import Subject, place_of

    if w.command == "check-adapter":
        return w.command, o.CheckAdapterOptions(w.model, w.device)
    subject = None
    if w.command == "check":
        return w.command, o.CheckOptions(w.gpu, w.json)
    if w.model is not None:
        place = place_of(getattr(w, "source", None), getattr(w, "weights", None), getattr(w, "prompts", None))
        subject = Subject.of(w.model, w.gpu, w.quality, w.resolution, w.aspect, getattr(w, "images", 1), place)
    if w.command == "tune":
        return w.command, _tune_options(w, subject)
    if w.command == "show":
        return w.command, o.ShowOptions(subject, w.profile, w.seal, w.gpus, w.models, w.trials, w.storage, w.json)
    if w.command == "report":
        return w.command, _report_options(w, subject)
    assert subject is not None  # argparse wants --model there
    if w.command == "generate":
        return w.command, o.GenerateOptions(subject, w.label, w.seed, w.out, w.profile)
    if w.command == "capture":
        return w.command, o.CaptureOptions(subject, w.label, w.seed, tuple(w.scales or ()), w.out, w.dry_run)
    if w.command == "explain":
        return w.command, o.ExplainOptions(subject, w.profile, w.json)
    if w.command == "trace":
        return w.command, o.TraceOptions(
            subject, w.model, w.profile, w.tell, w.way, w.layer, w.label, w.seed, w.mode == "graph", w.cold, w.out, w.json
        )
    if w.command == "bench":
        return w.command, o.BenchOptions(subject, w.profile, w.baseline, w.write, w.json)
    if w.command == "verify":
        return w.command, o.VerifyOptions(subject, w.profile, w.pairs, w.budget, w.write, w.json)
    return w.command, o.CompareOptions(subject, w.pairs, dict(w.metric_weights), w.out, w.json)


def _tune_options(w: argparse.Namespace, subject: Any) -> options.TuneOptions:
    from sparvar_tune.cli.options import TuneOptions
    from sparvar_tune.ways.settings import Settings

    if w.from_misses and subject:
        raise ValueError("--from-misses: tunes every recorded model; leave out --model")
    if not w.from_misses and not subject:
        raise ValueError("tune: want --model M (sparvar-tune show --models lists them) or --from-misses")
    bounds = dict(w.bounds)
    if len(bounds) < len(w.bounds):
        raise ValueError(f"--min: got {', '.join(name for name, _ in w.bounds)}, want each metric once")
    settings = Settings(
        bounds,
        w.budget,
        w.pairs,
        w.seed,
        w.out,
        w.resume,
        w.search,
        w.workers,
        w.mode,
        tuple(w.merge),
        w.log,
        w.storage,
        dict(w.metric_weights),
    )
    return TuneOptions(subject, w.gpu, settings, w.dry_run)


def _report_options(w: argparse.Namespace, subject: Any) -> options.ReportOptions:
    from sparvar_tune.cli.options import ReportOptions
    from sparvar_tune.report.cost import Load
    from sparvar_tune.report.make import ReportRequest, format_for

    form = format_for(w.out, w.format)
    request = ReportRequest(
        subject, tuple(w.profile), form, w.trials, w.log, tuple(w.trace), w.compare, w.pictures,
        Load(w.images_per_day, w.price, w.currency),
    )  # fmt: skip
    return ReportOptions(request, w.out or Path(f"report.{form}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, one of `ExitCode`."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next; it runs nothing
        from sparvar_tune.cli.completion import complete

        complete()
    for name in ("stdout", "stderr"):  # closed, as by `>&-`: nobody reads what is said
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if argv is None:  # the process is ours
        warnings.showwarning = _say_warning
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home that it cannot write in it speaks at length
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its number: work done stays done
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(list(sys.argv[1:] if argv is None else argv), ours=argv is None)
    finally:
        _let_go()


def _read(words: list[str]) -> tuple[Callable[[Any], int], Any]:
    """What runs a command, and with what. Raises what `read_options` does."""
    try:
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            raise unknown_name("command", words[0], COMMANDS)
        if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
            words.insert(0, "tune")
        command, options = read_options(words)
    finally:
        sys.stdout.flush()  # help, to a pipe that may be closed
    return importlib.import_module(f"sparvar_tune.cli.commands.{command.replace('-', '_')}").run, options


@contextlib.contextmanager
def _interrupts_end_it() -> Iterator[None]:
    """While modules are imported Ctrl-C ends the process itself: an exception within the C++ of PyTorch or numpy aborts it, or is
    lost and the command goes on."""

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"\nsparvar-tune: interrupted\n")
        os._exit(ExitCode.INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as for a job in the background, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(words: list[str], ours: bool = False) -> int:
    """As `main`, for the words of a command. ours: the process runs nothing else."""
    try:
        with _interrupts_end_it() if ours else contextlib.nullcontext():
            run, options = _read(words)
        subject = getattr(options, "subject", None)
        if ours and subject is not None and subject.gpu.device == "cpu":
            from sparvar_tune.runtime import keep_memory

            keep_memory()
        return run(options)
    except KeyboardInterrupt:
        kept = "; finished trials are kept, --resume goes on" if words[0] == "tune" else ""
        _complain(f"\nsparvar-tune: interrupted{kept}")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        return ExitCode.FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"sparvar-tune: {_one_line(f'{where}{error.strerror or error}')}")
        return ExitCode.BAD_INPUT
    except ValueError as error:
        _complain(f"sparvar-tune: {_one_line(str(error))}")
        return ExitCode.BAD_INPUT
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing.startswith("sparvar"):
            raise
        _complain(f"sparvar-tune: {missing} is not installed; sparvar-tune doctor names the command that mends it")
        return ExitCode.BAD_INPUT


def _complain(line: str) -> None:
    """Says a line on stderr. Where that cannot be written, on a full disk, the exit code says it alone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _let_go() -> None:
    """Drops what a stream holds and cannot write, to a full disk or a closed pipe. Python would try again at the end, say so at
    length and make the exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """A warning as a line for people: where in the code it was raised is nothing to them."""
    if sys.stderr is not None:
        _complain(f"sparvar-tune: note: {_one_line(str(message))}")


def _one_line(text: str) -> str:
    return shown(" ".join(text.split()), 2000)


if __name__ == "__main__":
    sys.exit(main())
