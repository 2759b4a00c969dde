"""What each command does. Everything raised as ValueError or OSError becomes one line and exit code 2 in cli.py."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparvar_kernels import AttentionProblem, Policy, ScaleSchedule, SparseAttention, Tile, reference
from sparvar_kernels.registry import KERNELS, kernel_for
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant
from sparvar_tune import misses, profiles, runtime, schema
from sparvar_tune.adapters import Adapter, load_adapter
from sparvar_tune.fidelity import Constraint, compare_pictures, relative_l2
from sparvar_tune.gpus import GPUS, Gpu
from sparvar_tune.machine import choose_gpu, is_here, silicon, versions
from sparvar_tune.measure import Stopwatch
from sparvar_tune.models import MAX_IMAGES, MODELS, Model, find_model
from sparvar_tune.names import CUSTOM, PRESETS
from sparvar_tune.pairs import held_out_pairs
from sparvar_tune.policies import decision_scale, describe, menu, paper_policy

if TYPE_CHECKING:
    from sparvar_tune.tune import Request


def _status(text: str) -> None:
    """A line that the next one overwrites; silent when nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text, flush=True)


def _target(args: argparse.Namespace) -> tuple[Gpu, Model, str, str]:
    gpu, model = choose_gpu(args.gpu), find_model(args.model)
    resolution, aspect = args.resolution or model.default_resolution, args.aspect or model.default_aspect
    model.schedule(resolution, aspect)
    return gpu, model, resolution, aspect


def _file_name(model: Model, preset: str, resolution: str, aspect: str, images: int = 1) -> str:
    default = (model.default_resolution, model.default_aspect)
    return profiles.profile_name(model.slug, preset, resolution, aspect, default, images)


def _refuse_images(args: argparse.Namespace, model: Model) -> None:
    if args.images > MAX_IMAGES:
        raise ValueError(f"--images {args.images}: want 1..{MAX_IMAGES}")
    if model.adapter is not None and args.images != 1:
        raise ValueError(f"--images {args.images}: {model.slug}'s adapter draws one image at a time; leave out --images")


def run_folder(gpu: Gpu, profile: Path) -> Path:
    """Where trials and measurements towards a profile file are kept."""
    return profiles.user_folder().parent / "runs" / f"{gpu.slug}--{profile.stem}"


def tune(args: argparse.Namespace) -> int:
    if args.from_misses:
        return _tune_misses(args)
    if args.model is None:
        raise ValueError("tune: want --model M (sparvar-tune show --models lists them) or --from-misses")
    gpu, model, resolution, aspect = _target(args)
    _refuse_images(args, model)
    out = (args.out or profiles.user_folder()) / gpu.slug / _file_name(model, args.preset, resolution, aspect, args.images)
    if args.storage and (model.adapter is None or not is_here(gpu)):
        _say("--storage: not used, there is no search here")
    if model.adapter is None and gpu.slug != "cpu" and is_here(gpu):
        return _time_schedule(args, gpu, model, resolution, aspect, out)
    if model.adapter is None or not is_here(gpu):
        return _predict(args, gpu, model, resolution, aspect, out)
    from sparvar_tune.tune import Request
    from sparvar_tune.tune import tune as run

    if args.storage and not args.dry_run:
        from sparvar_tune.storage import open_shared

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
    out = out.with_name(_file_name(model, preset, resolution, aspect))
    request = Request(
        model, resolution, aspect, gpu, preset, constraint, args.budget, args.pairs, args.seed, args.resume,
        run_folder(gpu, out), args.storage,
    )  # fmt: skip
    _say(f"tuning {model.slug} on {gpu.slug} ({silicon(gpu, True).name}, {torch.get_num_threads()} threads)")
    _say(f"  wanted: lower 95 % bound of PSNR >= {constraint.psnr_db:g} dB and of SSIM >= {constraint.ssim:g}, over "
         f"{args.pairs} held-out (class, seed) pairs")  # fmt: skip
    for name, db, similarity in adapter.yardsticks():
        _say(f"  yardstick: {name}: {db:.2f} dB, SSIM {similarity:.4f}")
    if args.dry_run:
        return _dry_run(request, out, adapter, args)
    _probe_writable(out)
    profile = _take_over(args, request, adapter, out) or run(
        request, adapter, _say, _status, time_launches=_launch_timer(args, request, adapter, out)
    )
    profiles.save(profile, out)
    _say("")
    _print_profile(profile, out)
    return 0


