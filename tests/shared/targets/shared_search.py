"""`python shared_search.py URL TRIALS SLEEP_S LOG [GRACE_S [OTHER]]`: one search on a shared storage whose judge only sleeps.

Runs until the study has TRIALS finished trials. LOG gets "begin" once joined, a line per trial judged and told, and "end".
OTHER: the log of another such process. A trial then ends only when the other is judging its own as well, or has ended: two
processes that could not be at work at the same time would wait in vain.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

from sparvar_tune.policy_search import study as search
from sparvar_tune.policy_search.storage import open_shared
from sparvar_tune.policy_search.trial import Knobs, Verdict


def main(url: str, trials: str, sleep_s: str, log: str, grace_s: str = "60", other: str = "") -> None:
    shared = open_shared(url, 1, int(grace_s))
    study = search.join_study(shared, "space")

    def note(what: str, **more: object) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps({"what": what, **more}) + "\n")

    judged = [0]

    def meet(there: Path, times: int) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            text = there.read_text() if there.exists() else ""
            if text.count('"judge"') >= times or '"end"' in text:
                return
            time.sleep(0.01)
        note("waited in vain")

    def judge(knobs: Knobs) -> Verdict:
        note("judge", knobs=asdict(knobs))
        time.sleep(float(sleep_s))
        if other:
            judged[0] += 1
            meet(Path(other), judged[0])
        price = math.sqrt(knobs.price_last * knobs.price_second / 1.65)
        return Verdict(50 + 10 * math.log10(price), 60.0 / price - 1.0, {"psnr": 35.0, "ssim": 0.97}, True)

    note("begin")
    until = lambda: len(search.finished(study)) >= int(trials)  # noqa: E731
    search.search(study, judge, until, lambda f: note("told", number=f.number, knobs=asdict(f.knobs)), shared)
    note("end")


if __name__ == "__main__":
    main(*sys.argv[1:])
