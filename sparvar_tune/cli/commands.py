"""What each command does. Everything raised as ValueError or OSError becomes one line and exit code 2 in cli.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparvar_kernels import AttentionProblem, Policy, ScaleSchedule, SparseAttention, Tile, oracle
from sparvar_kernels.variants import Cs4a, Csla, Dense, Pooled, Reuse, Variant
from sparvar_tune.adapters import Adapter, load_adapter
from sparvar_tune.catalog.gpus import GPUS
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.catalog.names import PRESETS
from sparvar_tune.cli.console import (
    file_name,
    print_profile,
    refuse_images,
    require_here,
    run_folder,
    say,
    status,
    target,
)
from sparvar_tune.cli.tune_command import tune as tune
from sparvar_tune.measure.fidelity import compare_pictures, relative_l2
from sparvar_tune.measure.pairs import held_out_pairs
from sparvar_tune.measure.timing import Stopwatch
from sparvar_tune.policy_search.menu import paper_policy
from sparvar_tune.profile import store
from sparvar_tune.profile.machine import choose_gpu, silicon, versions
from sparvar_tune.runtime import tuned as runtime

if TYPE_CHECKING:
    pass


def generate(args: argparse.Namespace) -> int:
    from sparvar_tune.cli.picture_sheet import save_png, side_by_side

    gpu, model, _, _ = target(args)
    require_here("generate", gpu)
    adapter = load_adapter(model, gpu.device)
    label = _class_index(args.label, adapter)
    if not 0 <= args.seed < 1 << 62:
        raise ValueError(f"--seed {args.seed}: want 0..2**62")
    tuned = runtime.load_profile(args.model, gpu=args.gpu, preset=args.preset, path=args.profile)
    attend = tuned.sparse_attention() if tuned.profile else adapter.dense
    if tuned.profile is None:
        say(f"no profile: {'; '.join(tuned.reasons)}; both pictures are dense (tune first)")
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
    say(f"dense {times['dense'] / 1e3:.2f} s, tuned {times['tuned'] / 1e3:.2f} s ({ratio:.2f}x, one run each); "
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
            say(f"{gpu.slug:12} {gpu.name:28} {rates}")
    if args.models:
        for model in MODELS.values():
            sizes = ", ".join(f"{r} ({len(a)} aspects)" for r, a in model.resolutions.items())
            say(f"{model.slug:14} {model.layers} layers, {model.heads} x {model.head_dim} heads, {model.dtype}; {sizes}")
    if args.gpus or args.models:
        return 0
    if args.storage and not args.trials:
        raise ValueError("show --storage: want --trials with it")
    if args.trials:
        return _show_trials(args)
    if args.seal:
        if args.profile is None:
            raise ValueError("show --seal: want --profile FILE, the edited file")
        profile = store.seal(args.profile)
        say(f"{args.profile}: sealed: it has the checksum of what it now says, for which nobody measured anything")
        print_profile(profile, args.profile)
        return 0
    if args.profile:
        print_profile(store.load(args.profile), args.profile)
        return 0
    if args.model is None:
        raise ValueError("show: want --model M, --profile FILE, --gpus or --models")
    tuned = runtime.load_profile(
        args.model, gpu=args.gpu, preset=args.preset, resolution=args.resolution, aspect=args.aspect, images=args.images
    )  # fmt: skip
    if tuned.profile is None or tuned.path is None:
        raise ValueError(f"nothing to show: {'; '.join(tuned.reasons)}; run sparvar-tune --gpu {args.gpu} --model {args.model}")
    print_profile(tuned.profile, tuned.path)
    return 0


def _show_trials(args: argparse.Namespace) -> int:
    """Of this user's last search of the target, or of every study of the model in a shared storage."""
    import pandas

    from sparvar_tune.policy_search.study import front, read_trials, shared_trials

    if args.model is None:
        raise ValueError("show --trials: want --model M with it")
    gpu, model, resolution, aspect = target(args)
    if args.storage:
        from sparvar_tune.policy_search.storage import one_line, open_existing, place

        with one_line(args.storage):
            studies = shared_trials(open_existing(args.storage), model.slug)
        where = f"in {place(args.storage)}"
    else:
        studies = {"": read_trials(run_folder(gpu, Path(file_name(model, args.preset, resolution, aspect))))}
        where = f"on {gpu.slug} ({args.preset})"
    rows: list[dict[str, Any]] = []
    for name, found in studies.items():
        best, study = front(found), {"study": name} if name else {}
        rows += [study | {"trial": f.number, **vars(f.knobs), **vars(f.verdict), "front": f in best} for f in found]
    if not rows:
        raise ValueError(f"no trials of {model.slug} {where} yet; run sparvar-tune first")
    say(pandas.DataFrame(rows).to_csv(index=False, float_format="%.5g").rstrip())
    return 0


