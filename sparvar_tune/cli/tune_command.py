"""The command `tune`: which way to a profile there is on this machine, and the way. See commands.py for what it may raise."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparvar_kernels.backends.registry import KERNELS, kernel_for
from sparvar_tune.adapters import Adapter, load_adapter
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.models import Model
from sparvar_tune.catalog.names import CUSTOM
from sparvar_tune.cli.console import file_name, print_profile, probe_writable, refuse_images, run_folder, say, status, target
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.policy_search.menu import decision_scale, menu, paper_policy
from sparvar_tune.profile import misses, schema, store
from sparvar_tune.profile.describe import describe
from sparvar_tune.profile.machine import choose_gpu, is_here, silicon

if TYPE_CHECKING:
    from sparvar_tune.ways.search_here import Request


def tune(args: argparse.Namespace) -> int:
    if args.from_misses:
        return _tune_misses(args)
    if args.model is None:
        raise ValueError("tune: want --model M (sparvar-tune show --models lists them) or --from-misses")
    gpu, model, resolution, aspect = target(args)
    refuse_images(args, model)
    out = (args.out or store.user_folder()) / gpu.slug / file_name(model, args.preset, resolution, aspect, args.images)
    if args.storage and (model.adapter is None or not is_here(gpu)):
        say("--storage: not used, there is no search here")
    if gpu.slug == "cpu" or not is_here(gpu):
        for option in ("workers", "merge", "log"):
            if getattr(args, option):
                say(f"--{option}: not used, no GPU is timed here")
    if model.adapter is None and gpu.slug != "cpu" and is_here(gpu):
        return _time_schedule(args, gpu, model, resolution, aspect, out)
    if model.adapter is None or not is_here(gpu):
        return _predict(args, gpu, model, resolution, aspect, out)
    from sparvar_tune.ways.search_here import Request

    if args.storage and not args.dry_run:
        from sparvar_tune.policy_search.storage import open_shared

        open_shared(args.storage)  # refuses now rather than after the model was loaded
    adapter = load_adapter(model, gpu.device)
    if adapter.schedule != model.schedule(resolution, aspect):
        raise ValueError(f"{model.slug}: its adapter draws {model.default_resolution} ({model.default_aspect}) only; leave out "
                         "--resolution and --aspect")  # fmt: skip
    psnr_db, ssim = adapter.required(args.preset)
    for name, value in (("--min-psnr", args.min_psnr), ("--min-ssim", args.min_ssim)):
        if value is not None and not (math.isfinite(value) and 0 <= value <= (1 if "ssim" in name else 200)):
            raise ValueError(f"{name} {value:g}: want {'0..1' if 'ssim' in name else '0..200 dB'}")
    constraint = Constraint(psnr_db if args.min_psnr is None else args.min_psnr, ssim if args.min_ssim is None else args.min_ssim)
    preset = args.preset if (args.min_psnr, args.min_ssim) == (None, None) else CUSTOM
    out = out.with_name(file_name(model, preset, resolution, aspect))
    request = Request(
        model, resolution, aspect, gpu, preset, constraint, args.budget, args.pairs, args.seed, args.resume,
        run_folder(gpu, out), args.storage,
    )  # fmt: skip
    say(f"tuning {model.slug} on {gpu.slug} ({silicon(gpu, True).name}, {torch.get_num_threads()} threads)")
    say(f"  wanted: lower 95 % bound of PSNR >= {constraint.psnr_db:g} dB and of SSIM >= {constraint.ssim:g}, over "
         f"{args.pairs} held-out (class, seed) pairs")  # fmt: skip
    for name, db, similarity in adapter.yardsticks():
        say(f"  yardstick: {name}: {db:.2f} dB, SSIM {similarity:.4f}")
    if args.dry_run:
        return _dry_run(request, out, adapter, args)
    probe_writable(out)
    profile, log = _take_over(args, request, adapter, out) or _search(args, request, adapter, out)
    store.save(profile, out)
    if log is not None:
        _keep_log(args.log, log, gpu, out)
    say("")
    print_profile(profile, out)
    return 0


def _take_over(args: argparse.Namespace, request: Any, adapter: Adapter, out: Path) -> tuple[schema.Profile, Path] | None:
    """The profile of a policy that other silicon searched, and its log; None: there is none, it does not do here, or a CPU."""
    from sparvar_tune.ways import take_over, time_only
    from sparvar_tune.ways.search_here import NothingMeetsTheBound

    if args.search or request.gpu.slug == "cpu":
        return None
    found = take_over.find_policy(out.name, adapter.weights_sha256, request.gpu, _folders(args))
    if found is None:
        return None
    source, path = found
    say(f"taking over the policy of {path} (--search finds one of this GPU's own)")
    try:
        profile = take_over.transfer(request, adapter, source, _shop(args, request.gpu, out), say, status)
    except NothingMeetsTheBound as error:
        say(f"{error}; searching here")
        return None
    return profile, request.scratch / time_only.LOG


def _search(args: argparse.Namespace, request: Any, adapter: Adapter, out: Path) -> tuple[schema.Profile, Path | None]:
    """The profile of a policy found here, on a GPU with its fastest launches, and their log; None where none was timed."""
    from sparvar_tune.ways.search_here import tune as run

    if request.gpu.slug == "cpu":
        return run(request, adapter, say, status), None
    from sparvar_tune.ways import time_only
    from sparvar_tune.ways.search_here import workload

    shop = dataclasses.replace(_shop(args, request.gpu, out), folder=request.scratch / "launches", resume=True)
    profile = run(request, adapter, say, status, time_launches=lambda policy: time_only.time_launches(
        policy, workload(request, adapter), request.gpu, shop, say, status
    ))  # fmt: skip
    log = shop.folder / time_only.LOG
    return profile, log if log.is_file() else None


def _folders(args: argparse.Namespace) -> tuple[Path, ...]:
    """Where profiles of other silicon may lie."""
    return (*([args.out] if args.out else []), store.user_folder(), store.shipped_folder())


def _shop(args: argparse.Namespace, gpu: Gpu, out: Path) -> Any:
    from sparvar_tune.ways import time_only

    return time_only.Shop(run_folder(gpu, out), args.resume, tuple(args.merge or ()), args.workers, args.mode)


def _tune_misses(args: argparse.Namespace) -> int:
    """Every recorded miss of this GPU in turn; one that fails stays on the list and does not keep the others waiting."""
    if args.model is not None:
        raise ValueError("--from-misses: tunes every recorded model; leave out --model")
    gpu = choose_gpu(args.gpu)
    wanted = [m for m in misses.read() if m.gpu == gpu.slug]
    say(f"{len(wanted)} recorded misses of {gpu.slug} in {misses.file()}")
    failed = 0
    for i, m in enumerate(wanted):
        say(f"\nmiss {i + 1}/{len(wanted)}: {m.model} {m.resolution} ({m.aspect}), {m.preset}, images: {m.images}")
        asked = {name: getattr(m, name) for name in ("model", "preset", "resolution", "aspect", "images")}
        try:
            if tune(argparse.Namespace(**{**vars(args), "from_misses": False, **asked})) == 0 and not args.dry_run:
                misses.forget(m)
        except ValueError as error:  # NothingMeetsTheBound and ProfileError among them
            failed += 1
            say(f"not tuned: {schema.one_line(str(error))}")
    return 1 if failed else 0


def _dry_run(request: Request, out: Path, adapter: Adapter, args: argparse.Namespace) -> int:
    schedule = adapter.schedule
    say("space: every (layer, head, scale) takes one option; prices per scale and a tilt over layers choose among them")
    for scale in range(decision_scale(schedule), len(schedule)):
        say(f"  scale {scale}: {', '.join(menu(schedule, scale))}")
    kernel = KERNELS[kernel_for(adapter.device)]
    say(f"  launch: kernel {kernel.name}, " + ", ".join(f"{k} in {list(v)}" for k, v in kernel.config.space().items()))
    say(f"  fixed points: paper ({describe(paper_policy(schedule, adapter.model.layers, adapter.model.heads))}); drop last scale")
    from sparvar_tune.policy_search.storage import place
    from sparvar_tune.ways.search_here import SEARCH_PAIRS

    say(f"plan: measure every option on a capture; search on {SEARCH_PAIRS} pairs (paper's setting, bisection, then TPE); "
         f"certify on {args.pairs} others; budget {args.budget:.0f} s")  # fmt: skip
    say(f"trials go to {place(request.storage) if request.storage else request.scratch}\nprofile goes to {out}")
    return 0


def _time_schedule(args: argparse.Namespace, gpu: Gpu, model: Model, resolution: str, aspect: str, out: Path) -> int:
    """The GPU is here, the model is not: time the paper's policy on random inputs."""
    from sparvar_tune.ways import time_only

    policy = paper_policy(model.schedule(resolution, aspect), model.layers, model.heads)
    target = time_only.Target(model, gpu, args.preset, resolution, aspect, args.images, policy, args.seed)
    shop = _shop(args, gpu, out)
    say(f"{model.slug} has no adapter yet, so its pictures cannot be compared: the paper's fixed setting, marked unverified, "
         f"is timed on {silicon(gpu, True).name}")  # fmt: skip
    if args.dry_run:
        say(f"policy: {describe(policy)}\nmeasurements would go to {shop.folder / time_only.LOG}\nprofile would go to {out}")
        return 0
    probe_writable(out)

    def keep(profile: schema.Profile) -> None:
        """So far the best there is, unless an earlier run left a whole one."""
        if not _is_current(out, gpu):
            store.save(profile, out)
            say(f"  a first profile is in {out}")

    profile = time_only.time_policy(target, shop, say, status, keep)
    store.save(profile, out)
    _keep_log(args.log, shop.folder / time_only.LOG, gpu, out)
    print_profile(profile, out)
    return 0


