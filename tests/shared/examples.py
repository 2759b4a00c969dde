"""A profile with every kind of field filled, for tests of files and of finding them."""

from __future__ import annotations

import dataclasses

from sparvar_kernels import Cs4a, Csla, Policy, Pooled, Reuse, Rule, Tile
from sparvar_tune.profile import identity, schema

MEANING = identity.meaning_of(Policy((), ()), ["cpu", "triton", "cs4a", "csla", "pooled", "reuse"])


def timing(ms: float) -> schema.Timing:
    return schema.Timing(ms / 2, ms, ms * 2, 32)


def metrics(mean: float = 36.0, bound: float = 35.0, required: float = 34.5) -> tuple[tuple[str, schema.Measured], ...]:
    return (
        ("ms_ssim", schema.Measured(0.99, 0.985, None)), ("psnr", schema.Measured(mean, bound, required)),
         ("ssim", schema.Measured(0.97, 0.96, 0.93)),
    )  # fmt: skip


def example() -> schema.Profile:
    yardstick = schema.Yardstick("redraw", 34.5, 0.95)
    grids = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16))
    rules = (
        Rule(5, "A", Cs4a(4, 0.1, Tile(8, 8))), Rule(5, "B", Csla((-1, -1, -1, 1, 3, 5, 7), 3, Tile(8, 16), "exact", 4)),
        Rule(6, "A", Pooled(3, 2)), Rule(6, "B", Reuse(4)),
    )  # fmt: skip
    row = schema.Row(
        5, "cpu", (("score_elements", 4096),), "measured", "sdpa", timing(1.0), timing(3.0), schema.Speedup(3.0, 2.9, 3.1, 32)
    )
    return schema.Profile(
        schema=schema.SCHEMA, created="2026-11-23", preset="near-lossless", state="measured",
        policy=Policy(("ABC", "BBA"), rules), policy_state="measured", policy_source="a test",
        evidence=schema.Evidence(32, 0.95, metrics(), "ab" * 32, (yardstick,), "2026-11-23",
                                 "cd" * 32, MEANING[:2]),
        workload=schema.Workload("pocketvar", "256", "1.000", grids, 0, 2, 3, 64, "fp32", 1, 1.0, 20.0, "cd" * 32),
        silicon=schema.Silicon("cpu", "cpu", "A Processor", None, None, None, 2),
        versions=schema.Versions("0.1.0", "3.11.7", "2.13.0", None), meaning=MEANING, kernel_hash="ef" * 32,
        generation=schema.WholePicture("sdpa", timing(3000.0), timing(1500.0), schema.Speedup(2.0, 1.9, 2.1, 32)),
        rows=(row, dataclasses.replace(row, scale_index=6)), seed=0, trials=12, notes=("a note",),
    )  # fmt: skip


HUGE = 10**400  # an integer that no float holds


def paths_of(value, path=()):
    """The way to every value in what JSON holds: keys and positions."""
    yield path
    if isinstance(value, dict):
        for k, v in value.items():
            yield from paths_of(v, (*path, k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from paths_of(v, (*path, i))


def changed(part, **changes):
    return dataclasses.replace(example(), **{part: dataclasses.replace(getattr(example(), part), **changes)})


def fails(error):
    def call(*_args, **_kwargs):
        raise error

    return call