def _take_over(args: argparse.Namespace, request: Any, adapter: Adapter, out: Path) -> schema.Profile | None:
    """The profile of a policy that other silicon has searched; None where there is none, it does not do here, or on a CPU."""
    from sparvar_tune import timed, transfer
    from sparvar_tune.tune import NothingMeetsTheBound

    if args.search or request.gpu.slug == "cpu":
        return None
    folders = (*([args.out] if args.out else []), profiles.user_folder(), profiles.shipped_folder())
    found = transfer.find_policy(out.name, adapter.weights_sha256, request.gpu, folders)
    if found is None:
        return None
    source, path = found
    _say(f"taking over the policy of {path} (--search finds one of this GPU's own)")
    try:
        profile = transfer.transfer(request, adapter, source, _shop(args, request.gpu, out), _say, _status)
    except NothingMeetsTheBound as error:
        _say(f"{error}; searching here")
        return None
    _keep_log(args.log, request.scratch / timed.LOG, request.gpu, out)
    return profile


def _launch_timer(args: argparse.Namespace, request: Any, adapter: Adapter, out: Path) -> Any:
    """On a GPU the function that finds a policy's launches; None on a CPU."""
    if request.gpu.slug == "cpu":
        return None
    from sparvar_tune import timed
    from sparvar_tune.tune import workload

    shop = dataclasses.replace(_shop(args, request.gpu, out), folder=run_folder(request.gpu, out) / "launches", resume=True)
    return lambda policy: timed.time_launches(policy, workload(request, adapter), request.gpu, shop, _say, _status)


def _shop(args: argparse.Namespace, gpu: Gpu, out: Path) -> Any:
    from sparvar_tune import timed

    return timed.Shop(run_folder(gpu, out), args.resume, tuple(args.merge or ()), args.workers, args.mode)


def _tune_misses(args: argparse.Namespace) -> int:
    """Every recorded miss of this GPU in turn; one that fails stays on the list and does not keep the others waiting."""
    if args.model is not None:
        raise ValueError("--from-misses: tunes every recorded model; leave out --model")
    gpu = choose_gpu(args.gpu)
    wanted = [m for m in misses.read() if m.gpu == gpu.slug]
    _say(f"{len(wanted)} recorded misses of {gpu.slug} in {misses.file()}")
    failed = 0
    for i, m in enumerate(wanted):
        _say(f"\nmiss {i + 1}/{len(wanted)}: {m.model} {m.resolution} ({m.aspect}), {m.preset}, images: {m.images}")
        asked = {name: getattr(m, name) for name in ("model", "preset", "resolution", "aspect", "images")}
        try:
            if tune(argparse.Namespace(**{**vars(args), "from_misses": False, **asked})) == 0 and not args.dry_run:
                misses.forget(m)
        except ValueError as error:  # NothingMeetsTheBound and ProfileError among them
            failed += 1
            _say(f"not tuned: {schema.one_line(str(error))}")
    return 1 if failed else 0


def _probe_writable(out: Path) -> None:
    """Fails before the work rather than after it if the profile could not be written."""
    probe = out.parent / f".{out.name}.probe"
    profiles.write_atomic(probe, b"")
    probe.unlink()


def _dry_run(request: Request, out: Path, adapter: Adapter, args: argparse.Namespace) -> int:
    schedule = adapter.schedule
    _say("space: every (layer, head, scale) takes one option; prices per scale and a tilt over layers choose among them")
    for scale in range(decision_scale(schedule), len(schedule)):
        _say(f"  scale {scale}: {', '.join(menu(schedule, scale))}")
    kernel = KERNELS[kernel_for(adapter.device)]
    _say(f"  launch: kernel {kernel.name}, " + ", ".join(f"{k} in {list(v)}" for k, v in kernel.config.space().items()))
    _say(
        f"  fixed points: paper ({describe(paper_policy(schedule, adapter.model.layers, adapter.model.heads))}); drop last scale"
    )
    from sparvar_tune.storage import place
    from sparvar_tune.tune import SEARCH_PAIRS

    _say(f"plan: measure every option on a capture; search on {SEARCH_PAIRS} pairs (paper's setting, bisection, then TPE); "
         f"certify on {args.pairs} others; budget {args.budget:.0f} s")  # fmt: skip
    _say(f"trials go to {place(request.storage) if request.storage else request.scratch}\nprofile goes to {out}")
    return 0


