"""The tables of whole pictures, from raw numbers alone."""

from __future__ import annotations

from statistics import median
from typing import Any

from sparvar_tune.measure.timing import paired_speedup, timing

PUBLIC, DENSE = "public, FlashAttention-2", "path, graphs, dense"
KINDS = ("products", "attention", "our elementwise", "convolutions")


ABOUT = """
Unmodified public code with random weights at its published sizes, batch with guidance, beside our path on the same model in one
process, every way in turn. Text features are random; the public decoder is in every figure. Wall: from call to finished device,
p50 (p20..p80), milliseconds. GPU: the sum of kernels and copies of a picture, by a profiler, in pictures of their own. A
decoder's time is by device events: where it waits for the host, that is in it. Ratios of
wall times are medians of paired pictures with 95 % intervals; ratios of GPU times are of medians. Random weights say nothing of
a picture's fidelity: what a policy costs there is certified elsewhere, per weights.
"""
LAYERS = """
Relative error of the update of the residual stream, same inputs, dense. Two orders of bf16 sums: the public block against itself
where each product adds the sums of two halves of its channels, as a split product does, and the stream takes in each part by two
halves. Permuted: against itself with the channels of V and of the MLP in another order, which a GPU sums in fp32. Against fp32:
the same weights, every product in full precision.
"""


def render(runs: list[dict[str, Any]]) -> str:
    full = [run for run in runs if "ways" in run]
    gpus = sorted({run["gpu"] for run in full})
    lines = [
        f"# Whole pictures on {', '.join(gpus)}", "",
        " ".join(ABOUT.split()), "",
        "Regenerate: `python -m lab.whole_image report` with the JSON beside this.", "",
    ]  # fmt: skip
    for run in full:
        lines += [*_ladder(run), *_kinds(run), *_memory(run), ""]
    lines += _first([run for run in runs if "apply_and_first_ms" in run])
    lines += _layers([run for run in full if "layers" in run])
    return "\n".join(lines).rstrip() + "\n"


def title(run: dict[str, Any]) -> str:
    """Which model at which size, and how many pictures."""
    (_, _), last = run["grids"][0], run["grids"][-1]
    images = f", {run['images']} pictures at once" if run["images"] > 1 else ""
    peer = f", by {run['peer']}'s public code" if "peer" in run else ""
    return f"{run['model']}{peer}, last grid {last[0]}x{last[1]}, {run['tokens']:,} tokens{images}"


def _gpu(way: dict[str, Any]) -> float:
    return median(k["gpu_ms"] for k in way["kernels"])


def decoding(run: dict[str, Any]) -> dict[str, float]:
    """Way -> its decoder's device time, ms."""
    return {name: median(way["decoder_ms"]) for name, way in run["ways"].items() if "error" not in way}


