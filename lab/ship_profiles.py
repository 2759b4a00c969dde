"""Times this GPU's shipped profiles again whose policy nobody searched: `python -m lab.ship_profiles --out FOLDER`.

One process and one log, so that what two workloads share is compiled and measured once. FOLDER gets <gpu>/<name>.json and
measurements.jsonl after each profile, so a run that is cut short has lost only the one it was at. A GPU without profiles of its
own takes the list of --like.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from sparvar_tune.catalog.models import find_model
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import choose_gpu
from sparvar_tune.profile.schema import Profile, one_line
from sparvar_tune.ways.time_only import LOG, Shop, Target, time_policy


def silent(_: object) -> None:
    """In place of what is said on the way."""


def target_of(profile: Profile, gpu_slug: str) -> Target:
    w = profile.workload
    model = find_model(w.model)
    images = store.images_of(w, model)
    return Target(model, choose_gpu(gpu_slug), profile.preset, w.resolution, w.aspect, images, profile.policy, profile.seed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.ship_profiles", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--like", help="slug of the GPU whose shipped profiles are the list (default: this machine's)")
    parser.add_argument("--missing", action="store_true", help="only those that this machine's GPU has no shipped profile for")
    parser.add_argument("--only", default="", help="profiles whose file name contains this")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further profile after so long")
    args = parser.parse_args(argv)
    gpu, begun, failed = choose_gpu("auto"), time.monotonic(), 0
    paths = sorted((store.shipped_folder() / (args.like or gpu.slug)).glob("*.json"), key=lambda p: ("--" in p.stem, p.stem))
    there = {p.name for p in (store.shipped_folder() / gpu.slug).glob("*.json")} if args.missing else set()
    wanted = [p for p in paths if args.only in p.name and p.name not in there and store.load(p).policy_state == "unverified"]
    if not wanted:
        parser.error(f"nothing to time: {args.like or gpu.slug} has no shipped profile left whose policy nobody searched")
    for i, path in enumerate(wanted):
        if time.monotonic() - begun > 60 * args.minutes:
            print(f"left out for time: {', '.join(p.stem for p in wanted[i:])}", flush=True)
            return 1
        shop = Shop(args.out, resume=True)  # one log for all
        try:
            made = time_policy(
                target_of(store.load(path), gpu.slug), shop, lambda text: None, lambda text: None, lambda first: None
            )
        except ValueError as error:
            failed += 1
            print(f"{path.stem}: {one_line(str(error))}", flush=True)
            continue
        store.save(made, args.out / gpu.slug / path.name)
        gains = ", ".join(f"{r.scale_index}: {r.speedup.median:.2f}x" for r in made.rows if r.speedup)
        print(f"[{time.monotonic() - begun:4.0f} s] {i + 1}/{len(wanted)} {path.stem}: {gains}; {LOG}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
