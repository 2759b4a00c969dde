"""The command line: parses, calls, prints. `sparvar-tune --gpu cpu --model pocketvar` tunes; see --help for the rest.

Exit codes: 0 done; 1 a check did not pass; 2 bad input or a bound nothing meets (one line on stderr); 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sparvar_tune import __version__
from sparvar_tune.catalog.names import DEFAULT_PRESET, PRESETS

COMMANDS = ("tune", "generate", "show", "explain", "verify", "compare", "check")
DEFAULT_BUDGET, VERIFY_BUDGET = "290s", "55s"


def duration(text: str) -> float:
    """Seconds from "90", "90s", "3m" or "1h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f'{text!r}: want a time such as "90s", "3m" or "1h"')
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: want a whole number >= 1")
    return int(text)


def whole(text: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: want a whole number, 0..2**31")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line and exit code 2, without the usage block."""
        self.exit(2, f"sparvar-tune: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="sparvar-tune", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tunes sparse attention of next-scale image models under a picture-level fidelity bound.\n"
        "`tune` is the default command: sparvar-tune --gpu cpu --model pocketvar",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"sparvar-tune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str, model: bool = True) -> argparse.ArgumentParser:
        p: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        p.add_argument("--gpu", default="auto", help="slug of the GPU table, cpu, or auto for this machine (default)")
        p.add_argument("--model", required=model, help="slug of the model table, such as pocketvar or hart")
        p.add_argument("--quality", "--preset", dest="preset", choices=PRESETS, default=DEFAULT_PRESET)
        p.add_argument("--resolution", help="one the model was published at (default: its largest)")
        p.add_argument("--aspect", help="height / width with three decimals, such as 1.000 (default)")
        return p

    def images(p: argparse.ArgumentParser) -> None:
        p.add_argument("--images", type=positive, default=1, help="how many at once the profile is for (default 1)")

    tune = command(
        "tune", "search a policy, certify it on held-out pictures, write the profile (the default command)", model=False
    )
    images(tune)
    tune.add_argument("--from-misses", action="store_true", help="tune what load_profile(..., record_miss=True) did not find")
    tune.add_argument("--min-psnr", type=float, help="dB the lower confidence bound must reach, instead of the preset's")
    tune.add_argument("--min-ssim", type=float, help="the same for SSIM")
    tune.add_argument("--budget", type=duration, default=duration(DEFAULT_BUDGET), help=f"wall time (default {DEFAULT_BUDGET})")
    tune.add_argument("--pairs", type=positive, default=32, help="held-out (class, seed) pairs (default 32)")
    tune.add_argument("--seed", type=whole, default=0, help="of the search; 0..2**31")
    tune.add_argument("--out", type=Path, help="folder that gets <gpu>/<model>.json (default: this user's profiles)")
    tune.add_argument("--resume", action="store_true", help="go on after the finished trials of the last run")
    tune.add_argument("--search", action="store_true", help="search a policy here even where other silicon's can be taken over")
    tune.add_argument("--workers", type=positive, help="GPUs to time on at once (default: all that are visible and alike)")
    tune.add_argument("--mode", choices=("eager", "graph"), default="eager", help="how calls are launched while a GPU times them")
    tune.add_argument(
        "--merge", type=Path, nargs="+", metavar="LOG", help="measurements of other runs or machines, to use as own"
    )
    tune.add_argument("--log", type=Path, help="folder that gets a GPU's measurements as <gpu>/<model>.jsonl")
    tune.add_argument("--storage", metavar="URL", help="share trials with other runs: sqlite:///FILE, journal:///FILE, "
                      "postgresql://USER@HOST/NAME or mysql://USER@HOST/NAME (docs/many-machines.md)")  # fmt: skip
    tune.add_argument("--dry-run", action="store_true", help="print the space and the plan, run nothing")

    generate = command("generate", "draw one picture dense and tuned, side by side, as a PNG")
    generate.add_argument("--class", dest="label", default="cat", help="class name or number")
    generate.add_argument("--seed", type=int, default=7)
    generate.add_argument("--out", type=Path, default=Path("sparvar.png"))
    generate.add_argument("--profile", type=Path, help="this file instead of the one found for the machine")

    show = command("show", "print a profile, or the tables with --gpus and --models", model=False)
    images(show)
    show.add_argument("--profile", type=Path)
    show.add_argument("--seal", action="store_true", help="keep a hand edit of --profile FILE: check it, rewrite its checksum")
    show.add_argument("--gpus", action="store_true")
    show.add_argument("--models", action="store_true")
    show.add_argument("--trials", action="store_true", help="the trials of the last search, as CSV")
    show.add_argument("--storage", metavar="URL", help="with --trials: those of every run that shares this storage")

    explain = command("explain", "say what would run on this machine, and why")
    images(explain)
    explain.add_argument("--profile", type=Path)

    verify = command("verify", "re-time a profile on this machine and re-check its pictures; what fails runs dense from then on")
    images(verify)
    verify.add_argument("--profile", type=Path)
    verify.add_argument("--pairs", type=positive, default=8)
    verify.add_argument("--budget", type=duration, default=duration(VERIFY_BUDGET),
                        help=f"wall time; rows it does not reach stay as they are (default {VERIFY_BUDGET})")  # fmt: skip
    verify.add_argument("--write", action="store_true", help="store the new times as this user's profile")

    compare = command("compare", "dense, the paper's fixed setting and the tuned profiles in one table, interleaved in one run")
    compare.add_argument("--pairs", type=positive, default=32)
    compare.add_argument("--lpips", type=Path, help="safetensors file of AlexNet LPIPS weights: adds that column")
    compare.add_argument("--out", type=Path, help="Markdown file for the table (the raw numbers go beside it as JSON)")

    check = command("check", "check this machine: versions, silicon, every kernel against the oracle", model=False)
    check.set_defaults(model=None)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "tune")
    args = build_parser().parse_args(words)
    try:
        from sparvar_tune.cli import commands

        run: Callable[[argparse.Namespace], int] = getattr(commands, args.command)
        return run(args)
    except KeyboardInterrupt:
        print("\nsparvar-tune: interrupted; finished trials are kept, --resume goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"sparvar-tune: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"sparvar-tune: {where}{error.strerror or error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