def _is_current(path: Path, gpu: Gpu) -> bool:
    """True if a sound profile of today's kernels stands there."""
    try:
        return store.load(path).kernel_hash == store.kernel_hash(gpu)
    except ValueError:
        return False


def _keep_log(folder: Path | None, log: Path, gpu: Gpu, out: Path) -> None:
    if folder is not None:
        kept = folder / gpu.slug / f"{out.stem}.jsonl"
        store.write_atomic(kept, log.read_bytes())
        say(f"measurements are in {kept}")


def _predict(args: argparse.Namespace, gpu: Gpu, model: Model, resolution: str, aspect: str, out: Path) -> int:
    from sparvar_tune.ways.predict import predict_profile

    found = None
    if model.adapter is not None:
        from sparvar_tune.ways.take_over import find_policy

        found = find_policy(out.name, None, gpu, _folders(args))
    profile = predict_profile(model, gpu, args.preset, resolution, aspect, args.images, found[0] if found else None)
    here = is_here(gpu)
    say(f"{gpu.slug} is {'' if here else 'not '}in this machine and {model.slug} "
         f"{'has no adapter yet' if model.adapter is None else 'can be run'}: nothing can be measured, so")  # fmt: skip
    say(f"  policy:   {f'that of {found[1]}' if found else 'the fixed setting of the paper, marked unverified'}")
    say("  schedule: predicted from compiled binaries and the GPU table, marked predicted")
    if args.dry_run:
        say(f"profile would go to {out}")
        return 0
    store.save(profile, out)
    print_profile(profile, out)
    say("to make it real:")
    if model.adapter is None:
        say(f"  the policy: once {model.slug} has an adapter, sparvar-tune --gpu {gpu.slug} --model {model.slug}")
    elif found is None:
        say(f"  the policy: sparvar-tune --gpu cpu --model {model.slug} (fidelity does not depend on the GPU)")
    images = f" --images {args.images}" if args.images != 1 else ""
    say(f"  the times:  sparvar-tune verify --gpu {gpu.slug} --model {model.slug}{images} --write, on a machine with that GPU")
    return 0
