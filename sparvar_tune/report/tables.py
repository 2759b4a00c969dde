"""The report in words and numbers: every table and sentence of the page and of its Markdown twin, said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sparvar_tune.catalog.metrics import LEAD, known_metric
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.profile.machine import device_name
from sparvar_tune.profile.schema import Evidence, Timing
from sparvar_tune.report.cost import DAYS
from sparvar_tune.report.facts import Facts, times_of

MOST_TRIALS = 24  # rows of the table of trials


@dataclass(frozen=True)
class Table:
    """words: columns of text; the others hold numbers and are set to the right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Figure:
    """One of the large numbers at the top. note: what it stands on."""

    name: str
    value: str
    note: str


def title(facts: Facts) -> str:
    workload = facts.profile.workload
    return f"{workload.model} on {facts.profile.silicon.gpu}"


def subtitle(facts: Facts) -> str:
    p, w = facts.profile, facts.profile.workload
    images = f", {facts.images} images at once" if facts.images != 1 else ""
    return f"{w.resolution}, aspect {w.aspect}{images}; {p.preset}; {device_name(p.silicon)}; tuned {p.created}"


def warnings(facts: Facts) -> tuple[str, ...]:
    """What a reader must know before any number."""
    p, out = facts.profile, []
    if facts.predicted:
        out.append("Times are predicted by a cost model. Nothing was timed on this silicon.")
    if p.policy_state == "unverified":
        out.append("The policy is unverified on this model: no picture of it was compared with a dense one.")
    if p.generation is None and not facts.predicted:
        out.append("Whole pictures were not timed. The times are of attention alone, at the scales the profile touches.")
    out += [f"Scale {s} runs dense: {why}." for s, why in facts.demoted.items()]
    return tuple(out)


def figures(facts: Facts) -> tuple[Figure, ...]:
    """The numbers to remember, three or four."""
    p, out = facts.profile, []
    if p.generation is not None:
        g, s = p.generation, p.generation.speedup
        out.append(Figure("whole picture", f"{s.median:.2f}x", f"{s.low:.2f} to {s.high:.2f} (95 %), {s.n} pairs"))
        out.append(Figure("time of a picture", seconds(g.tuned.p50_ms), f"dense {seconds(g.dense.p50_ms)}, medians"))
    else:
        dense, tuned = (sum(getattr(part, f"{way}_ms") for part in facts.parts) for way in ("dense", "tuned"))
        if tuned:
            note = "predicted" if facts.predicted else "attention of the scales the profile touches"
            out.append(Figure("attention", f"{dense / tuned:.2f}x", note))
            out.append(Figure("its time in all layers", f"{tuned:.3g} ms", f"dense {dense:.3g} ms"))
    if p.evidence is not None:
        for name, m in p.evidence.metrics:
            if m.required is not None and m.bound is not None:
                metric = known_metric(name)
                note = f"mean {_say(name, m.mean)}; wanted {_say(name, m.required)}"
                out.append(Figure(f"{metric.title if metric else name}, bound", _say(name, m.bound), note))
    return tuple(out)


def points(facts: Facts) -> Table | None:
    rows = [
        (p.name + (" (this profile)" if p.kind == "certified" else ""), f"{p.speedup.median:.2f}x", _interval(p.speedup),
         f"{p.mean:.2f}", "" if p.bound is None else f"{p.bound:.2f}", str(p.speedup.n))
        for p in facts.points
    ]  # fmt: skip
    columns = ("way", "speed-up", "95 % interval", f"{LEAD.title}, {LEAD.unit}", "bound of the mean", "pairs")
    return Table("Whole pictures on held-out pairs", columns, tuple(rows)) if rows else None


