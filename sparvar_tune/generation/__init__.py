"""What a picture's generation does otherwise, beside attention: steps, each a frozen value in `Policy.steps`.

A step (`sparvar_kernels.policy.Step`) is one file here and a row in `STEPS`: its fields, integers or tuples of them, what may be
said with it (`why_not`), its words, and the oracle that its pictures are held against. It is keyed by scale index, never by
width, so that it means the same at any aspect. Who draws the picture says which kinds of steps it can do: a family of live
models by its `STEPS`, an adapter that tuning drives by its `steps`.
"""

from __future__ import annotations

from sparvar_tune.generation.cache_budget import CacheBudget
from sparvar_tune.generation.drop_unconditional import DropUnconditional
from sparvar_tune.generation.halves import decides_apart, halves_apart
from sparvar_tune.generation.precision import Precision
from sparvar_tune.generation.prune_tokens import PruneTokens
from sparvar_tune.generation.registry import STEPS, drop_from, skip_from, why_not_steps, works_inside
from sparvar_tune.generation.skip_scales import SkipScales

__all__ = [
    "STEPS", "CacheBudget", "DropUnconditional", "Precision", "PruneTokens", "SkipScales", "decides_apart", "drop_from",
    "halves_apart", "skip_from", "why_not_steps", "works_inside",
]  # fmt: skip