def _ladder(run: dict[str, Any]) -> list[str]:
    ways = {name: way for name, way in run["ways"].items() if "error" not in way}
    public, dense, decoder = ways.get(PUBLIC), ways.get(DENSE), decoding(run)
    note = " The public code was timed before ours, as the caches of both do not fit side by side." if run.get("apart") else ""
    note += " " + run["note"] if "note" in run else ""
    lines = [
        f"## {title(run)}", "",
        f"{run['date']}, {run['gpu']}, torch {run['torch']}, triton {run['triton']}, host {run['host']}; "
        f"n = {len(next(iter(ways.values()))['wall_ms'])}. \"Bare\" leaves each way's decoder out.{note}", "",
        "| way | wall | x public | bare x public | GPU | x public | bare x public | bare x our dense | decoder | launches |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, way in run["ways"].items():
        if "error" in way:
            lines.append(f"| {name} | {way['error'][:120]} | - | - | - | - | - | - | - | - |")
            continue
        t, gpu = timing(way["wall_ms"]), _gpu(way)
        cells = [f"{t.p50_ms:.0f} ({t.p20_ms:.0f}..{t.p80_ms:.0f})", "-", "-", f"{gpu:.0f}", "-", "-", "-"]
        if public:
            cells[1] = _ratio(public["wall_ms"], way["wall_ms"])
            cells[2] = _ratio(*([ms - decoder[n] for ms in w["wall_ms"]] for n, w in ((PUBLIC, public), (name, way))))
            cells[4] = f"{_gpu(public) / gpu:.2f}"
            cells[5] = _bare(_gpu(public) - decoder[PUBLIC], gpu - decoder[name])
        if dense:
            cells[6] = _bare(_gpu(dense) - decoder[DENSE], gpu - decoder[name])
        lines.append(f"| {name} | {' | '.join(cells)} | {decoder[name]:.0f} | {way['kernels'][-1]['launches']:,} |")
    return lines


def _bare(base: float, ms: float) -> str:
    """A ratio of GPU times without decoders; none where a decoder waited for the host for longer than all kernels take."""
    return f"{base / ms:.2f}" if min(base, ms) > 0 else "-"


def _ratio(public: list[float], way: list[float]) -> str:
    s = paired_speedup(public, way)
    return f"{s.median:.2f} ({s.low:.2f}..{s.high:.2f})"


def _kinds(run: dict[str, Any]) -> list[str]:
    lines = ["", f"| GPU milliseconds of | {' | '.join(KINDS)} | rest |"]
    lines.append("|".join(["", *["---"] * (len(KINDS) + 2), ""]))
    for name, way in run["ways"].items():
        if "error" not in way:
            found = way["kernels"][-1]
            own = [found["kinds"].get(kind, 0.0) for kind in KINDS]
            lines.append(f"| {name} | {' | '.join(f'{ms:.0f}' for ms in (*own, found['gpu_ms'] - sum(own)))} |")
    return lines


def _memory(run: dict[str, Any]) -> list[str]:
    if "peak_bytes" not in run:  # a method's own code
        return []
    peak, gib = run["peak_bytes"], 2**30
    lines = [
        "", f"Peak memory that PyTorch holds: public "
        f"{peak['public'] / gib:.2f} GiB, ours {peak['ours'] / gib:.2f} GiB "
        f"({_share(peak)}); weights are {run['weights_bytes'] / gib:.2f} GiB of both and captured "
        f"graphs {run['captured_bytes'] / gib:.2f} GiB in ours.",
    ]  # fmt: skip
    return lines


def _share(peak: dict[str, int]) -> str:
    less = 1 - peak["ours"] / peak["public"]
    return f"{abs(less):.0%} {'less' if less >= 0 else 'more'}"


def _first(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = [
        "## From apply to the first picture", "",
        "| model | measured | Triton's cache | apply and first picture, s | second (captures), s | third, s | graphs hold, GiB "
        "| host | Python's loop there, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in runs:
        first, second, third = (ms / 1e3 for ms in (run["apply_and_first_ms"], *run["next_ms"][:2]))
        cache = {None: "", True: "empty", False: "filled"}[run.get("cold")]
        cache += ", but compiled while the model was made" if run.get("ahead") else ""
        lines.append(f"| {title(run)} | {run['date']} | {cache} | {first:.2f} | {second:.2f} | {third:.2f} "
                     f"| {run['captured_bytes'] / 2**30:.2f} | {run['host']} | {_loop(run)} |")  # fmt: skip
    lines += [
        "", "Without a word on the cache: it was empty for a row of 5 s and more. Python's loop is a fixed one of a million "
        "steps, median of five before the measurement; where it is missing nobody noted how fast the host was.", "",
    ]  # fmt: skip
    return lines


def _loop(run: dict[str, Any]) -> str:
    return f"{run['python_loop_ms']:.0f}" if "python_loop_ms" in run else "-"


def _layers(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = [
        "## A block against the public one", "",
        " ".join(LAYERS.split()), "",
        "| model | layer | scale | ours - public | two orders | of that | permuted | ours - fp32 | public - fp32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in runs:
        for row in run["layers"]:
            errors = (f"{row[name]:.2e}" for name in ("permuted", "ours_fp32", "public_fp32"))
            lines.append(f"| {run['model']} | {row['layer']} | {row['scale']} | {row['ours_public']:.2e} | {row['orders']:.2e} "
                         f"| {row['ours_public'] / row['orders']:.2f} | {' | '.join(errors)} |")  # fmt: skip
    return lines
