"""Time of a whole picture against PSNR, of a model in the box: every saving alone, and those together that may win.

    python -m lab.fronts pocketvar --pairs 10
    python -m lab.fronts emojivar --pairs 4 --images 16 --device cuda

All ways of a pair are drawn one after the other in rotating order with dense among them, so that a busy machine ranks them as an
idle one does; on a GPU on the fused path, once all graphs are captured. Pairs are held-out ones: a bound is a certificate. The
raw numbers go beside the report and the plot; with `--from FILE` both are made from them again.

`--images`: so many pictures are drawn at once, by every way. One picture of a small model does not fill a big GPU: what is timed
then is launches, which no saving makes fewer.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from torch import Tensor

from sparvar_kernels.policy import Policy, Step
from sparvar_tune.adapters import ADAPTERS, Adapter, Pair, load_adapter
from sparvar_tune.catalog.metrics import LEAD
from sparvar_tune.catalog.models import find_model
from sparvar_tune.generation import CacheBudget, DropUnconditional, Precision, PruneTokens, SkipScales
from sparvar_tune.live.boxed import BoxedAdapter
from sparvar_tune.measure.fidelity import class_mean, compare_pictures, lower_bound
from sparvar_tune.measure.pairs import MOST_PAIRS, held_out_pairs
from sparvar_tune.measure.timing import Stopwatch, rotated
from sparvar_tune.policy_search.judge import first_touched, formats, make_attention, prepare
from sparvar_tune.policy_search.menu import OptionTable, assign
from sparvar_tune.policy_search.planned_trials import SCALE_WEIGHTS
from sparvar_tune.policy_search.trial import DEFAULT_TILT
from sparvar_tune.profile.machine import here_or_named, silicon, versions
from sparvar_tune.profile.store import write_atomic
from sparvar_tune.ways.search_here import measure_options

ATTENTION, SKIP, TOKENS, KEYS = "sparse attention", "last scale left out", "tokens pruned", "cached keys cut"
HALF, SCALED = "half of guidance dropped", "8-bit products"
ALONE = (ATTENTION, SKIP, TOKENS, KEYS, HALF, SCALED)
PRICES, SKIP_PRICES, THIN_PRICE = (100.0, 25.0, 14.0, 10.0, 8.0, 7.0, 4.0, 2.5, 0.8, 0.4), (25.0, 6.0, 1.5, 0.4), 25.0
SHARES = {TOKENS: (0.9, 0.5, 0.25, 0.1), KEYS: (0.75, 0.5, 0.25, 0.1)}  # kept
# (scales before the end from which the half is dropped, what else is done)
HALVES, HALF_SKIPS = range(5), (2, 4)
HALF_PRICES = ((0, 25.0), (1, 25.0), (1, 8.0), (1, 2.5), (2, 25.0), (2, 8.0), (2, 2.5))
HALF_SHARES = {TOKENS: ((0, 0.9), (1, 0.9), (2, 0.5)), KEYS: ((1, 0.75), (1, 0.5), (1, 0.25), (1, 0.1), (2, 0.75), (2, 0.5))}
HALF_KEYS_PRICES = ((1, 0.5, 100.0), (1, 0.5, 25.0))
# (scales before the end from which products are of 8 bits, price or scales before the end from which the half is dropped)
SCALES_SCALED = (0, 1, 2, 4)
SCALED_PRICES = (
    (0, 14.0), (1, 10.0), (2, 25.0), (2, 14.0), (2, 12.0), (2, 11.0), (2, 10.0), (2, 9.0), (2, 8.0), (2, 7.0), (2, 2.5), (2, 0.8),
    (4, 14.0), (4, 12.0), (4, 10.0), (4, 9.0), (4, 8.0),
)  # fmt: skip
SCALED_SKIP_PRICES = (6.0, 1.5, 0.4)
SCALED_HALVES = ((0, 0), (2, 0), (4, 0), (0, 1), (2, 1), (2, 2), (4, 4))
SCALED_HALF_PRICES = ((2, 0, 25.0), (0, 1, 25.0), (2, 1, 25.0), (2, 1, 8.0), (2, 2, 8.0))
PRESETS = ("near-lossless", "paper")
MOST_IMAGES = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """method: one of ALONE, or some joined by " + ". setting: the price of an error or the share kept, in words."""

    method: str
    setting: str
    policy: Policy


def ways(adapter: Adapter, table: OptionTable) -> list[Candidate]:
    """Everything that is drawn, each setting chosen to lie near a preset's PSNR on one of the models."""
    schedule, layers, heads = adapter.schedule, adapter.model.layers, adapter.model.heads
    last = len(schedule) - 1
    tokens, past = schedule.num_queries(last), schedule.num_keys(last) - schedule.num_queries(last)
    skip = SkipScales.last(schedule)

    def thin(what: str, share: float) -> Step:
        if what == TOKENS:
            return PruneTokens(last, (round(tokens * share),), last - 1, 1, layers - 1)
        return CacheBudget(last, ((round(past * share),) * layers,))

    def priced(price: float, *steps: Step) -> Policy:
        prices = {last - i: price * weight for i, weight in enumerate(SCALE_WEIGHTS)}
        return assign(table, schedule, prices, DEFAULT_TILT, steps)

    def dense(*steps: Step) -> Policy:
        return Policy(("A" * heads,) * layers, (), steps)

    out = [Candidate(ATTENTION, f"price {price:g}", priced(price)) for price in PRICES]
    out.append(Candidate(SKIP, f"scale {last}", dense(skip)))
    out += [Candidate(what, f"{share:.0%} kept", dense(thin(what, share))) for what in SHARES for share in SHARES[what]]
    out += [Candidate(f"{SKIP} + {ATTENTION}", f"price {price:g}", priced(price, skip)) for price in SKIP_PRICES]
    for what, (share, *_) in SHARES.items():
        policy = priced(THIN_PRICE, thin(what, share))
        out.append(Candidate(f"{what} + {ATTENTION}", f"{share:.0%} kept, price {THIN_PRICE:g}", policy))

    def at(before: int) -> str:
        return f"from scale {last - before}"

    fmts = formats(adapter) if Precision.kind in adapter.steps else ()

    def scaled(before: int, fmt: str | None = None) -> Step:
        return Precision(last - before, ((0, layers - 1),), fmt or fmts[0])

    if fmts:
        out += [Candidate(SCALED, f"{fmt} {at(i)}", dense(scaled(i, fmt))) for fmt in fmts for i in SCALES_SCALED]
        made = [(f"{at(i)}, price {price:g}", priced(price, scaled(i))) for i, price in SCALED_PRICES]
        out += [Candidate(f"{SCALED} + {ATTENTION}", setting, policy) for setting, policy in made]
        out.append(Candidate(f"{SCALED} + {SKIP}", at(2), dense(skip, scaled(2))))
        made = [(f"{at(2)}, price {price:g}", priced(price, skip, scaled(2))) for price in SCALED_SKIP_PRICES]
        out += [Candidate(f"{SCALED} + {SKIP} + {ATTENTION}", setting, policy) for setting, policy in made]
    if DropUnconditional.kind not in adapter.steps:
        return out

    def half(before: int) -> Step:
        return DropUnconditional(last - before)

    if fmts:
        for i, j in SCALED_HALVES:
            out.append(Candidate(f"{HALF} + {SCALED}", f"{at(j)}, products {at(i)}", dense(half(j), scaled(i))))
        for i, j, price in SCALED_HALF_PRICES:
            policy = priced(price, half(j), scaled(i))
            out.append(Candidate(f"{HALF} + {SCALED} + {ATTENTION}", f"{at(j)}, products {at(i)}, price {price:g}", policy))
        policy = priced(SKIP_PRICES[-1], skip, half(2), scaled(2))
        out.append(Candidate(f"{HALF} + {SCALED} + {SKIP}", at(2), dense(skip, half(2), scaled(2))))
        out.append(Candidate(f"{HALF} + {SCALED} + {SKIP} + {ATTENTION}", f"{at(2)}, price {SKIP_PRICES[-1]:g}", policy))

    out += [Candidate(HALF, at(i), dense(half(i))) for i in HALVES]
    out += [Candidate(f"{HALF} + {ATTENTION}", f"{at(i)}, price {price:g}", priced(price, half(i))) for i, price in HALF_PRICES]
    for what, settings in HALF_SHARES.items():
        made = [(f"{at(i)}, {share:.0%} kept", dense(half(i), thin(what, share))) for i, share in settings]
        out += [Candidate(f"{HALF} + {what}", setting, policy) for setting, policy in made]
    for i, share, price in HALF_KEYS_PRICES:
        policy = priced(price, half(i), thin(KEYS, share))
        out.append(Candidate(f"{HALF} + {KEYS} + {ATTENTION}", f"{at(i)}, {share:.0%} kept, price {price:g}", policy))
    out += [Candidate(f"{HALF} + {SKIP}", at(i), dense(skip, half(i))) for i in HALF_SKIPS]
    policies = [(price, priced(price, skip, half(2))) for price in SKIP_PRICES]
    return out + [Candidate(f"{HALF} + {SKIP} + {ATTENTION}", f"{at(2)}, price {price:g}", p) for price, p in policies]


