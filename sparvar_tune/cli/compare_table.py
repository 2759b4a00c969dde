"""Tables for people, from raw numbers that are kept beside them."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from statistics import fmean

from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.measure.fidelity import class_mean, lower_bound
from sparvar_tune.measure.timing import paired_speedup, timing
from sparvar_tune.policy_search.certify import Outcome
from sparvar_tune.profile.schema import Silicon, Versions


def comparison(
    outcomes: Mapping[str, Sequence[Outcome]], pairs: Sequence[Pair], adapter: Adapter, machine: Silicon, versions: Versions
) -> tuple[str, str]:
    """Markdown table of every way against dense, and the raw numbers as JSON."""
    dense, last = outcomes["dense"], len(adapter.schedule) - 1
    n = len(dense)
    lines = [
        f"# {adapter.model.slug} on {machine.gpu}",
        "",
        f"{machine.name}{f', {machine.threads} threads' if machine.threads else ''}; torch {versions.torch}; fp32; "
        f"{datetime.date.today().isoformat()}. {n} held-out (class, seed) pairs, every way in rotating order in one run, dense: "
        f"{adapter.dense_name}. Times are p50 (p20..p80); ratios are medians of paired ratios with a 95 % bootstrap interval; "
        "PSNR and SSIM are against the dense picture with the same noise, with the one-sided lower 95 % bound of the mean, "
        "stratified by class. Key lists, ranking and residuals are inside the times.",
        "",
        "| | picture, s | speed-up | last scale's attention, ms a layer | speed-up | PSNR, dB (bound) | SSIM (bound) | MS-SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        whole, ratio = timing([o.ms for o in found]), paired_speedup([o.ms for o in dense], [o.ms for o in found])
        here, base = ([o.scales_ms[last] / adapter.model.layers for o in side] for side in (found, dense))
        late, gain = timing(here), paired_speedup(base, here)
        psnr, ssim = [o.fidelity.psnr_db for o in found], [o.fidelity.ssim for o in found]
        cells = [
            name, f"{whole.p50_ms / 1e3:.2f} ({whole.p20_ms / 1e3:.2f}..{whole.p80_ms / 1e3:.2f})",
            f"{ratio.median:.2f}x ({ratio.low:.2f}..{ratio.high:.2f})",
            f"{late.p50_ms:.1f} ({late.p20_ms:.1f}..{late.p80_ms:.1f})",
            f"{gain.median:.2f}x ({gain.low:.2f}..{gain.high:.2f})",
        ]  # fmt: skip
        if name == "dense":
            cells += ["same", "1", "1"]
        else:
            classes = [label for label, _ in pairs]
            low_psnr, low_ssim = lower_bound(psnr, classes), lower_bound(ssim, classes)
            cells += [f"{class_mean(psnr, classes):.2f} ({low_psnr:.2f})", f"{class_mean(ssim, classes):.4f} ({low_ssim:.4f})",
                      f"{class_mean([o.fidelity.ms_ssim for o in found], classes):.4f}"]  # fmt: skip
        distances = [o.lpips for o in found if o.lpips is not None]
        if distances:
            cells[-1] += f"; LPIPS {fmean(distances):.4f}"
        lines.append("| " + " | ".join(cells) + " |")
    for name, psnr_db, similarity in adapter.yardsticks():
        lines.append(f"| *yardstick: {name}* | | | | | {psnr_db:.2f} | {similarity:.4f} | |")
    raw = {
        "machine": dataclasses.asdict(machine), "versions": dataclasses.asdict(versions),
        "outcomes": {name: [dataclasses.asdict(o) for o in found] for name, found in outcomes.items()},
    }  # fmt: skip
    return "\n".join(lines) + "\n", json.dumps(raw, indent=1, sort_keys=True) + "\n"
