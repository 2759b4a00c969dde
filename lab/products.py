"""Products of Infinity's blocks on this GPU: by PyTorch, by the fastest algorithm found, and added to the stream by the library.

    python -m lab.products --out reports/h200/products.md

Those behind which a norm of the stream comes are timed with it: a product, then sum and norm; or a weight times its gate, a
product that adds itself, then the norm (`fused/stream.py`). Ways of a product are called in turn, RUN times each, since one alone
would find the clock higher than a picture does.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_kernels.path import add_linear, gated_weight, linear, residual_norm
from sparvar_kernels.path.added_linear import added_form
from sparvar_kernels.path.fastest_product import look_for
from sparvar_kernels.path.linear import linear_form
from sparvar_tune.fused.stream import pays
from sparvar_tune.measure.timing import interleaved, paired_speedup, timing
from sparvar_tune.profile.store import write_atomic

RUN, ROUNDS = 4, 15
# the width, the MLP's, the text's; rows of a batch; tokens of all: of the grids of 80, 96 and 128 a side; of 48 and 64
MODELS = {"infinity-2b, 2048 x 2048": (2048, 8192, 512, 2, (12_800, 18_432, 32_768)),
          "infinity-8b, 4 x 1024 x 1024": (3584, 14_336, 896, 8, (18_432, 32_768))}  # fmt: skip
WAYS = {"torch": "PyTorch", "found": "found", "added": "added"}


def ways_of(part: str, batch: int, rows: int, width: int, inner: int, text: int) -> dict[str, Callable[[], object]]:
    """How a part's product can be made. Numbers are random, weights of the size that keeps a product's."""
    inputs, outputs = {"qkv": (width, 3 * width), "up": (width, inner), "proj": (width, width), "text": (text, width),
                       "down": (inner, width)}[part]  # fmt: skip
    some = partial(torch.randn, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    h = some(batch, rows // batch, inputs).bfloat16()
    weight, bias = some(outputs, inputs).mul_(inputs**-0.5).bfloat16(), some(outputs).bfloat16()
    if part in ("qkv", "up"):
        gelu = part == "up"
        look_for(linear_form(h, weight, bias, gelu))
        own = partial(_torchs, h, weight, bias, gelu)
        return {"torch": own, "found": partial(linear, h, weight, bias, gelu)}
    x, gate, shift = some(batch, rows // batch, width), some(batch, width) * 1e-3, some(batch, width)
    values = some(batch, text, width).mul_(text**-0.5).bfloat16()
    norm = partial(residual_norm, norm="layer", scale=shift, shift=shift, eps=1e-6, out_dtype=torch.bfloat16)

    def separate(product: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: norm(x, product(), gate)

    def added() -> None:
        add_linear(x, h, values.mT if part == "text" else gated_weight(weight, gate))
        norm(x, offset=shift)

    adds = pays(rows // batch, width)
    if adds:
        look_for(added_form(values.mT if part == "text" else weight, batch, rows // batch, turned=part == "text"))
    if part == "text":
        return {"torch": separate(lambda: torch.bmm(h, values)), **({"added": added} if adds else {})}
    look_for(linear_form(h, weight, bias))
    own, found = partial(_torchs, h, weight, bias, False), partial(linear, h, weight, bias)
    return {"torch": separate(own), "found": separate(found), **({"added": added} if adds else {})}


def _torchs(h: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    if gelu:
        return torch._addmm_activation(bias, h.flatten(0, 1), weight.t(), use_gelu=True)
    return F.linear(h, weight, bias)


def _run(way: Callable[[], object]) -> None:
    for _ in range(RUN):
        way()


@torch.inference_mode()
def measure(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each product."""
    found = []
    for model, (width, inner, text, batch, many) in MODELS.items():
        for rows in many:
            for part in ("qkv", "proj", "text", "up", "down"):
                ways = ways_of(part, batch, rows, width, inner, text)
                if len(ways) == 1:
                    continue
                times = interleaved({name: partial(_run, way) for name, way in ways.items()}, ROUNDS)
                ms = {name: [t / RUN for t in each] for name, each in times.items()}
                found.append({"model": model, "rows": rows, "part": part, "ms": ms})
                say(f"{model}, {rows} rows, {part}")
    return found


def render(raw: dict[str, Any]) -> str:
    """The page of raw numbers."""
    lines = [
        f"# Products on {raw['gpu']}", "",
        f"{raw['date']}, torch {raw['torch']}, cuBLASLt of CUDA {raw['cuda']}. Milliseconds p50 (p20..p80) of {RUN} calls, "
        f"ways in turn, n = {ROUNDS}; ratios are medians of paired turns with 95 % intervals. proj, text and down with the "
        "norm behind them; their last way also with the weight times its gate. Regenerate: `python -m lab.products`.", "",
        "| model | rows | product | PyTorch | found | added to the stream | PyTorch over the last |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in raw["rows"]:
        ms = row["ms"]
        cells = []
        for name in WAYS:
            t = timing(ms[name]) if name in ms else None
            cells.append("-" if t is None else f"{t.p50_ms:.3f} ({t.p20_ms:.3f}..{t.p80_ms:.3f})")
        ratio = paired_speedup(ms["torch"], ms["added" if "added" in ms else "found"])
        last = f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"
        lines.append(f"| {row['model']} | {row['rows']:,} | {row['part']} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    rows = measure(lambda text: print(text, flush=True))
    raw = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows,
           "date": datetime.date.today().isoformat()}  # fmt: skip
    write_atomic(out.with_suffix(".json"), (json.dumps(raw) + "\n").encode())
    write_atomic(out, render(raw).encode())
    print(render(raw))


if __name__ == "__main__":
    main()
