"""pocketvar on recorded numbers: the tuner's whole way without a model and without a clock. For testing the search only.

What comes from the recording (`reports/spaces-cpu/pocketvar-options.json`): error and time of every option, times of whole
pictures. What is a model: PSNR = a - b * log10(sum of weight[scale] * error), fitted to the shipped profiles, plus the class
levels and 0.6 dB of chance per pair; launch configurations differ by made-up factors. Nothing here is evidence.

`python tests/shared/replayed.py` records again, on a machine with nothing else to do (half a minute).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import random
import types
import zlib
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from statistics import fmean, median
from typing import Any

import numpy
import torch
from places import ROOT

from sparvar_kernels.attention import Launch
from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import Dense, Variant
from sparvar_tune.catalog import models
from sparvar_tune.policy_search import certify, judge
from sparvar_tune.policy_search.menu import OptionTable, menu, paper_policy
from sparvar_tune.policy_search.planned_trials import SCALE_WEIGHTS
from sparvar_tune.policy_search.trial import Knobs
from sparvar_tune.profile import machine, store
from sparvar_tune.ways import search_here

FILE = ROOT / "reports" / "spaces-cpu" / "pocketvar-options.json"
PIXELS, TEXTURE = 32, 0.065  # side; standard deviation, at which SSIM falls with PSNR as it does on pocketvar
CHANCE_DB = 0.6  # pictures of a class


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@lru_cache
def recording() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


def recorded_table() -> OptionTable:
    raw = recording()
    rows = {int(s): {o: tuple(map(tuple, e)) for o, e in options.items()} for s, options in raw["error"].items()}
    return OptionTable(rows, {int(s): times for s, times in raw["time_ms"].items()}, raw["decision_ms"])


class Attention:
    """Answers nothing and takes as long as the recording says; the dense baseline is one with a policy without rules."""

    def __init__(self, adapter: Adapter, policy: Policy, launches: Mapping[int, Launch] | None = None) -> None:
        self.adapter, self.policy, self.skip_scales = adapter, policy, policy.skip_scales
        self.layer_ms = adapter.layer_ms(policy, launches or {})

    def reset(self) -> None:
        pass

    def __call__(self, q: Any, k: Any, v: Any, layer: int, scale_index: int) -> None:
        self.adapter.clock.now += self.layer_ms[layer, scale_index] / 1e3


class Adapter:
    """See `sparvar_tune.adapters.Adapter`. A state is its pair."""

    def __init__(self, clock: Clock | None = None) -> None:
        raw = recording()
        self.model = models.find_model("pocketvar")
        self.schedule, self.device = self.model.schedule("256", "1.000"), "cpu"
        self.softmax_scale, self.logit_bound, self.temperature, self.num_classes = 1.0, None, 0.7, len(raw["class_levels"])
        self.weights_sha256 = raw["weights_sha256"]
        self.table, self.clock = recorded_table(), clock or Clock()
        self.scales = tuple(self.table.time_ms)
        self.dense_ms = {s: times["dense"] * self.model.heads * self.model.layers for s, times in self.table.time_ms.items()}
        self.names = {s: {variant: name for name, variant in menu(self.schedule, s).items()} for s in self.scales}
        self.paper = paper_policy(self.schedule, self.model.layers, self.model.heads)
        nothing = Policy(("A" * self.model.heads,) * self.model.layers, ())
        self.dense, self.dense_name = Attention(self, nothing), "replayed"

    def _option(self, variant: Variant, scale: int) -> str:
        return "dense" if isinstance(variant, Dense) else self.names[scale][variant]

    def layer_ms(self, policy: Policy, launches: Mapping[int, Launch]) -> dict[tuple[int, int], float]:
        """Milliseconds of one layer's attention at one scale."""
        layers, heads = range(self.model.layers), range(self.model.heads)
        if policy == self.paper:  # its forms are not in the table; its whole picture is
            share = (recording()["paper"]["rest_ms"] - self.other_ms(policy)) / sum(self.dense_ms.values())
            return {(layer, s): share * self.dense_ms[s] / len(layers) for layer in layers for s in self.scales}
        out = dict.fromkeys(((layer, s) for layer in layers for s in self.scales), 0.0)
        for layer in layers:
            for head in heads:
                options = {s: self._option(policy.variant(layer, head, s), s) for s in self.scales}
                for s, option in options.items():
                    out[layer, s] += self.table.time_ms[s][option] * launch_factor(launches.get(s))
                out[layer, self.scales[0]] += sum(self.table.decision_ms.get(o, 0.0) for o in set(options.values()))
        return out

    def other_ms(self, policy: Policy) -> float:
        """What a rest takes beside attention."""
        raw = recording()
        if policy.skip_scales:
            return raw["drop last scale"]["rest_ms"] - sum(self.dense_ms[s] for s in self.scales[:-1])
        return raw["dense"]["rest_ms"] - sum(self.dense_ms.values())

    def psnr(self, policy: Policy) -> float:
        """Mean over classes, dB."""
        raw = recording()
        if policy == self.paper or policy.skip_scales:
            return raw["paper" if policy == self.paper else "drop last scale"]["psnr_db"]
        error = 0.0
        for weight, s in zip(SCALE_WEIGHTS, reversed(self.scales), strict=True):
            for layer, rows in enumerate(self.table.error[s]["dense"]):
                for head in range(len(rows)):
                    error += weight * self.table.error[s][self._option(policy.variant(layer, head, s), s)][layer][head]
        return raw["fit"]["a"] - raw["fit"]["b"] * math.log10(max(error, 1e-9))

    def start(self, pair: tuple[int, int], until: int) -> tuple[int, int]:
        self.clock.now += recording()["dense"]["start_ms"] / 1e3
        return pair

    def finish(self, state: tuple[int, int], attend: Any, redraw_from: int | None = None) -> torch.Tensor:
        policy, nothing = getattr(attend, "inner", attend).policy, torch.empty(1, 1, 0, 1)
        for s in self.scales:
            for layer in range(self.model.layers):
                if s not in attend.skip_scales:
                    attend(nothing, nothing, nothing, layer, s)
        self.clock.now += self.other_ms(policy) / 1e3
        noise, texture, signs = picture_parts(*state)
        if not policy.rules and not policy.skip_scales:
            return texture
        levels = recording()["class_levels"]
        psnr = self.psnr(policy) + levels[state[0]] - fmean(levels) + noise
        return texture + signs * 10 ** (-psnr / 20)

    def classes(self) -> list[str]:
        return [str(i) for i in range(self.num_classes)]

    def required(self, preset: str) -> dict[str, float]:
        return {"psnr": 34.57, "ssim": 0.93} if preset == "near-lossless" else {"psnr": 29.48, "ssim": 0.92}

    def class_levels(self) -> tuple[float, ...]:
        return tuple(recording()["class_levels"])

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        return ()


