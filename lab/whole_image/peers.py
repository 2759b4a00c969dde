"""FastVAR's and ScaleKV's own public code for Infinity, from an unmodified checkout, as infinity.py draws the public model."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable

from lab.whole_image.infinity import PublicInfinity
from lab.whole_image.ladder import Rung, cudnn, flash
from sparvar_tune.live.checkouts.importing import Names, stand_ins

UNUSED: Names = {"cv2": {}, "matplotlib.pyplot": {}}  # FastVAR imports them and draws without


def open_peer(peer: str, checkout: str, slug: str, images: int = 1) -> PublicInfinity:
    """checkout: for FastVAR the folder Infinity of its repository, for ScaleKV all of it."""
    with stand_ins(UNUSED):
        driven = PublicInfinity(checkout, slug, images)
    if peer == "ScaleKV":  # as its infer_2b.py and infer_8b.py
        module = importlib.import_module(f"enable_scale_kv_{slug.removeprefix('infinity-')}")
        here = os.getcwd()
        os.chdir(checkout)  # it opens its budgets from here
        try:
            module.enable_scale_kv(driven.model, window_size=16, max_capacity=650, kernel_size=5, pooling="maxpool")
        finally:
            os.chdir(here)
    return driven


def peer_ways(peer: str) -> dict[str, Rung]:
    """Its code by either backend of attention that PyTorch has, where it asks PyTorch."""
    return {way.name: way for way in (_by(f"{peer}'s code, FlashAttention-2", flash), _by(f"{peer}'s code, cuDNN", cudnn))}


def _by(name: str, backend: Callable[[], contextlib.AbstractContextManager[None]]) -> Rung:
    held = contextlib.ExitStack()
    return Rung(name, lambda: held.enter_context(backend()), held.close)