def _time_schedule(args: argparse.Namespace, gpu: Gpu, model: Model, resolution: str, aspect: str, out: Path) -> int:
    """The GPU is here, the model is not: time the paper's policy on random inputs."""
    from sparvar_tune import timed

    policy = paper_policy(model.schedule(resolution, aspect), model.layers, model.heads)
    target = timed.Target(model, gpu, args.preset, resolution, aspect, args.images, policy, args.seed)
    shop = _shop(args, gpu, out)
    _say(f"{model.slug} has no adapter yet, so its pictures cannot be compared: the paper's fixed setting, marked unverified, "
         f"is timed on {silicon(gpu, True).name}")  # fmt: skip
    if args.dry_run:
        _say(f"policy: {describe(policy)}\nmeasurements would go to {shop.folder / timed.LOG}\nprofile would go to {out}")
        return 0
    _probe_writable(out)

    def keep(profile: schema.Profile) -> None:
        """So far the best there is, unless an earlier run left a whole one."""
        if not _is_current(out, gpu):
            profiles.save(profile, out)
            _say(f"  a first profile is in {out}")

    profile = timed.time_policy(target, shop, _say, _status, keep)
    profiles.save(profile, out)
    _keep_log(args.log, shop.folder / timed.LOG, gpu, out)
    _print_profile(profile, out)
    return 0


def _is_current(path: Path, gpu: Gpu) -> bool:
    """True if a sound profile of today's kernels stands there."""
    try:
        return profiles.load(path).kernel_hash == profiles.kernel_hash(gpu)
    except ValueError:
        return False


def _keep_log(folder: Path | None, log: Path, gpu: Gpu, out: Path) -> None:
    if folder is not None:
        kept = folder / gpu.slug / f"{out.stem}.jsonl"
        profiles.write_atomic(kept, log.read_bytes())
        _say(f"measurements are in {kept}")


def bench(args: argparse.Namespace) -> int:
    """The kernel table: measured here, or again from the raw numbers of a run."""
    import json
    import re

    from sparvar_tune import kernel_bench
    from sparvar_tune.recorded import write_space

    out = args.out.with_suffix(".md")
    if args.source is not None:
        try:
            raw = json.loads(args.source.read_text("utf-8"))
            text = kernel_bench.render(raw)
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{args.source}: not the raw numbers of a bench run ({type(error).__name__}: {error})") from None
        profiles.write_atomic(out, text.encode())
        _say(f"wrote {out}")
        return 0
    gpu = choose_gpu(args.gpu)
    if gpu.slug == "cpu" or not is_here(gpu):
        raise ValueError(f"bench: {gpu.slug} is no GPU of this machine; run it where one is, or give --from FILE.json")
    _probe_writable(out)

    def keep(raw: dict[str, Any]) -> None:
        profiles.write_atomic(out.with_suffix(".json"), (json.dumps(raw, indent=1) + "\n").encode())
        profiles.write_atomic(out, kernel_bench.render(raw).encode())

    kernel_bench.measure_all(_say, keep, args.only)
    _say(f"wrote {out} and {out.with_suffix('.json')}")
    for case in kernel_bench.cases() if args.spaces else ():
        if case.name in kernel_bench.RECORDED and args.only in case.name:
            path = args.spaces / f"{re.sub('[^a-z0-9]+', '-', case.name.lower()).strip('-')}.json"
            write_space(kernel_bench.record_space(case), path)
            _say(f"wrote {path}")
    return 0