def trials(facts: Facts) -> Table | None:
    """The front and the fixed points of the search."""
    if facts.trials is None:
        return None
    table: Any = facts.trials
    front = [str(on) == "True" for on in table["front"]] if "front" in table else [False] * len(table)
    shown = [on or form != "priced" for on, form in zip(front, table["form"], strict=True)]
    rows = [
        (str(r["trial"]), str(r["form"]), f"{1 / r['time_ratio']:.2f}x", f"{r[LEAD.name]:.2f}", f"{r['shortfall_db']:+.2f}",
         "yes" if on else "", "" if r["complete"] else "yes")
        for on, keep, (_, r) in zip(front, shown, table.iterrows(), strict=True) if keep
    ][:MOST_TRIALS]  # fmt: skip
    caption = f"{len(rows)} of {len(table)} trials: the front and the fixed points"
    close = f"{LEAD.title}, {LEAD.unit}"
    columns = ("trial", "form", "speed-up", close, "short of the bound, dB", "on the front", "given up early")
    return Table(caption, columns, tuple(rows), (1, 5, 6))


def times(facts: Facts) -> Table | None:
    parts = facts.parts
    if not parts:
        return None
    sums = [sum(p.dense_ms for p in parts), sum(p.tuned_ms for p in parts)]
    rows = [
        (p.label, f"{p.dense_ms:.4g}", f"{p.tuned_ms:.4g}", _share(p.dense_ms, sums[0]), _share(p.tuned_ms, sums[1]))
        for p in parts
    ]
    rows.append(("sum", f"{sums[0]:.4g}", f"{sums[1]:.4g}", "100 %", "100 %"))
    what = "predicted" if facts.predicted else "medians"
    caption = f"Time of {facts.profile.workload.layers} layers by scale, {what}"
    return Table(caption, ("part", "dense, ms", "tuned, ms", "of dense", "of tuned"), tuple(rows))


def steps(facts: Facts) -> Table | None:
    if not facts.traces:
        return None
    names, rows = facts.steps
    out = [
        (label, trace, *(f"{ms[step]:.4g}" if ms[step] else "" for step in names), f"{sum(ms.values()):.4g}")
        for label, found in rows.items() for trace, ms in found
    ]  # fmt: skip
    return Table("One traced run each, ms by scale and step", ("scale", "trace", *names, "sum"), tuple(out), (0, 1))


def speedups(facts: Facts) -> Table:
    rows = []
    for row in facts.profile.rows:
        dense, tuned = times_of(row)
        s, config = row.speedup, ", ".join(f"{k}={v}" for k, v in row.config)
        runs = "dense" if row.scale_index in facts.demoted else "sparse"
        if runs == "sparse" and s and s.low <= 1:  # for later scales: whoever reads "0.87x" asks why it does
            runs = "sparse; ranks keys"
        gain = (f"{s.median:.2f}x", _interval(s), str(s.n)) if s else (f"{dense / tuned:.2f}x", "predicted", "")
        launch = f"{row.kernel}, {row.mode}: {config}"
        rows.append((facts.scale_name(row.scale_index), f"{dense:.4g}", f"{tuned:.4g}", *gain, runs, launch))
    g = facts.profile.generation
    if g is not None:
        s = g.speedup
        rows.append(("whole picture", _ms(g.dense), _ms(g.tuned), f"{s.median:.2f}x", _interval(s), str(s.n), "", ""))
    columns = ("scale", "dense, ms", "tuned, ms", "speed-up", "95 % interval", "n", "runs", "launch")
    caption = "Attention of one layer, predicted" if facts.predicted else "Attention of one layer, against dense timed in turn"
    return Table(caption, columns, tuple(rows), (0, 6, 7))


def head_counts(facts: Facts) -> Table | None:
    """How many heads do what."""
    if not facts.head_scales:
        return None
    kinds = list(dict.fromkeys(facts.head_kinds.values()))
    counts = {s: Counter(kind for row in facts.head_map(s) for kind in row) for s in facts.head_scales}
    rows = [(k.letter, k.name, *(str(counts[s][k]) for s in facts.head_scales)) for k in kinds]
    columns = ("letter", "what a head does", *(facts.scale_name(s) for s in facts.head_scales))
    return Table(f"How many of {sum(map(len, facts.profile.policy.heads))} heads do what", columns, tuple(rows), (0, 1))


