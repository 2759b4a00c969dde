"""Which way to a profile there is on this machine, and going it: the one thing behind `sparvar-tune` and `sparvar_tune.tune`.

model runs here, GPU is here    search here, or on a GPU take over what other silicon searched   SearchHere
only the GPU is here            time the paper's policy on random inputs                         TimeOnly
otherwise                       predict the times of the paper's or a searched policy            Predict
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sparvar_kernels.backends.registry import KERNELS, kernel_for
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter
from sparvar_tune.adapters.opening import blame
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.names import CUSTOM
from sparvar_tune.launch_search.choose import ChosenLaunches
from sparvar_tune.measure.fidelity import Constraint
from sparvar_tune.policy_search.menu import decision_scale, fixed_points, menu, paper_policy
from sparvar_tune.policy_search.storage import place, require_shared
from sparvar_tune.profile import store
from sparvar_tune.profile.describe import describe
from sparvar_tune.profile.files import require_trials_folder
from sparvar_tune.profile.identity import refused
from sparvar_tune.profile.machine import silicon
from sparvar_tune.profile.schema import Profile
from sparvar_tune.ways import predict, search_here, take_over, time_only
from sparvar_tune.ways.settings import Settings, loaded
from sparvar_tune.ways.subject import Subject

Say = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """One way from a subject to its profile. `out`: the file it writes."""

    subject: Subject
    settings: Settings

    @property
    def out(self) -> Path:
        return self.subject.place(self.settings.out)

    @property
    def scratch(self) -> Path | None:
        """The folder in which a run keeps its trials or measurements; None: in none."""
        return None

    def announce(self, say: Say) -> None:
        """Says what will be done and why this way."""
        raise NotImplementedError

    def plan(self, say: Say) -> None:
        """Says what a run would do, and does nothing of it."""
        raise NotImplementedError

    def run(self, say: Say, status: Say) -> Profile:
        """The profile as `out` now holds it. Raises ValueError where none comes of it: one line that says what to do."""
        raise NotImplementedError

    def afterwards(self, say: Say) -> None:
        """Says what is left to do."""

    def _begin(self, say: Say) -> None:
        """What a run and its plan begin with: says the way, and refuses a place to write to that cannot be written."""
        self.announce(say)
        store.require_writable(self.out)
        if self.scratch is not None:
            require_trials_folder(self.scratch)

    def _folders(self) -> tuple[Path, ...]:
        """Where profiles of other silicon may lie."""
        return (*([self.settings.out] if self.settings.out else []), store.user_folder(), store.shipped_folder())

    def _shop(self, folder: Path) -> time_only.Shop:
        s = self.settings
        return time_only.Shop(folder, s.resume, s.merge, s.workers, s.mode)

    def _keep_log(self, log: Path, say: Say) -> None:
        if self.settings.log is not None:
            kept = self.settings.log / self.subject.gpu.slug / f"{self.out.stem}.jsonl"
            store.write_atomic(kept, log.read_bytes())
            say(f"measurements are in {kept}")

    def _unused(self, say: Say, why: str, *names: str) -> None:
        """Says of every setting that was given and does nothing on this way."""
        for name in names:
            if getattr(self.settings, name):
                say(f"{name}: not used, {why}")


class SearchHere(Way):
    """The whole way: search, certify on held-out pictures, time."""

    @property
    def adapter(self) -> Adapter:
        return self.subject.adapter

    @property
    def preset(self) -> str:
        return CUSTOM if self.settings.bounds else self.subject.quality

    @property
    def out(self) -> Path:
        return self.subject.place(self.settings.out, self.preset)

    @property
    def scratch(self) -> Path | None:
        """None on a CPU with a storage: trials go there, and no launch is measured."""
        elsewhere = self.settings.storage and self.subject.gpu.slug == "cpu"
        return None if elsewhere else self.request.scratch

    @cached_property
    def request(self) -> search_here.Request:
        subject, s = self.subject, self.settings
        wanted = Constraint({**self._required(), **s.bounds}, loaded(s.metric_weights))
        if reason := wanted.why_not(s.pairs, self.adapter.num_classes, getattr(self.adapter, "prompts", ())):
            raise ValueError(reason)
        return search_here.Request(
            subject.model, subject.resolution, subject.aspect, subject.gpu, self.preset,
            wanted, s.budget_s, s.pairs, s.seed, s.resume, subject.run_folder(self.preset), s.storage,
        )  # fmt: skip

    def _required(self) -> Mapping[str, float]:
        """What the quality asks for; nothing where the model has no bounds for it and the user gave some."""
        try:
            return self.adapter.required(self.subject.quality)
        except ValueError:
            if not self.settings.bounds:
                raise
            return {}

    def announce(self, say: Say) -> None:
        gpu = self.subject.gpu
        if gpu.slug == "cpu":
            self._unused(say, "no GPU is timed here", "workers", "merge", "log")
        say(f"tuning {self.subject.model.slug} on {gpu.slug} ({silicon(gpu, True).name}, {torch.get_num_threads()} threads)")
        say(f"  wanted: {self.request.constraint}, of the 95 % bounds of the means over "
            f"{self.settings.pairs} held-out (class, seed) pairs")  # fmt: skip
        for name, db, similarity in self.adapter.yardsticks():
            say(f"  yardstick: {name}: {db:.2f} dB, SSIM {similarity:.4f}")

    def _begin(self, say: Say) -> None:
        if self.settings.storage:
            require_shared(self.settings.storage)  # now rather than after the model was loaded
        super()._begin(say)

    def plan(self, say: Say) -> None:
        self._begin(say)
        schedule, model, s = self.adapter.schedule, self.subject.model, self.settings
        say("space: every (layer, head, scale) takes one option; prices per scale and a tilt over layers choose among them")
        for scale in range(decision_scale(schedule), len(schedule)):
            say(f"  scale {scale}: {', '.join(menu(schedule, scale))}")
        kernel = KERNELS[kernel_for(self.adapter.device)]
        say(f"  launch: kernel {kernel.name}, " + ", ".join(f"{k} in {list(v)}" for k, v in kernel.config.space().items()))
        shipped = search_here.shipped_policies(self.request, self.adapter, say)
        for name, policy in fixed_points(schedule, model.layers, model.heads, shipped).items():
            say(f"  fixed point: {name} ({describe(policy)})")
        say(f"plan: measure every option on a capture; search on {search_here.SEARCH_PAIRS} pairs (fixed points, bisection, "
            f"then TPE); certify on {s.pairs} others; budget {s.budget_s:.0f} s")  # fmt: skip
        say(f"trials go to {place(s.storage) if s.storage else self.request.scratch}")
        say(f"profile goes to {self.out}")

    def run(self, say: Say, status: Say) -> Profile:
        self._begin(say)
        try:
            profile, log = self._take_over(say, status) or self._search(say, status)
        except (ValueError, OSError):
            raise
        except Exception as error:
            if self.subject.model.adapter is not None:
                raise
            raise ValueError(f"{self.subject.model.slug}: {blame(error)}") from error  # a user's code
        store.save(profile, self.out)
        if log is not None:
            self._keep_log(log, say)
        return store.load(self.out)

    def _take_over(self, say: Say, status: Say) -> tuple[Profile, Path | None] | None:
        """The profile of a policy that other silicon searched, and its log; None: none is there, or a CPU.

        Where it does not do here, that of a search.
        """
        gpu, request = self.subject.gpu, self.request
        if self.settings.search or gpu.slug == "cpu":
            return None
        found = take_over.find_policy(self.out.name, self.adapter.weights_sha256, gpu, self._folders())
        if found is None:
            return None
        source, path = found
        say(f"taking over the policy of {path} (--search finds one of this GPU's own)")
        try:
            profile = take_over.transfer(request, self.adapter, source, self._shop(request.scratch), say, status)
        except search_here.NothingMeetsTheBound as error:
            say(f"{error}; searching here")
            return self._search(say, status, take_over.ATTEMPT + 1)
        return profile, request.scratch / time_only.LOG

    def _search(self, say: Say, status: Say, attempts: int = 0) -> tuple[Profile, Path | None]:
        """The profile of a policy found here, on a GPU with its fastest launches, and their log; None where none was timed."""
        gpu, request = self.subject.gpu, self.request
        if gpu.slug == "cpu":
            return search_here.tune(request, self.adapter, say, status), None
        shop = dataclasses.replace(self._shop(request.scratch / "launches"), resume=True)

        def time_launches(policy: Policy) -> ChosenLaunches:
            return time_only.time_launches(policy, search_here.workload(request, self.adapter), gpu, shop, say, status)

        profile = search_here.tune(request, self.adapter, say, status, time_launches=time_launches, attempts=attempts)
        log = request.scratch / "launches" / time_only.LOG
        return profile, log if log.is_file() else None


class TimeOnly(Way):
    """The GPU is here, the model is not: the paper's policy is timed on random inputs."""

    @property
    def target(self) -> time_only.Target:
        subject, model = self.subject, self.subject.model
        policy = paper_policy(model.schedule(subject.resolution, subject.aspect), model.layers, model.heads)
        return time_only.Target(
            model, subject.gpu, subject.quality, subject.resolution, subject.aspect, subject.images, policy, self.settings.seed
        )  # fmt: skip

    @property
    def scratch(self) -> Path:
        return self.subject.run_folder()

    def announce(self, say: Say) -> None:
        self._unused(say, "there is no search here", "storage", "bounds")
        say(f"{self.subject.model.slug} cannot be opened without --source and --weights, so its pictures cannot be compared: "
            f"the paper's fixed setting, marked unverified, is timed on {silicon(self.subject.gpu, True).name}")  # fmt: skip

    def plan(self, say: Say) -> None:
        self._begin(say)
        say(f"policy: {describe(self.target.policy)}")
        say(f"measurements would go to {self.scratch / time_only.LOG}\nprofile would go to {self.out}")

    def run(self, say: Say, status: Say) -> Profile:
        self._begin(say)

        def keep(profile: Profile) -> None:
            """So far the best there is, unless an earlier run left a whole one."""
            if not _is_current(self.out, self.subject.gpu):
                store.save(profile, self.out)
                say(f"  a first profile is in {self.out}")

        profile = time_only.time_policy(self.target, self._shop(self.scratch), say, status, keep)
        store.save(profile, self.out)
        self._keep_log(self.scratch / time_only.LOG, say)
        return store.load(self.out)


