"""A tiny model under the monitor: a sink that keeps everything, the profile and the drawing that is watched."""

from __future__ import annotations

from collections import Counter

from made_profiles import profile

from sparvar_tune.catalog.gpus import find_gpu
from sparvar_tune.monitoring import metrics
from sparvar_tune.pocketvar.model import Generation, draw_noise
from sparvar_tune.runtime import Tuned


class Told:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.counts, self.values, self.gauges = Counter(), {}, {}

    def add(self, name, value, labels):
        self.counts[(name, *(labels[key] for key in metrics.INSTRUMENTS[name].labels))] += value
        assert set(labels) == {*metrics.BASE, *metrics.INSTRUMENTS[name].labels}

    def record(self, name, value, labels):
        self.values.setdefault((name, *(labels[key] for key in metrics.INSTRUMENTS[name].labels)), []).append(value)

    def set(self, name, value, labels):
        self.gauges[name] = value


def tuned_one(**changes) -> Tuned:
    """A profile of the tiny model with sparse rows at scales 5 and 6."""
    return Tuned(find_gpu("cpu"), profile(), None, (), **changes)


def drawing(model, seed: int = 7):
    return lambda: Generation(model, [1], draw_noise(model.schedule, 16, seed), 0.7).run().pictures()