def _predict(args: argparse.Namespace, gpu: Gpu, model: Model, resolution: str, aspect: str, out: Path) -> int:
    from sparvar_tune.predict import predict_profile

    found = None
    if model.adapter is not None:
        from sparvar_tune.transfer import find_policy

        folders = (*([args.out] if args.out else []), profiles.user_folder(), profiles.shipped_folder())
        found = find_policy(out.name, None, gpu, folders)
    profile = predict_profile(model, gpu, args.preset, resolution, aspect, args.images, found[0] if found else None)
    here = is_here(gpu)
    _say(f"{gpu.slug} is {'' if here else 'not '}in this machine and {model.slug} "
         f"{'has no adapter yet' if model.adapter is None else 'can be run'}: nothing can be measured, so")  # fmt: skip
    _say(f"  policy:   {f'that of {found[1]}' if found else 'the fixed setting of the paper, marked unverified'}")
    _say("  schedule: predicted from compiled binaries and the GPU table, marked predicted")
    if args.dry_run:
        _say(f"profile would go to {out}")
        return 0
    profiles.save(profile, out)
    _print_profile(profile, out)
    _say("to make it real:")
    if model.adapter is None:
        _say(f"  the policy: once {model.slug} has an adapter, sparvar-tune --gpu {gpu.slug} --model {model.slug}")
    elif found is None:
        _say(f"  the policy: sparvar-tune --gpu cpu --model {model.slug} (fidelity does not depend on the GPU)")
    images = f" --images {args.images}" if args.images != 1 else ""
    _say(f"  the times:  sparvar-tune verify --gpu {gpu.slug} --model {model.slug}{images} --write, on a machine with that GPU")
    return 0


def _print_profile(profile: schema.Profile, path: Path) -> None:
    w, e, g = profile.workload, profile.evidence, profile.generation
    _say(f"{path}")
    _say(f"  {w.model} {w.resolution} ({w.aspect}), batch {w.batch}, {profile.preset}, on {profile.silicon.name}: "
         f"{profile.state}, policy {profile.policy_state}")  # fmt: skip
    _say(f"  policy: {describe(profile.policy)}")
    if e is not None:
        _say(f"  pictures: PSNR {e.psnr_mean_db:.2f} dB, lower {e.confidence:.1%} bound {e.psnr_lower_db:.2f} (wanted "
             f"{e.required_psnr_db:.2f}); SSIM {e.ssim_mean:.4f}, lower bound {e.ssim_lower:.4f} (wanted {e.required_ssim:g}); "
             f"MS-SSIM {e.ms_ssim_mean:.4f}; {e.n} held-out pairs")  # fmt: skip
        for y in e.yardsticks:
            _say(f"  yardstick: {y.name}: {y.psnr_db:.2f} dB, SSIM {y.ssim:.4f}")
    if g is not None:
        _say(f"  whole picture: {g.dense.p50_ms:.0f} -> {g.tuned.p50_ms:.0f} ms, {g.speedup.median:.2f}x "
             f"(95 % interval {g.speedup.low:.2f}..{g.speedup.high:.2f}, n={g.speedup.n}) against {g.dense_name}")  # fmt: skip
    for row in profile.rows:
        config = ", ".join(f"{k}={v}" for k, v in row.config)
        if row.tuned and row.dense and row.speedup:
            cost = f"{row.dense.p50_ms:.2f} -> {row.tuned.p50_ms:.2f} ms a layer, {row.speedup.median:.2f}x"
        else:
            cost = f"{row.dense_predicted_ms:.3f} -> {row.tuned_predicted_ms:.3f} ms a layer, predicted"
        _say(f"  scale {row.scale_index}: {cost} ({row.kernel}: {config})")
    for note in profile.notes:
        _say(f"  note: {note}")


def generate(args: argparse.Namespace) -> int:
    from sparvar_tune.sheet import save_png, side_by_side

    gpu, model, _, _ = _target(args)
    adapter = load_adapter(model, gpu.device)
    label = _class_index(args.label, adapter)
    if not 0 <= args.seed < 1 << 62:
        raise ValueError(f"--seed {args.seed}: want 0..2**62")
    tuned = runtime.load_profile(args.model, gpu=args.gpu, preset=args.preset, path=args.profile)
    attend = tuned.sparse_attention() if tuned.profile else adapter.dense
    if tuned.profile is None:
        _say(f"no profile: {'; '.join(tuned.reasons)}; both pictures are dense (tune first)")
    stopwatch, pictures, times = Stopwatch(adapter.device), {}, {}
    adapter.finish(adapter.start((label, args.seed), 8), adapter.dense)  # warm-up
    for name, way in (("dense", adapter.dense), ("tuned", attend)):
        made: list[torch.Tensor] = []
        times[name] = stopwatch(lambda: made.append(adapter.finish(adapter.start((label, args.seed), 0), way)))  # noqa: B023
        pictures[name] = made[0]
    f = compare_pictures(pictures["tuned"], pictures["dense"])
    difference = (pictures["tuned"] - pictures["dense"]).abs() * 8
    ratio = times["dense"] / times["tuned"]
    image = side_by_side([
        (pictures["dense"][0], f"dense: {times['dense'] / 1e3:.2f} s", f"{adapter.classes()[label]}, seed {args.seed}"),
        (pictures["tuned"][0], f"tuned: {times['tuned'] / 1e3:.2f} s, {ratio:.2f}x",
         f"PSNR {f.psnr_db:.2f} dB, SSIM {f.ssim:.4f} against dense, same noise"),
        (difference[0], "difference x 8", "black: identical"),
    ])  # fmt: skip
    save_png(image, args.out)
    _say(f"dense {times['dense'] / 1e3:.2f} s, tuned {times['tuned'] / 1e3:.2f} s ({ratio:.2f}x, one run each); "
         f"PSNR {f.psnr_db:.2f} dB, SSIM {f.ssim:.4f}; wrote {args.out}")  # fmt: skip
    return 0