class Predict(Way):
    """Nothing can be measured: a policy with predicted times."""

    @cached_property
    def source(self) -> tuple[Profile, Path] | None:
        """A policy searched elsewhere and its file."""
        if self.subject.open is None:
            return None
        return take_over.find_policy(self.out.name, None, self.subject.gpu, self._folders())

    @cached_property
    def profile(self) -> Profile:
        s = self.subject
        policy_of = self.source[0] if self.source else None
        return predict.predict_profile(s.model, s.gpu, s.quality, s.resolution, s.aspect, s.images, policy_of)

    def announce(self, say: Say) -> None:
        gpu, model = self.subject.gpu, self.subject.model
        self._unused(say, "there is no search here", "storage", "bounds")
        self._unused(say, "no GPU is timed here", "workers", "merge", "log")
        assert self.profile  # what cannot be predicted is refused before anything is said
        closed = f", and {model.slug} cannot be opened without --source and --weights" if self.subject.open is None else ""
        say(f"{gpu.slug} is not in this machine{closed}: nothing can be measured, so")
        whose = f"that of {self.source[1]}" if self.source else "the fixed setting of the paper, marked unverified"
        say(f"  policy:   {whose}")
        say("  schedule: predicted from compiled binaries and the GPU table, marked predicted")

    def plan(self, say: Say) -> None:
        self._begin(say)
        say(f"profile would go to {self.out}")

    def run(self, say: Say, status: Say) -> Profile:
        self._begin(say)
        store.save(self.profile, self.out)
        return store.load(self.out)

    def afterwards(self, say: Say) -> None:
        gpu, model, images = self.subject.gpu.slug, self.subject.model, self.subject.images
        say("to make it real:")
        if self.subject.open is None:
            say(f"  the policy: sparvar-tune --model {model.slug} --source CHECKOUT --weights FOLDER, on a machine with a GPU "
                "(docs/your-model.md)")  # fmt: skip
        elif self.source is None:
            say(f"  the policy: sparvar-tune --gpu cpu --model {model.slug} (fidelity does not depend on the GPU)")
        many = f" --images {images}" if images != 1 else ""
        say(f"  the times:  sparvar-tune verify --gpu {gpu} --model {model.slug}{many} --write, on a machine with that GPU")


def choose_way(subject: Subject, settings: Settings) -> Way:
    """The way there is here. Raises ValueError for more images at once than the model's adapter draws."""
    subject.require_row()
    reason = subject.why_not_images()
    if reason:
        raise ValueError(reason)
    if not subject.is_here:
        return Predict(subject, settings)
    if subject.open is not None:
        return SearchHere(subject, settings)
    if subject.gpu.slug == "cpu":  # no CPU is predicted
        raise ValueError(f"model {subject.model.slug}: this CPU measures nothing of it, no adapter opens it by its name alone; "
                         "give --source CHECKOUT --weights FOLDER, or a GPU to predict for, such as --gpu h100")  # fmt: skip
    return TimeOnly(subject, settings)


def _is_current(path: Path, gpu: Gpu) -> bool:
    """True if a sound profile of today's kernels stands there."""
    try:
        return not refused(store.load(path))
    except ValueError:
        return False