@dataclass(frozen=True)
class Drawn:
    """What a pair stands for, drawn one way: PSNR (dB) by picture. as_one: all blocks ran as one, else attention alone."""

    ms: float
    psnr: list[float]
    as_one: bool


def draw_pairs(
    adapter: BoxedAdapter, ways: Mapping[str, Any], pairs: Sequence[Pair], say: Callable[[str], None]
) -> dict[str, list[Drawn]]:
    """Every pair's picture every way, in rotating order; "dense" is one."""
    stopwatch, names = Stopwatch(adapter.device), list(ways)
    drawn: dict[str, list[Drawn]] = {name: [] for name in names}
    until = 0
    if not adapter.as_one:  # what all ways share is drawn once: on a CPU it takes a while
        until = first_touched(adapter, [attend.policy for attend in ways.values() if hasattr(attend, "policy")])
    adapter.start(pairs[0], until)  # on a GPU it captures what all ways share
    for i, pair in enumerate(pairs):
        made: dict[str, tuple[Tensor, float, bool]] = {}
        state, shared = timed(stopwatch, lambda: adapter.start(pair, until))  # noqa: B023
        shared = shared if until else 0.0  # before the first scale: noise, made on the CPU
        for name in rotated(names, i):
            as_one = prepare(adapter, ways[name])
            picture, ms = timed(stopwatch, lambda: adapter.finish(state, ways[name]))  # noqa: B023
            made[name] = picture, shared + ms, as_one
            say(f"pair {i + 1}/{len(pairs)}: {name}, {ms:.0f} ms")
        for name, (picture, ms, as_one) in made.items():
            each = zip(picture.split(1), made["dense"][0].split(1), strict=True)
            drawn[name].append(Drawn(ms, [compare_pictures(*both)[LEAD.name] for both in each], as_one))
    return drawn