def _class_index(text: str, adapter: Adapter) -> int:
    names = list(adapter.classes())
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ValueError(f"--class {text!r}: want 0..{len(names) - 1} or one of {', '.join(names)}")


def show(args: argparse.Namespace) -> int:
    if args.gpus:
        for gpu in GPUS.values():
            rates = (
                f"{gpu.sms} SMs, {gpu.memory_gbps:g} GB/s, {gpu.bf16_tflops:g} TFLOP/s bf16"
                if gpu.sms
                else "measured, not predicted"
            )
            _say(f"{gpu.slug:12} {gpu.name:28} {rates}")
    if args.models:
        for model in MODELS.values():
            sizes = ", ".join(f"{r} ({len(a)} aspects)" for r, a in model.resolutions.items())
            _say(f"{model.slug:14} {model.layers} layers, {model.heads} x {model.head_dim} heads, {model.dtype}; {sizes}")
    if args.gpus or args.models:
        return 0
    if args.trials:
        return _show_trials(args)
    if args.seal:
        if args.profile is None:
            raise ValueError("show --seal: want --profile FILE, the edited file")
        profile = profiles.seal(args.profile)
        _say(f"{args.profile}: sealed: it has the checksum of what it now says, for which nobody measured anything")
        _print_profile(profile, args.profile)
        return 0
    if args.profile:
        _print_profile(profiles.load(args.profile), args.profile)
        return 0
    if args.model is None:
        raise ValueError("show: want --model M, --profile FILE, --gpus or --models")
    tuned = runtime.load_profile(
        args.model, gpu=args.gpu, preset=args.preset, resolution=args.resolution, aspect=args.aspect, images=args.images
    )  # fmt: skip
    if tuned.profile is None or tuned.path is None:
        raise ValueError(f"nothing to show: {'; '.join(tuned.reasons)}; run sparvar-tune --gpu {args.gpu} --model {args.model}")
    _print_profile(tuned.profile, tuned.path)
    return 0


def _show_trials(args: argparse.Namespace) -> int:
    import pandas

    from sparvar_tune.search import front, read_trials

    gpu, model, resolution, aspect = _target(args)
    rows = read_trials(run_folder(gpu, Path(_file_name(model, args.preset, resolution, aspect))))
    if not rows:
        raise ValueError(f"no trials of {model.slug} on {gpu.slug} ({args.preset}) yet; run sparvar-tune first")
    best = front(rows)
    frame = pandas.DataFrame([
        {"trial": f.number, **dataclasses.asdict(f.knobs), **dataclasses.asdict(f.verdict), "front": f in best} for f in rows
    ])  # fmt: skip
    _say(frame.to_csv(index=False, float_format="%.5g").rstrip())
    return 0


def explain(args: argparse.Namespace) -> int:
    tuned = runtime.load_profile(
        args.model, gpu=args.gpu, preset=args.preset, resolution=args.resolution, aspect=args.aspect, images=args.images,
        path=args.profile,
    )  # fmt: skip
    _say(tuned.explain())
    return 0


