"""Measures what known damages cost a model in the box: `python -m lab.yardsticks MODEL`. Writes its yardsticks.json.

Two of them, against the plain dense picture: noise redrawn at the last two scales (as different as two draws of the
fine detail), and the last scale left out. They say what a PSNR means for this model.
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean

from sparvar_tune.adapters import ADAPTERS, load_adapter
from sparvar_tune.catalog.models import find_model
from sparvar_tune.live.boxed import DROP, REDRAW, BoxedAdapter
from sparvar_tune.measure.fidelity import Fidelity, compare_pictures, lower_bound
from sparvar_tune.measure.pairs import yardstick_pairs

EACH = 4  # pairs a class


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.yardsticks", description=__doc__)
    parser.add_argument("model", choices=list(ADAPTERS))
    parser.add_argument("--pairs", type=int, help=f"of class and seed; {EACH} a class")
    args = parser.parse_args(argv)
    adapter = load_adapter(find_model(args.model), "cpu")
    assert isinstance(adapter, BoxedAdapter), "the models in the box"
    count, last = args.pairs or EACH * adapter.num_classes, len(adapter.schedule) - 1
    found: dict[str, list[Fidelity]] = {REDRAW: [], DROP: []}
    pairs = yardstick_pairs(adapter.num_classes, count)
    for i, pair in enumerate(pairs):
        state = adapter.start(pair, last - 1)
        dense = adapter.finish(state, adapter.dense)
        found[REDRAW].append(compare_pictures(adapter.finish(state, adapter.dense, redraw_from=last - 1), dense))
        found[DROP].append(compare_pictures(state.fork().run(last).pictures(), dense))
        print(f"{i + 1}/{count}  {found[REDRAW][-1]}  {found[DROP][-1]}", flush=True)
    rows = []
    for name, values in found.items():
        psnr, ssim = [v["psnr"] for v in values], [v["ssim"] for v in values]
        by_class = [
            round(fmean(x for x, (k, _) in zip(psnr, pairs, strict=True) if k == c), 2) for c in range(adapter.num_classes)
        ]
        rows.append({"name": name, "n": len(values), "psnr_db": round(fmean(psnr), 2), "ssim": round(fmean(ssim), 4),
                     "psnr_lower_bound": round(lower_bound(psnr, [k for k, _ in pairs]), 2),
                     "psnr_db_by_class": by_class})  # fmt: skip
    data = {"weights_sha256": adapter.weights_sha256, "temperature": adapter.temperature, "rows": rows}
    adapter.yardsticks_file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", "utf-8")
    print(adapter.yardsticks_file.read_text("utf-8"))


if __name__ == "__main__":
    main()
