"""What every option of the menu is worth on a model in the box: as one rule for all heads, and as one of many.

    python -m lab.option_front pocketvar --out reports/options-cpu.md

Pictures are drawn with each option in every head of the last two scales, beside dense ones. Then one generation is captured and
each option run on every head of the last three scales, as a search does, and every head takes the choice of least time + price *
error, for many prices, from the whole menu and from the menu without one kind at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import ADAPTERS, load_adapter
from sparvar_tune.adapters.protocol import Adapter
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.models import find_model
from sparvar_tune.measure.fidelity import compare_pictures
from sparvar_tune.measure.pairs import search_pairs
from sparvar_tune.measure.timing import Stopwatch, rotated
from sparvar_tune.policy_search.judge import make_attention
from sparvar_tune.policy_search.menu import OptionTable, decision_scale, menu, paper_policy
from sparvar_tune.profile.machine import device_name, silicon
from sparvar_tune.profile.store import write_atomic
from sparvar_tune.ways.search_here import measure_options

PRICES = [10 ** (i / 8 - 2) for i in range(45)]  # of an error as large as the layer's output, in dense times of a head
DENSE = "dense"
AT = (0.03, 0.1, 0.3, 1.0)  # relative squared error summed over heads and scales, mean over layers


def front(table: OptionTable, allowed: Callable[[str], bool]) -> list[tuple[float, float]]:
    """(error, ms of a picture) for every price; error: see AT."""
    choices = {c: ms for c, ms in table.choices().items() if all(map(allowed, c))}
    scales = list(table.error)
    layers, heads = len(table.error[scales[0]]["dense"]), len(table.error[scales[0]]["dense"][0])
    errors = torch.tensor(
        [
            [sum(table.error[s][o][layer][head] for s, o in zip(scales, c, strict=True)) for c in choices]
            for layer in range(layers)
            for head in range(heads)
        ]
    ).double()
    times, unit = torch.tensor(list(choices.values())).double(), table.time_ms[scales[-1]]["dense"]
    found = []
    for price in PRICES:
        best = (times + price * unit * errors).argmin(1)
        error = errors.gather(1, best[:, None]).sum() / layers
        found.append((float(error), float(times[best].sum())))
    return found


def time_at(found: list[tuple[float, float]], error: float) -> float:
    """ms at an error, on the straight line between the two neighbouring prices."""
    below = min((p for p in found if p[0] <= error), key=lambda p: p[1])
    above = max((p for p in found if p[0] > error), key=lambda p: p[1], default=below)
    share = 0.0 if above[0] == below[0] else (error - below[0]) / (above[0] - below[0])
    return min(below[1], below[1] + share * (above[1] - below[1]))


def one_rule(adapter: Adapter, pairs: int) -> dict[str, list[dict[str, float]]]:
    """By option, for each pair: PSNR, SSIM and time of the last three scales over the dense time measured beside it."""
    schedule, model = adapter.schedule, adapter.model
    last = len(schedule) - 1
    ways = {"the paper's setting": paper_policy(schedule, model.layers, model.heads)}
    for name, variant in menu(schedule, last).items():
        before = menu(schedule, last - 1).get(name)
        if name != "dense" and before is not None:
            ways[name] = Policy.uniform(model.layers, model.heads, {last - 1: before, last: variant})
    attends: dict[str, Any] = {DENSE: adapter.dense} | {name: make_attention(adapter, p) for name, p in ways.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    stopwatch, order = Stopwatch(adapter.device), list(attends)
    for i, pair in enumerate(search_pairs(adapter.num_classes, pairs)):
        state = adapter.start(pair, decision_scale(schedule))
        pictures, ms = dict[str, torch.Tensor](), dict[str, float]()
        for name in rotated(order, i):
            made: list[torch.Tensor] = []
            ms[name] = stopwatch(lambda: made.append(adapter.finish(state, attends[name])))  # noqa: B023
            pictures[name] = made[0]
        for name in ways:
            seen = compare_pictures(pictures[name], pictures[DENSE])
            found[name].append({"psnr": seen["psnr"], "ssim": seen["ssim"], "time": ms[name] / ms[DENSE]})
        print(f"pictures of {i + 1}/{pairs} pairs", flush=True)
    return found


def measured(adapter: Adapter, pairs: int) -> dict[str, Any]:
    """Raw values, as JSON takes them."""
    rules = one_rule(adapter, pairs)
    table = measure_options(adapter, lambda text: print(text, flush=True))
    scales, first = list(table.time_ms), next(iter(table.time_ms))
    kinds = {name: v.kind for s in scales for name, v in menu(adapter.schedule, s).items()}
    dense = sum(table.time_ms[s]["dense"] for s in scales) * adapter.model.layers * adapter.model.heads
    fronts = {"all": front(table, lambda o: True)}
    for kind in dict.fromkeys(kinds.values()):
        if kind != "dense":
            fronts[f"without {kind}"] = front(table, lambda o, kind=kind: kinds[o] != kind)  # type: ignore[misc]
    return {
        "model": adapter.model.slug, "machine": device_name(silicon(GPUS["cpu"], True)), "torch": torch.__version__,
        "date": str(datetime.date.today()), "first": first, "dense_ms": dense,
        "options": {
            s: {
                o: {"kind": kinds[o], "ms": table.time_ms[s][o], "error": sum(map(sum, table.error[s][o])) / adapter.model.layers}
                for o in table.time_ms[s]
            }
            for s in scales
        },
        "decision_ms": dict(table.decision_ms), "fronts": fronts, "rules": rules,
    }  # fmt: skip


def page(raw: dict[str, Any]) -> str:
    lines = [
        f"# The menu's options: {raw['model']} on a CPU", "",
        f"{raw['machine']}; torch {raw['torch']}; {raw['date']}. Error: squared, of "
        "heads' outputs over the layer's squared output on one captured picture, summed over heads, mean of layers.", "",
        "## One rule for all heads of the last two scales", "",
        f"Means over {len(next(iter(raw['rules'].values())))} pictures against the dense ones; of the time of the last three "
        "scales and the decoder over the dense time beside it the median.", "",
        "| rule | PSNR, dB | SSIM | speed-up |", "|---|---|---|---|",
        *(f"| {name} | {fmean(r['psnr'] for r in rows):.2f} | {fmean(r['ssim'] for r in rows):.4f} | "
          f"{1 / median(r['time'] for r in rows):.2f}x |"
          for name, rows in sorted(raw["rules"].items(), key=lambda item: -fmean(r["psnr"] for r in item[1]))), "",
        "## Attention of the last three scales at equal error, each head with its own rule", "",
        f"Every head takes the choice of least time + price * error. Milliseconds a picture; dense {raw['dense_ms']:.0f}:", "",
        "| options | " + " | ".join(f"error {e:g}" for e in AT) + " |", "|---|" + "---|" * len(AT),
    ]  # fmt: skip
    for name, found in raw["fronts"].items():
        points = [tuple(p) for p in found]
        cells = (f"{time_at(points, e):.0f}" for e in AT)
        lines.append(f"| {name.replace('_', '-')} | " + " | ".join(cells) + " |")
    for s, options in raw["options"].items():
        lines += [
            "",
            f"## Scale {s}, a head of a layer",
            "",
            "| option | ms | of dense | error |",
            "|---|---|---|---|",
        ]
        for name, row in sorted(options.items(), key=lambda item: item[1]["ms"]):
            lines.append(f"| {name} | {row['ms']:.2f} | {row['ms'] / options['dense']['ms']:.0%} | {row['error']:.4f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.option_front", description=__doc__)
    parser.add_argument("model", choices=list(ADAPTERS))
    parser.add_argument("--out", type=Path, required=True, help="where the page goes; raw data beside it, as .json")
    parser.add_argument("--pairs", type=int, default=8, help="of class and seed, whose pictures are drawn")
    args = parser.parse_args(argv)
    raw = measured(load_adapter(find_model(args.model), "cpu"), args.pairs)
    write_atomic(args.out.with_suffix(".json"), (json.dumps(raw, indent=1) + "\n").encode())
    text = page(json.loads(args.out.with_suffix(".json").read_bytes()))
    write_atomic(args.out, text.encode())
    print(text)


if __name__ == "__main__":
    main()