def timed(stopwatch: Stopwatch, work: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its milliseconds."""
    made: list[T] = []
    ms = stopwatch(lambda: made.append(work()))
    return made[0], ms


def measure(model: str, pairs: int, device: str, images: int = 1) -> dict[str, Any]:
    """The raw numbers, as the JSON file has them; nothing is rounded. pairs: one a picture, the first pictures' first."""
    adapter = load_adapter(find_model(model), device)
    assert isinstance(adapter, BoxedAdapter)
    adapter.images = images

    def say(text: str) -> None:
        print(f"\r{text[:150]:150}", end="", file=sys.stderr, flush=True)

    made = ways(adapter, measure_options(adapter, say))
    drawn = held_out_pairs(adapter.num_classes, pairs)
    attentions: dict[str, Any] = {"dense": adapter.dense}
    attentions |= {f"{way.method}, {way.setting}": make_attention(adapter, way.policy) for way in made}
    found = draw_pairs(adapter, attentions, drawn, say)
    gpu, _ = here_or_named("cpu" if device == "cpu" else "auto")
    return {
        "model": adapter.model.slug, "date": datetime.date.today().isoformat(),
        "machine": dataclasses.asdict(silicon(gpu, True)), "versions": dataclasses.asdict(versions()),
        "pairs": [list(own) for pair in drawn for own in adapter.pictures_of(pair)], "images": images, "held_out": True,
        "class_levels": list(adapter.class_levels()),
        "wanted": {preset: adapter.required(preset)[LEAD.name] for preset in PRESETS},
        "dense_ms": [o.ms for o in found["dense"]], "load": os.getloadavg()[1], "processors": os.cpu_count(),
        "ways": [
            {"method": way.method, "setting": way.setting, "ms": [o.ms for o in pictures],
             LEAD.name: [db for o in pictures for db in o.psnr], "as_one": pictures[0].as_one}
            for way, pictures in ((way, found[f"{way.method}, {way.setting}"]) for way in made)
        ],
    }  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """speedup: median over pairs of dense over this. psnr: dB, the mean of all classes; where some were not drawn twice, what a
    way is above the known levels of those that were, on top of the mean level. bound: its lower 95 % confidence bound.
    """

    method: str
    setting: str
    speedup: float
    psnr: float
    bound: float


def points(raw: Mapping[str, Any]) -> list[Reached]:
    levels, labels = raw["class_levels"], [label for label, _ in raw["pairs"]]
    found, by_class = [], min(labels.count(label) for label in range(len(levels))) >= 2
    for way in raw["ways"]:
        values = way[LEAD.name]
        if by_class:
            psnr, bound = class_mean(values, labels), lower_bound(values, labels)
        else:
            above = [db - levels[label] for db, label in zip(values, labels, strict=True)]
            psnr, bound = (fmean(levels) + x for x in (fmean(above), lower_bound(above, [0] * len(above))))
        ratios = [dense / ms for dense, ms in zip(raw["dense_ms"], way["ms"], strict=True)]
        found.append(Reached(way["method"], way["setting"], median(ratios), psnr, bound))
    return found


def certified(found: Sequence[Reached], method: str, wanted: float) -> float | None:
    """The speed-up of a method's fastest setting whose bound reaches a PSNR; None where none does."""
    return max((p.speedup for p in found if p.method == method and p.bound >= wanted), default=None)


def reached(found: Sequence[Reached], method: str, wanted: float) -> float | None:
    """The speed-up of a method at a PSNR: between its two points around it, on a line; None where it never is so close."""
    line = sorted((p for p in found if p.method == method), key=lambda p: p.psnr)
    above = [p for p in line if p.psnr >= wanted]
    if not above:
        return None
    best, below = max(above, key=lambda p: p.speedup), [p for p in line if p.psnr < wanted]
    if not below or below[-1].speedup <= above[0].speedup:
        return best.speedup
    share = (above[0].psnr - wanted) / (above[0].psnr - below[-1].psnr)
    return max(best.speedup, above[0].speedup + share * (below[-1].speedup - above[0].speedup))


def is_open(found: Sequence[Reached], method: str, wanted: float) -> bool:
    """Whether every setting of a method is closer than `wanted`, so that a bolder one might reach more there."""
    line = [p for p in found if p.method == method]
    return len(line) > 1 and all(p.psnr >= wanted for p in line)


def markdown(raw: Mapping[str, Any], plot: str) -> str:
    found, machine = points(raw), raw["machine"]
    methods = list(dict.fromkeys(p.method for p in found))
    on_cpu = machine.get("gpu", "cpu") == "cpu"
    where = f"{machine['name']}, {machine['threads']} threads" if on_cpu else machine["name"]
    lines = [
        f"# Time against PSNR: {raw['model']} on {'a CPU' if on_cpu else machine['name']}", "",
        f"{where}; torch {raw['versions']['torch']}; {raw['date']}; "
        f"load {raw['load']:.1f} on {raw['processors']} processors. {drawn_on(raw)}"
        f"{len(raw['pairs'])} (class, seed) pairs{at_once(raw)}, every way in rotating order with dense in one run. Speed-ups "
        "are of whole pictures from their noise on, medians of paired ratios. PSNR is against the dense picture with the same "
        "noise, "
        + ("on pairs that chose nothing; its bound is the lower one of the mean, at 95 %." if raw.get("held_out") else
           "brought to all classes by their known levels. These are means; a profile's certificate is on held-out pictures and "
           "takes the lower bound."), "",
        f"![The front]({plot})", "", "## At a preset's PSNR", "",
        "| method | " + " | ".join(f"{preset}, {wanted:.2f} dB" for preset, wanted in raw["wanted"].items()) + " |",
        "|---" * (len(raw["wanted"]) + 1) + "|",
    ]  # fmt: skip
    speedup_at = certified if raw.get("held_out") else reached
    at = {preset: {m: speedup_at(found, m, wanted) for m in methods} for preset, wanted in raw["wanted"].items()}
    for method in methods:
        cells = []
        for preset, wanted in raw["wanted"].items():
            x = at[preset][method]
            more = " or more" if is_open(found, method, wanted) else ""
            cells.append("never so close" if x is None else f"{x:.2f}x{more}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    between = ("The fastest setting that was drawn whose bound reaches that PSNR." if raw.get("held_out") else
               "Between two points of a method the speed-up is read off a straight line.")  # fmt: skip
    lines += ["", f'{between} "Or more": no setting that was drawn is bold enough to come down to that PSNR.', ""]
    for preset, by in at.items():
        alone = max(((x, m) for m, x in by.items() if x and m in ALONE), default=(1.0, "nothing"))
        both = max(((x, m) for m, x in by.items() if x and m not in ALONE), default=None)
        if both is None:
            lines.append(f"- {preset}: no two together are so close. The best alone is {alone[1]}, {alone[0]:.2f}x.")
        else:
            wanted = raw["wanted"][preset]
            doubt = [m for m in (alone[1], both[1]) if is_open(found, m, wanted)]
            lines.append(f"- {preset}: {both[1]} reaches {both[0]:.2f}x. The best alone is {alone[1]}, {alone[0]:.2f}x. "
                         f"Ratio: {both[0] / alone[0]:.2f}"
                         + (f", of what was drawn: {' and '.join(doubt)} may reach more." if doubt else "."))  # fmt: skip
    lines += ["", "## Every point", "", "| method | setting | speed-up | PSNR, dB | its bound |", "|---|---|---|---|---|"]
    lines += [f"| {p.method} | {p.setting} | {p.speedup:.2f}x | {p.psnr:.2f} | {p.bound:.2f} |" for p in found]
    return "\n".join(lines) + "\n"


def at_once(raw: Mapping[str, Any]) -> str:
    images = raw.get("images", 1)
    ms = median(raw["dense_ms"])
    return f", {images} at once (dense {ms / images:.1f} ms a picture)" if images > 1 else f" (dense {ms:.0f} ms)"


def drawn_on(raw: Mapping[str, Any]) -> str:
    """What pictures ran on, where not on attention alone."""
    alone = sorted({way["method"] for way in raw["ways"] if not way.get("as_one")})
    if len(alone) == len({way["method"] for way in raw["ways"]}):
        return ""
    rest = f", but for these, which replace the attention alone: {', '.join(alone)}" if alone else ""
    return f"All blocks run as one, a CUDA graph a scale{rest}. Dense as well. "


def draw(raw: Mapping[str, Any]) -> bytes:
    """An SVG: a line a method. The same numbers give the same bytes."""
    from matplotlib import colormaps, figure, rc_context

    found = points(raw)
    with rc_context({"svg.hashsalt": "sparvar-tune", "svg.fonttype": "none"}):
        methods = list(dict.fromkeys(p.method for p in found))
        page = figure.Figure(figsize=(10, 5 + 0.12 * len(methods)), layout="constrained")
        axes = page.subplots()
        axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
        for method in methods:
            line = sorted((p for p in found if p.method == method), key=lambda p: p.psnr)
            mark, stroke = ("o", "-") if method in ALONE else ("s", "--")
            axes.plot([p.psnr for p in line], [p.speedup for p in line], label=method, marker=mark, linestyle=stroke)
        bottom = axes.get_ylim()[0]
        for preset, wanted in raw["wanted"].items():
            axes.axvline(wanted, color="0.7", linewidth=1, zorder=0)
            axes.annotate(preset, (wanted, bottom), xytext=(3, 4), textcoords="offset points", va="bottom", color="0.4")
        axes.axhline(1, color="0.7", linewidth=1, zorder=0)
        axes.set(xlabel="PSNR against the dense picture, dB (right is closer)", ylabel="speed-up of the whole picture")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        out = io.BytesIO()
        page.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.fronts", description="time against PSNR, each saving alone and together")
    parser.add_argument("model", choices=list(ADAPTERS), nargs="?", default="pocketvar")
    parser.add_argument("--pairs", type=int, default=10, help="(class, seed) pairs, drawn every way")
    parser.add_argument("--images", type=int, default=1, help="pictures drawn at once, so many a pair")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="raw numbers of an earlier run: measure nothing")
    parser.add_argument("--out", type=Path, help="the report, such as reports/fronts-h100-MODEL.md")
    given = parser.parse_args(arguments)
    if not 1 <= given.pairs <= MOST_PAIRS:
        print(f"fronts: --pairs: got {given.pairs}, want 1..{MOST_PAIRS}", file=sys.stderr)
        return 2
    if not 1 <= given.images <= MOST_IMAGES:
        print(f"fronts: --images: got {given.images}, want 1..{MOST_IMAGES}", file=sys.stderr)
        return 2
    if given.source:
        raw = json.loads(given.source.read_text("utf-8"))
    else:
        raw = measure(given.model, given.pairs, given.device, given.images)
    own = "" if raw["model"] == "pocketvar" else f"-{raw['model']}"
    own += f"-images-{raw['images']}" if raw.get("images", 1) > 1 else ""
    slug = raw["machine"].get("gpu", "cpu").removesuffix("-sxm")
    out: Path = given.out or Path(f"reports/fronts-{slug}{own}.md")
    plot = out.with_suffix(".svg")
    if not given.source:
        write_atomic(out.with_suffix(".json"), (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode())
    write_atomic(plot, draw(raw))
    write_atomic(out, markdown(raw, plot.name).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