def verify(args: argparse.Namespace) -> int:
    from sparvar_tune import verifying

    gpu, model, resolution, aspect = _target(args)
    _refuse_images(args, model)
    if not is_here(gpu):
        raise ValueError(f"verify: {gpu.slug} is not in this machine; run it where it is")
    tuned = runtime.load_profile(
        args.model, gpu=args.gpu, preset=args.preset, resolution=resolution, aspect=aspect, images=args.images, path=args.profile
    )  # fmt: skip
    if tuned.profile is None:
        raise ValueError(f"nothing to verify: {'; '.join(tuned.reasons)}")
    images = profiles.images_of(tuned.profile.workload, model)
    if args.profile is None and images != args.images:
        raise ValueError(f"verify: no profile for {args.images} images at once; tune for that, or give --images {images}")
    return 0 if verifying.verify(tuned, model, args.pairs, args.budget, args.write, _say, _status) else 1


def compare(args: argparse.Namespace) -> int:
    from sparvar_tune.certify import run_pairs
    from sparvar_tune.judge import make_attention
    from sparvar_tune.lpips import Lpips
    from sparvar_tune.report import comparison

    gpu, model, _, _ = _target(args)
    if not is_here(gpu):
        raise ValueError(f"compare: {gpu.slug} is not in this machine; run it where it is")
    adapter = load_adapter(model, gpu.device)
    ways: dict[str, Any] = {"dense": adapter.dense}
    ways["paper's fixed setting"] = make_attention(adapter, paper_policy(adapter.schedule, model.layers, model.heads))
    for preset in PRESETS:
        tuned = runtime.load_profile(args.model, gpu=args.gpu, preset=preset)
        if tuned.profile is None:
            _say(f"left out {preset}: {'; '.join(tuned.reasons)}")
        else:
            ways[f"tuned, {preset}"] = tuned.sparse_attention()
    lpips = Lpips(args.lpips) if args.lpips else None
    pairs = held_out_pairs(adapter.num_classes, args.pairs)
    outcomes = run_pairs(adapter, ways, pairs, _status, lpips)
    text, raw = comparison(outcomes, pairs, adapter, silicon(gpu, True), versions())
    _say(text)
    if args.out:
        profiles.write_atomic(args.out, text.encode())
        profiles.write_atomic(args.out.with_suffix(".json"), raw.encode())
        _say(f"wrote {args.out} and {args.out.with_suffix('.json')}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Prints what is here and runs every variant against the oracle on a small odd problem."""
    v, ok = versions(), True
    _say(f"sparvar-tune {v.sparvar_tune}, python {v.python}, torch {v.torch}, triton {v.triton or 'not installed'}")
    gpu = choose_gpu(args.gpu)
    here = silicon(gpu, is_here(gpu))
    _say(f"silicon: {gpu.slug} ({here.name}{f', {here.threads} threads' if here.threads else ''})")
    device = "cuda" if gpu.slug != "cpu" and is_here(gpu) else "cpu"
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 5), (7, 6), (9, 11)), prefix=3)
    tile = Tile(4, 3)
    variants: list[Variant] = [
        Dense(), Csla((-1, -1, 3, 3, 5), 2, tile), Csla((-1, -1, 3, 3, 5), 2, tile, decision_scale=3),
        Cs4a(3, 0.4, tile), Pooled(3, 2), Reuse(3),
    ]  # fmt: skip
    for variant in variants:
        error = _oracle_error(variant, schedule, device)
        good = error < 1e-4
        ok &= good
        _say(f"{'ok  ' if good else 'FAIL'} {variant.kind:7} relative error {error:.1e} against the fp64 oracle ({device}, fp32)")
    return 0 if ok else 1


def _oracle_error(variant: Variant, schedule: ScaleSchedule, device: str) -> float:
    from sparvar_kernels.variants import at_decision

    decision, last = (AttentionProblem(schedule, s, 1, 2, 32, logit_bound=8.0) for s in (3, 4))
    before, now = decision.make_inputs(0), last.make_inputs(1)
    attend = SparseAttention(Policy.uniform(1, 2, {} if isinstance(variant, Dense) else {4: variant}), schedule, logit_bound=8.0)
    for problem, inputs in ((decision, before), (last, now)):
        q, k, v = (t.to(device) for t in inputs)
        got = attend(q, k, v, 0, problem.scale_index).cpu()
    tile = getattr(at_decision(variant, schedule, 4), "tile", None)
    want = reference.reference_attention(variant, *now, last, (decision, *before), tile)
    return relative_l2(got, want)