def head_letters(facts: Facts) -> Table | None:
    """The map in letters, layers alike together."""
    if not facts.head_scales:
        return None
    maps = {s: ["".join(kind.letter for kind in row) for row in facts.head_map(s)] for s in facts.head_scales}
    layers = range(facts.profile.workload.layers)
    rows = []
    for texts, found in groupby(layers, key=lambda layer: tuple(maps[s][layer] for s in facts.head_scales)):
        group = list(found)
        rows.append((f"{group[0]}" if len(group) == 1 else f"{group[0]}..{group[-1]}", *map(_runs, texts)))
    columns = ("layer", *(facts.scale_name(s) for s in facts.head_scales))
    return Table("Head by head, in letters", columns, tuple(rows), tuple(range(len(columns))))


def certificate(facts: Facts) -> tuple[str, ...]:
    """In sentences; the first says whether there is one."""
    p, e = facts.profile, facts.profile.evidence
    if e is None:
        return (
            "There is no certificate: the policy's pictures were never compared with dense ones on this model.",
            f"The policy is {p.policy_source}.",
        )
    out = [
        f"On {e.measured}, {e.n} pictures were drawn twice from the same noise: dense, and with this policy.",
        "None of their (class, seed) pairs was seen by the search.",
    ]
    for name, m in e.metrics:
        if m.required is not None and m.bound is not None:
            side = "least" if _sign(name, m.mean, m.bound) > 0 else "most"
            out.append(f"The mean {_title(name)} of all such pictures is at {side} {_say(name, m.bound)}, with a confidence of "
                       f"{e.confidence:.1%}; {_say(name, m.required)} was asked for.")  # fmt: skip
    out.append("These are one-sided bounds of a mean, stratified by class. They say nothing of a single picture.")
    for y in e.yardsticks:
        out.append(f"For comparison, {y.name}: {y.psnr_db:.2f} dB, SSIM {y.ssim:.4f}.")
    if e.weights_sha256:
        out.append(f"It holds for the weights with sha256 {e.weights_sha256[:12]}.")
    meaning = ", ".join(f"{name} {number}" for name, number in e.meaning)
    out.append(f"It holds for these meanings: {meaning}. A variant that comes to mean other keys gets another number, and what "
               "uses it then runs dense.")  # fmt: skip
    if e.meaning and dict(e.meaning) != {k: v for k, v in p.meaning if k in dict(e.meaning)}:
        out.append("The profile's rows were since made with other meanings than its pictures.")
    out.append(f"Where the policy comes from: {p.policy_source}.")
    return tuple(out)


def metrics(facts: Facts) -> Table | None:
    e: Evidence | None = facts.profile.evidence
    if e is None:
        return None
    rows = [(_title(name), _say(name, m.mean), _say(name, m.bound), _say(name, m.required)) for name, m in e.metrics]
    columns = ("metric", "mean", f"bound at {e.confidence:.1%}", "had to reach")
    return Table(f"{e.n} held-out pictures against their dense twins", columns, tuple(rows))


def cost(facts: Facts) -> tuple[tuple[str, ...], Table | None]:
    """Sentences (formulas, what is assumed) and the bill."""
    work, load, found = facts.work, facts.load, facts.bill
    if work is None or found is None:
        return ("There is no bill: no time of this profile was measured on this silicon.",), None
    device = device_word(facts)
    said = [
        f"Assumed, not measured: {load.images_per_day:,} images a day, {load.price:,.2f} {load.currency} for one {device}-hour, "
        f"{DAYS} days. Only hours at work count.",
        f"Measured: {work.dense_s:.4g} s an image dense, {work.speedup:.2f}x ({work.low:.2f} to {work.high:.2f}).",
        f"{device}-hours dense = images a year x seconds dense / 3600. Saved = {device}-hours dense x (1 - 1 / speed-up). "
        "Money saved = hours saved x price.",
    ]
    if not work.whole:
        said.insert(1, "The seconds are of attention at the scales the profile touches. What else a picture takes was not "
                    "measured and is not counted.")  # fmt: skip
    rows = []
    if work.whole:
        rows.append(("images an hour", f"{found.dense_per_hour:,.0f}", f"{found.tuned_per_hour:,.0f}", ""))
    rows += [
        (f"{device}-hours a year", _big(found.dense_hours), _big(found.tuned_hours),
         f"{_big(found.saved_hours)} ({_big(found.saved_low)} to {_big(found.saved_high)})"),
        (f"{load.currency} a year", _big(found.dense_hours * found.price), _big(found.tuned_hours * found.price),
         f"{_big(found.saved_money)} ({_big(found.saved_low * found.price)} to {_big(found.saved_high * found.price)})"),
    ]  # fmt: skip
    return tuple(said), Table("What the stated load takes", ("", "dense", "tuned", "saved (95 % interval)"), tuple(rows))


