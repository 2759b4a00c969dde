"""A policy timed on this machine's GPU: the workshop it needs, and the profile that comes of it where nothing draws pictures."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparvar_kernels.policy import Policy
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.models import Model
from sparvar_tune.launch_search.choose import ChosenLaunches, LaunchSearch
from sparvar_tune.launch_search.log import Identity, Log, Workshop
from sparvar_tune.policy_search.menu import PAPER_SOURCE, UNVERIFIED
from sparvar_tune.profile.files import exclusive, set_aside
from sparvar_tune.profile.identity import kernel_hash, stamp
from sparvar_tune.profile.machine import is_here, silicon, versions
from sparvar_tune.profile.schema import SCHEMA, Profile, Silicon, Versions, Workload

LOG = "measurements.jsonl"


@dataclass(frozen=True)
class Shop:
    """How to measure. folder: where the run's log lies; None: nothing is kept. resume: go on with it. merge: other logs to use.

    workers: GPUs to time on at once, None for all that are visible. mode: "eager" or "graph" calls.
    """

    folder: Path | None
    resume: bool = False
    merge: tuple[Path, ...] = ()
    workers: int | None = None
    mode: str = "eager"


@contextmanager
def workshop(gpu: Gpu, shop: Shop) -> Iterator[Workshop]:
    """The workshop on this machine, its folder held. Raises ValueError: folder busy, a log to merge missing, too few GPUs."""
    environments = gpu_environments(shop.workers)
    for file in shop.merge:
        if not file.is_file():
            raise ValueError(f"{file}: no such log; want a {LOG} of another run on {gpu.slug}")
    v = versions()
    identity = Identity(gpu.slug, torch.cuda.get_device_name(), kernel_hash(gpu), v.torch, v.triton, shop.mode)
    path = shop.folder / LOG if shop.folder else None
    with exclusive(path.parent) if path else nullcontext():
        if path and not shop.resume:
            set_aside(path)
        with Workshop(identity, Log(path, shop.merge), os.cpu_count() or 2, environments) as made:
            yield made


def gpu_environments(workers: int | None) -> list[dict[str, str]]:
    """One worker per visible GPU that is like the first; raises ValueError where fewer are here than asked for.

    A worker plans on one thread: torch's threads spin, and those of two processes on the same cores made planning 5x slower.
    """
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(i) for i in range(len(names))]
    alike = [visible[i] for i, name in enumerate(names) if name == names[0]]
    if workers is not None and not 1 <= workers <= len(alike):
        raise ValueError(
            f"--workers {workers}: want 1..{len(alike)}, one for each GPU like the first ({', '.join(names) or 'none'})"
        )
    path = os.pathsep.join(p for p in sys.path if p)
    return [{"CUDA_VISIBLE_DEVICES": which, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"} for which in alike[:workers]]


@dataclass(frozen=True)
class Target:
    """What to time: a model at a resolution and aspect, so many images at once, by a policy nobody verified on it."""

    model: Model
    gpu: Gpu
    preset: str
    resolution: str
    aspect: str
    images: int
    policy: Policy
    seed: int = 0

    @property
    def workload(self) -> Workload:
        one = Workload.of(self.model, self.resolution, self.aspect)
        return replace(one, batch=one.batch * self.images)


def time_launches(
    policy: Policy, workload: Workload, gpu: Gpu, shop: Shop, say: Callable[[str], None], status: Callable[[str], None],
    keep: Callable[[ChosenLaunches], None] = lambda found: None,
) -> ChosenLaunches:  # fmt: skip
    """The fastest launches of a policy on this machine's GPU; `keep` gets the first usable ones.

    Raises ValueError: no configuration runs, folder busy; ProfileError when measurements cannot be kept.
    """
    with workshop(gpu, shop) as made:
        return LaunchSearch(workload, policy, gpu, torch.cuda.get_device_capability(), made, say, status).find(keep)


def time_policy(
    target: Target, shop: Shop, say: Callable[[str], None], status: Callable[[str], None], keep: Callable[[Profile], None]
) -> Profile:
    """The profile of the policy, every sparse scale timed here; `keep` gets a usable one as soon as there is one.

    Raises what `time_launches` raises.
    """
    here, tuned_with = silicon(target.gpu, is_here(target.gpu)), versions()

    def profile(found: ChosenLaunches) -> Profile:
        return profile_of(target, found, here, tuned_with)

    found = time_launches(target.policy, target.workload, target.gpu, shop, say, status, lambda first: keep(profile(first)))
    return profile(found)


def profile_of(target: Target, found: ChosenLaunches, here: Silicon, tuned_with: Versions) -> Profile:
    """The measured profile of an unverified policy."""
    return Profile(
        schema=SCHEMA, created=datetime.date.today().isoformat(), preset=target.preset, state="measured", policy=target.policy,
        policy_state="unverified", policy_source=PAPER_SOURCE, evidence=None, workload=target.workload, silicon=here,
        versions=tuned_with,
        **stamp(target.policy, found.rows, target.gpu), generation=None, rows=found.rows, seed=target.seed, trials=found.tried,
        notes=(UNVERIFIED, *found.notes),
    )  # fmt: skip


def launches_of_log(profile: Profile, logs: Sequence[Path], gpu: Gpu) -> ChosenLaunches:
    """The rows a profile's log gives: the whole run again without a GPU. Raises ValueError where the log lacks something."""
    v, s = profile.versions, profile.silicon
    if s.capability is None:
        raise ValueError(f"launches of a log: {s.gpu} has no measurements of launches")
    identity = Identity(s.gpu, s.name, profile.kernel_hash, v.torch, v.triton, profile.rows[0].mode if profile.rows else "eager")
    with Workshop(identity, Log(None, logs), 1, ()) as made:
        schedule = LaunchSearch(profile.workload, profile.policy, gpu, s.capability, made, lambda text: None, lambda text: None)
        return schedule.find(lambda found: None)