@cache
def picture_parts(label: int, seed: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """A pair's luck in dB, its dense picture and where errors go up and down."""
    rng = random.Random(f"{label} {seed}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    shape = (1, 3, PIXELS, PIXELS)
    levels = recording()["class_levels"]
    contrast = TEXTURE * 10 ** ((fmean(levels) - levels[label]) / 20)  # classes that err more have more to err about
    texture = 0.5 + contrast * torch.randn(shape, generator=generator)
    return rng.gauss(0.0, CHANCE_DB), texture, torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def launch_factor(launch: Launch | None) -> float:
    """Made up: up to 10 % by configuration, none without one."""
    return 1.0 if launch is None else 1.0 - zlib.crc32(repr(launch.config).encode()) % 100 / 1000


def install(setattr_: Callable[[object, str, object], None]) -> None:
    """Puts recorded attention and options in place of live ones, and stops the date."""
    for module in (judge, certify, search_here):
        setattr_(module, "make_attention", Attention)
    setattr_(search_here, "measure_options", lambda adapter, *_: adapter.table)
    setattr_(search_here, "shipped_policies", lambda *_: {})  # what is found rests on the recording alone
    today = types.SimpleNamespace(today=lambda: datetime.date(2026, 1, 2))
    setattr_(search_here, "datetime", types.SimpleNamespace(date=today))


def record() -> None:
    """Measures pocketvar on this CPU and fits the model of PSNR to the profiles of this checkout."""
    from sparvar_tune.adapters import load_adapter
    from sparvar_tune.catalog.gpus import GPUS
    from sparvar_tune.measure.pairs import search_pairs
    from sparvar_tune.measure.timing import Stopwatch

    adapter, stopwatch = load_adapter(models.find_model("pocketvar"), "cpu"), Stopwatch("cpu")
    table = search_here.measure_options(adapter, lambda text: None)
    first, layers, heads = judge.first_touched(adapter), adapter.model.layers, adapter.model.heads
    ways: dict[str, Any] = {"dense": adapter.dense}
    for form in ("paper", "drop last scale"):
        ways[form] = judge.make_attention(adapter, judge.build_policy(Knobs(form=form), adapter, table))
    starts: list[float] = []
    rests: dict[str, list[float]] = {name: [] for name in ways}
    for pair in search_pairs(adapter.num_classes, 5):
        states: list[Any] = []
        starts.append(stopwatch(lambda: states.append(adapter.start(pair, first))))  # noqa: B023
        for name, attend in ways.items():
            rests[name].append(stopwatch(lambda: adapter.finish(states[0], attend)))  # noqa: B023
    points = []
    for path in sorted((ROOT / "profiles" / "cpu").glob("pocketvar*.json")):
        profile, error = store.load(path), 0.0
        for weight, s in zip(SCALE_WEIGHTS, reversed(table.error), strict=True):
            names = {variant: name for name, variant in menu(adapter.schedule, s).items()}
            error += weight * sum(
                table.error[s][names[profile.policy.variant(layer, head, s)]][layer][head]
                for layer in range(layers) for head in range(heads)
            )  # fmt: skip
        points.append((path.name, error, profile.evidence.of("psnr").mean))  # type: ignore[union-attr]
    slope, level = numpy.polyfit([math.log10(e) for _, e, _ in points], [db for _, _, db in points], 1)
    compared = json.loads((ROOT / "reports" / "cpu" / "pocketvar.json").read_text())["outcomes"]["paper's fixed setting"]
    silicon = machine.silicon(GPUS["cpu"], True)

    def short(x: Any) -> Any:
        return float(f"{x:.4g}") if isinstance(x, float) else x

    raw = {
        "what": "Option table and picture times of pocketvar, recorded by tests/shared/replayed.py for replaying the search on a "
        "CPU. fit: PSNR (dB) = a - b * log10(sum of scale weight * error), least squares over the profiles named. Not evidence.",
        "recorded": datetime.date.today().isoformat(), "silicon": dataclasses.asdict(silicon),
        "weights_sha256": adapter.weights_sha256, "class_levels": list(adapter.class_levels()),
        "dense": {"start_ms": short(median(starts)), "rest_ms": short(median(rests["dense"]))},
        "paper": {"rest_ms": short(median(rests["paper"])), "psnr_db": short(fmean(o["fidelity"]["psnr"] for o in compared))},
        "drop last scale": {
            "rest_ms": short(median(rests["drop last scale"])),
            "psnr_db": next(db for name, db, _ in adapter.yardsticks() if name == "dense, last scale left out"),
        },
        "fit": {"a": short(float(level)), "b": short(float(-slope)), "scale_weights_from_last": SCALE_WEIGHTS,
                "points": [{"profile": n, "error": short(e), "psnr_db": short(db)} for n, e, db in points]},
        "decision_ms": {o: short(ms) for o, ms in table.decision_ms.items()},
        "time_ms": {s: {o: short(ms) for o, ms in times.items()} for s, times in table.time_ms.items()},
        "error": {s: {o: [[short(x) for x in row] for row in rows] for o, rows in options.items()}
                  for s, options in table.error.items()},
    }  # fmt: skip
    FILE.parent.mkdir(exist_ok=True)
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in raw.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