def device_word(facts: Facts) -> str:
    return "machine" if facts.profile.silicon.gpu == "cpu" else "GPU"


def search(facts: Facts) -> tuple[str, ...]:
    """How the numbers were come by: trials and launch measurements."""
    p, out = facts.profile, []
    out.append(f"The profile was written after {p.trials} trial{'s' * (p.trials != 1)}, with seed {p.seed}.")
    if facts.trials_from:
        out.append(f"Trials shown: {facts.trials_from}.")
    m = facts.measurements
    if m is not None:
        torn = f" {m.torn} lines are cut short or foreign and were skipped." if m.torn else ""
        slowed = f" While they ran the GPU was slowed by: {', '.join(m.clocks)}." if m.clocks else ""
        counted = f"{m.timings} timings of {m.configurations} configurations, {m.binaries} binaries and {m.failures} failures"
        out.append(f"The launch log holds {counted}.{torn}{slowed}")
    return (*out, *(f"Note: {note}." for note in p.notes))


def environment(facts: Facts) -> Table:
    p, w, s, v = facts.profile, facts.profile.workload, facts.profile.silicon, facts.profile.versions
    model = MODELS[w.model].title if w.model in MODELS else w.model
    grids = " ".join(f"{a}x{b}" for a, b in w.grids)
    family = f", {s.family}" if s.family != s.gpu else ""
    rows = [
        ("profile", facts.file), ("state", f"times {p.state}, policy {p.policy_state}"), ("model", model),
        ("shape", f"{w.layers} layers, {w.heads} heads of {w.head_dim}, {w.dtype}, batch {w.batch}"),
        ("scales", grids + (f", prefix {w.prefix}" if w.prefix else "")),
        ("silicon", f"{s.gpu} ({device_name(s)}){family}"),
    ]  # fmt: skip
    if s.memory_bytes:
        rows.append(("memory", f"{s.memory_bytes / 2**30:.1f} GiB"))
    if s.sms:
        rows.append(("streaming multiprocessors", str(s.sms)))
    rows += [("sparvar-tune", v.sparvar_tune), ("python", v.python), ("torch", v.torch), ("triton", v.triton or "none")]
    rows += [("meanings", ", ".join(f"{name} {n}" for name, n in p.meaning)), ("kernel sources, sha256", p.kernel_hash[:16])]
    code = sorted({f"{r.binary.target}, Triton {r.binary.triton}" for r in p.rows if r.binary})
    rows += [("machine code", "; ".join(code))] * bool(code)
    rows += [("weights, sha256", w.weights_sha256[:16])] if w.weights_sha256 else []
    rows += [("pairs, sha256", p.evidence.data_hash[:16])] if p.evidence else []
    rows += [("found here", line) for line in facts.here]
    return Table("What it was measured on, and with", ("what", "value"), tuple(rows), (0, 1))


def seconds(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def _ms(timing: Timing) -> str:
    return f"{timing.p50_ms:.4g}"


def _interval(s: Any) -> str:
    return f"{s.low:.2f} to {s.high:.2f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}".replace("%", " %") if whole else ""


def _big(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:,.2f}"


def _title(name: str) -> str:
    return known.title if (known := known_metric(name)) else name


def _say(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return known.say(value) if (known := known_metric(name)) else f"{value:.4g}"


def _sign(name: str, mean: float, bound: float | None) -> int:
    return known.sign if (known := known_metric(name)) else 1 if bound is None or bound <= mean else -1


def _runs(letters: Sequence[str] | str) -> str:
    """ "AAAAB" of a wide model as "A x4, B"; a narrow one letter by letter."""
    if len(letters) <= 12:
        return "".join(letters)
    runs = [(letter, len(list(found))) for letter, found in groupby(letters)]
    return ", ".join(f"{letter} x{n}" if n > 1 else letter for letter, n in runs)