def explain(args: argparse.Namespace) -> int:
    tuned = runtime.load_profile(
        args.model, gpu=args.gpu, preset=args.preset, resolution=args.resolution, aspect=args.aspect, images=args.images,
        path=args.profile,
    )  # fmt: skip
    say(tuned.explain())
    return 0


def verify(args: argparse.Namespace) -> int:
    from sparvar_tune.ways import verify

    gpu, model, resolution, aspect = target(args)
    refuse_images(args, model)
    require_here("verify", gpu)
    tuned = runtime.load_profile(
        args.model, gpu=args.gpu, preset=args.preset, resolution=resolution, aspect=aspect, images=args.images, path=args.profile
    )  # fmt: skip
    if tuned.profile is None:
        raise ValueError(f"nothing to verify: {'; '.join(tuned.reasons)}")
    images = store.images_of(tuned.profile.workload, model)
    if args.profile is None and images != args.images:
        raise ValueError(f"verify: no profile for {args.images} images at once; tune for that, or give --images {images}")
    return 0 if verify.verify(tuned, model, args.pairs, args.budget, args.write, say, status) else 1


def compare(args: argparse.Namespace) -> int:
    from sparvar_tune.cli.compare_table import comparison
    from sparvar_tune.measure.lpips import Lpips
    from sparvar_tune.policy_search.certify import run_pairs
    from sparvar_tune.policy_search.judge import make_attention

    gpu, model, _, _ = target(args)
    require_here("compare", gpu)
    adapter = load_adapter(model, gpu.device)
    ways: dict[str, Any] = {"dense": adapter.dense}
    ways["paper's fixed setting"] = make_attention(adapter, paper_policy(adapter.schedule, model.layers, model.heads))
    for preset in PRESETS:
        tuned = runtime.load_profile(args.model, gpu=args.gpu, preset=preset)
        if tuned.profile is None:
            say(f"left out {preset}: {'; '.join(tuned.reasons)}")
        else:
            ways[f"tuned, {preset}"] = tuned.sparse_attention()
    lpips = Lpips(args.lpips) if args.lpips else None
    pairs = held_out_pairs(adapter.num_classes, args.pairs)
    outcomes = run_pairs(adapter, ways, pairs, status, lpips)
    text, raw = comparison(outcomes, pairs, adapter, silicon(gpu, True), versions())
    say(text)
    if args.out:
        store.write_atomic(args.out, text.encode())
        store.write_atomic(args.out.with_suffix(".json"), raw.encode())
        say(f"wrote {args.out} and {args.out.with_suffix('.json')}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Prints what is here and runs every variant against the oracle on a small odd problem."""
    gpu, v, ok = choose_gpu(args.gpu), versions(), True
    require_here("check", gpu)
    say(f"sparvar-tune {v.sparvar_tune}, python {v.python}, torch {v.torch}, triton {v.triton or 'not installed'}")
    here = silicon(gpu, True)
    say(f"silicon: {gpu.slug} ({here.name}{f', {here.threads} threads' if here.threads else ''})")
    device = "cpu" if gpu.slug == "cpu" else "cuda"
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
        say(f"{'ok  ' if good else 'FAIL'} {variant.kind:7} relative error {error:.1e} against the fp64 oracle ({device}, fp32)")
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
    want = oracle.reference_attention(variant, *now, last, (decision, *before), tile)
    return relative_l2(got, want)
