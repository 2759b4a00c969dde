"""A pocketvar small enough for tests: random weights, seven scales up to 16x16, two layers of two heads.

`python tiny.py DELAY TRIALS ARGS` is the command line with this model in pocketvar's place, for tests that need a process to
kill: every picture takes DELAY seconds more, a search ends after TRIALS trials.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import torch

from sparvar_kernels.geometry.scales import ScaleSchedule
from sparvar_tune import adapters
from sparvar_tune.catalog import models
from sparvar_tune.live import pocketvar as adapter
from sparvar_tune.pocketvar.model import PocketConfig, PocketVAR
from sparvar_tune.ways import search_here

SIDES = (1, 2, 4, 6, 8, 12, 16)
DELAY_S = 0.0  # added to every picture, for tests that interrupt


def make_model(*_args: object, **_options: object) -> PocketVAR:
    torch.manual_seed(0)
    model = PocketVAR(PocketConfig(depth=2, heads=2, head_dim=32, mlp=32, sides=SIDES)).eval()
    model.decoder = torch.nn.Sequential(torch.nn.Conv2d(16, 48, 1), torch.nn.PixelShuffle(4))  # the real one takes all the time
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.1)
    return model


def install(setattr_=setattr) -> None:
    """Puts the tiny model in pocketvar's place; `setattr_` may be a monkeypatch's."""
    row = dataclasses.replace(
        models.MODELS["pocketvar"], layers=2, heads=2, head_dim=32, width=64,
        resolutions={"256": {"1.000": ScaleSchedule.square(SIDES)}},
    )  # fmt: skip
    setattr_(models, "MODELS", {**models.MODELS, "pocketvar": row})
    setattr_(adapter, "load_pocketvar", make_model)
    setattr_(adapter.PocketAdapter, "_yardstick_rows", lambda self: [
        {"name": adapter.REDRAW, "psnr_db": 20.0, "ssim": 0.5, "psnr_db_by_class": [20.0] * 10}
    ])  # fmt: skip
    finish = adapter.PocketAdapter.finish

    def slow(self, state, attend, redraw_from=None):
        time.sleep(DELAY_S)
        return finish(self, state, attend, redraw_from)

    setattr_(adapter.PocketAdapter, "finish", slow)
    assert adapters.ADAPTERS["pocketvar"]


def stop_after(trials: int, setattr_=setattr) -> None:
    """Lets every search end after so many trials, however long they take: what a test sees hangs on no clock."""
    search = search_here.search

    def few(study, judge, until, tell, *rest, **more):
        told = []
        search(study, judge, lambda: len(told) >= trials, lambda found: (told.append(found), tell(found)), *rest, **more)

    setattr_(search_here, "search", few)


if __name__ == "__main__":
    from sparvar_tune.cli.parser import main

    install()
    DELAY_S = float(sys.argv[1])
    stop_after(int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
