"""A live model of a family we know, driven by a function that draws with it: how public models are tuned.

live_model.py is the adapter, checkouts/ opens the authors' code; boxed.py drives the models in the box, each by a file. What is
drawn with runs on the path that `apply` would take.
"""

from __future__ import annotations

from sparvar_tune.live.live_model import LiveModel

__all__ = ["LiveModel"]
