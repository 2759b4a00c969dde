"""`sparvar-tune verify`: measures a profile again on this machine and keeps what failed as an overlay (overlay.py).

A model with an adapter draws new pictures dense and sparse; of one without, the rows are timed on random inputs, as they
were tuned. Either way it ends within its budget, and what it did not reach stays as it was.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.policy import Policy
from sparvar_tune.adapters import Adapter
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.catalog.metrics import find_metric, known_metric
from sparvar_tune.launch_search.choose import DENSE_NAME
from sparvar_tune.launch_search.compiling import machine_code, row_binaries
from sparvar_tune.launch_search.layer_call import distinct_layers
from sparvar_tune.launch_search.log import Workshop
from sparvar_tune.launch_search.timing_task import Task
from sparvar_tune.measure.fidelity import mean_of, worst_mean
from sparvar_tune.measure.pairs import verify_pairs
from sparvar_tune.measure.timing import paired_speedup, timing
from sparvar_tune.policy_search.certify import Comparison, compare_on, decision_cost, generation, measured_rows
from sparvar_tune.policy_search.menu import UNVERIFIED
from sparvar_tune.profile import overlay, store
from sparvar_tune.profile.identity import meaning_of, stamp
from sparvar_tune.profile.machine import device_name, silicon, versions
from sparvar_tune.profile.overlay import DEMOTED, LEAST, OK, Overlay, Verified
from sparvar_tune.profile.schema import MachineCode, Profile, Row, Speedup, WholePicture, Workload, one_line
from sparvar_tune.runtime import tuned as runtime
from sparvar_tune.runtime.demote import deciding
from sparvar_tune.ways import time_only

HANDFUL = 5  # rows re-timed at most, unless the new times are to be written: those of most time
ROUNDS = 20  # calls of dense and of tuned, in turn

Say = Callable[[str], None]


@dataclass(frozen=True)
class Look:
    """One metric over the pictures drawn here: its mean and the two-sided 90 % interval of that, the bound that a certificate
    says the mean has, and whether the interval bears it out.
    """

    metric: str
    mean: float
    low: float
    high: float
    bound: float
    good: bool

    @property
    def text(self) -> str:
        metric = find_metric(self.metric)
        interval = f"{self.low:.{metric.digits}f}..{self.high:.{metric.digits}f}"
        return f"{metric.title} {metric.say(self.mean)} (90 % interval {interval}, to bear out {self.bound:.{metric.digits}f})"


@dataclass(frozen=True)
class Finding:
    """What one look at a profile found.

    verdict, reason: of the profile as a whole. rows: those re-timed, by scale. good: every check passed. renewed: the
    profile with this machine's times; None where a check failed or something was not measured.
    pairs, looks, picture: how many pictures were drawn, how close they are, and the time of a whole one; 0, none and None
    for a model without an adapter.
    """

    verdict: str
    reason: str
    rows: tuple[Verified, ...]
    good: bool
    renewed: Profile | None
    pairs: int = 0
    looks: tuple[Look, ...] = ()
    picture: WholePicture | None = None


@dataclass(frozen=True)
class Verification:
    """What `verify` found and wrote. good: every check passed; verdict, reason, rows, pairs, looks, picture: as `Finding`.

    left: scales it did not re-time. overlay: the file that makes what failed run dense here. written: the profile with the
    new times, None where there is none. seconds: it took.
    """

    good: bool
    verdict: str
    reason: str
    rows: tuple[Verified, ...]
    left: tuple[int, ...]
    pairs: int
    looks: tuple[Look, ...]
    picture: WholePicture | None
    overlay: str
    written: str | None
    seconds: float


def verify(
    tuned: runtime.Tuned, open_model: Callable[[], Adapter] | None, pairs: int, budget_s: float, write: bool, say: Say,
    status: Say,
) -> Verification:  # fmt: skip
    """Whether the profile holds here; writes the overlay, and with `write` the new times of one that holds.

    open_model: makes the adapter; None: nothing here draws its pictures. pairs: of pictures. Raises ValueError for other
    weights and ProfileError where a file cannot be written.
    """
    begun, gpu, profile, path, sha256 = time.monotonic(), tuned.gpu, tuned.profile, tuned.path, tuned.sha256
    assert profile is not None and path is not None and sha256 is not None
    written = None
    if open_model is None and gpu.slug == "cpu":
        raise ValueError(f"model {profile.workload.model}: it cannot be opened by its name alone, and a CPU times nothing else; "
                         "give --source CHECKOUT --weights FOLDER")  # fmt: skip
    store.require_writable(overlay.file(gpu.slug, path.name))  # a profile that `write` keeps goes into the same folder
    if open_model is None:
        found = time_rows(profile, gpu, write, begun + budget_s, say, status)
    else:
        found = compare_pictures(profile, gpu, open_model(), pairs, begun + budget_s, say, status)
    if write and found.renewed is None:
        say("not written as a profile: a check failed, or something was left out")
    elif write and found.renewed is not None:
        path = written = store.user_folder() / gpu.slug / store.name_of(found.renewed)
        store.save(found.renewed, path)
        sha256 = hashlib.sha256(store.read_bytes(path)).hexdigest()
        say(f"wrote {path}")
    made = Overlay(
        overlay.OVERLAY_SCHEMA, datetime.date.today().isoformat(), sha256,
        meaning_of(profile.policy, {row.kernel for row in profile.rows}), versions(),
        device_name(silicon(gpu, True)), found.verdict, found.reason, found.rows,
    )  # fmt: skip
    where = overlay.file(gpu.slug, path.name)
    overlay.save(made, where)
    failed = [str(v.scale_index) for v in found.rows if v.verdict == DEMOTED]
    dense = "everything" if found.verdict == DEMOTED else f"scale {', '.join(failed)}" if failed else "nothing"
    say(f"wrote {where}: {dense} runs dense here because of it")
    seconds = time.monotonic() - begun
    say(f"verified in {seconds:.0f} s")
    seen = {v.scale_index for v in found.rows}
    return Verification(
        found.good, found.verdict, found.reason, found.rows,
        tuple(r.scale_index for r in profile.rows if r.scale_index not in seen), found.pairs, found.looks, found.picture,
        str(where), str(written) if written else None, seconds,
    )  # fmt: skip


def compare_pictures(
    profile: Profile, gpu: Gpu, adapter: Adapter, pairs: int, deadline: float, say: Say, status: Say
) -> Finding:  # fmt: skip
    """Pictures no search and no certificate saw, and times of the whole generation, dense and tuned in alternation."""
    if pairs < 2:
        raise ValueError(f"--pairs {pairs}: want at least 2, an interval needs them")
    proof = profile.evidence
    if {profile.workload.weights_sha256, proof.weights_sha256 if proof else None} - {None, adapter.weights_sha256}:
        raise ValueError(f"{adapter.model.slug}: the profile's policy was certified on other weights; tune again")
    launches = {row.scale_index: runtime.launch_of(row) for row in profile.rows}
    begun = time.monotonic()

    def late(found: Collection[object], _pairs: object) -> bool:
        now = time.monotonic()
        return len(found) >= 2 and now + (now - begun) / len(found) > deadline

    seen = compare_on(adapter, profile.policy, launches, verify_pairs(adapter.num_classes, pairs), status, late)
    gain = generation(seen, adapter)
    looks = look_at_pictures(seen, proof.certified() if proof else adapter.required(profile.preset))
    n, faithful, faster = len(seen.found), all(look.good for look in looks), gain.speedup.low > 1
    texts = ", ".join(look.text for look in looks) or "nothing certified can be looked at with so few pairs, or without weights"
    pictures = f"{texts}, over {n} pairs the certificate did not use"
    say(f"pictures: {_said(faithful)}: {pictures}")
    say(f"time:     {_said(faster)}: {gain.dense.p50_ms:.0f} -> {gain.tuned.p50_ms:.0f} ms, {_interval(gain.speedup)}")
    if n < pairs:
        say(f"{n} of {pairs} pairs: the others did not fit into the budget")
    rows = measured_rows(seen, adapter, profile.policy, launches)
    enough = n >= LEAST
    judged = tuple(_judge(row.scale_index, row.speedup, profile.policy) for row in rows) if enough else ()
    _say_rows(judged, rows, say)
    if not enough:
        say(f"rows are left as they are: {LEAST} pairs at least tell a gain from chance; give --budget or --pairs more")
    verdict, reason = OK, f"{pictures}, {_interval(gain.speedup)}"
    if not faithful:
        verdict, reason = DEMOTED, f"pictures: {pictures}"
    elif enough and not faster and all(v.verdict == OK for v in judged):  # else the rows to blame go
        verdict, reason = DEMOTED, f"the whole picture is not certainly faster: {_interval(gain.speedup)}"
    renewed = replace(
        profile, created=datetime.date.today().isoformat(), silicon=silicon(gpu, True), versions=versions(),
        **stamp(profile.policy, rows, gpu), generation=gain if proof else None, state="measured", rows=rows,
        notes=decision_cost(seen, adapter, profile.policy),
    )  # fmt: skip
    good = faithful and faster
    return Finding(verdict, reason, judged, good, renewed if good and n == pairs else None, n, looks, gain)


def look_at_pictures(seen: Comparison, bounds: Mapping[str, float]) -> tuple[Look, ...]:
    """Every metric against the bound that a certificate says its mean has, or that was asked for.

    Refuted is a bound above all of the mean's two-sided 90 % interval: of true ones that are just met, one in twenty is by
    chance. Few pictures seldom refute, and none here proves anything: evidence is left as it was measured. A metric whose weights
    are not at hand, and one of the worst class where some class has fewer than two pictures, are left out.
    """
    classes = [label for label, _ in seen.pairs]
    looks = []
    for name, bound in bounds.items():
        metric = known_metric(name)
        if metric is None or metric.loader or (metric.worst_class and min(map(classes.count, set(classes))) < 2):
            continue
        values = [f[metric.measured] for f in seen.found]
        mean, worst = mean_of(metric, values, classes), worst_mean(metric, values, classes)
        best = mean + (mean - worst)
        looks.append(Look(name, mean, min(worst, best), max(worst, best), bound, metric.missing(best, bound) <= 0))
    return tuple(looks)


def time_rows(profile: Profile, gpu: Gpu, every: bool, deadline: float, say: Say, status: Say) -> Finding:
    """The rows of most time, or `every` one, on random inputs in a worker; a launch that fails is demoted like a slow one."""
    order = sorted(profile.rows, key=lambda row: -(row.dense.p50_ms if row.dense else row.dense_predicted_ms or 0.0))
    judged: list[Verified] = []
    rows: list[Row] = []
    longest = 0.0
    mode = profile.rows[0].mode if profile.rows else "eager"
    with time_only.workshop(gpu, time_only.Shop(None, workers=1, mode=mode)) as made:
        for row in order if every else order[:HANDFUL]:
            s, begun = row.scale_index, time.monotonic()
            if judged and begun + longest > deadline:
                continue
            status(f"scale {s}: {len(judged) + 1}/{len(order)}")
            times = time_row(made, profile.policy, profile.workload, row)
            if isinstance(times, str):
                judged.append(Verified(s, None, DEMOTED, one_line(f"its launch failed: {times}"[:200])))
            else:
                dense, tuned = times
                speedup = paired_speedup(dense, tuned)
                judged.append(_judge(s, speedup, profile.policy))
                rows.append(replace(
                    row, state="measured", dense_name=DENSE_NAME, tuned=timing(tuned), dense=timing(dense), speedup=speedup,
                    tuned_predicted_ms=None, dense_predicted_ms=None, binary=binary_of(made, profile, gpu, row),
                ))  # fmt: skip
                if row.binary and rows[-1].binary and row.binary.code != rows[-1].binary.code:
                    say(f"scale {s}: its machine code is another than was timed (Triton {row.binary.triton})")
            longest = max(longest, time.monotonic() - begun)
    judged.sort(key=lambda v: v.scale_index)
    rows.sort(key=lambda row: row.scale_index)
    _say_rows(judged, rows, say)
    left = sorted({row.scale_index for row in order} - {v.scale_index for v in judged})
    if left:
        why = f"--budget, {HANDFUL} at most without --write"
        say(f"left as they are: scales {', '.join(map(str, left))} ({why})")
    say("pictures: not compared, the model has no adapter")
    good = all(v.verdict == OK for v in judged)
    renewed = None
    if len(rows) == len(order) and profile.policy_state == "unverified":
        renewed = replace(
            profile, created=datetime.date.today().isoformat(), silicon=silicon(gpu, True), versions=versions(),
            **stamp(profile.policy, rows, gpu),
            state="measured", rows=tuple(rows),
            notes=(UNVERIFIED, f"times are of {mode} calls on random inputs by events on the device, lists planned before"),
        )  # fmt: skip
    reason = f"{len(judged)} of {len(order)} rows timed on random inputs, no pictures compared"
    return Finding(OK, reason, tuple(judged), good, renewed)


def binary_of(made: Workshop, profile: Profile, gpu: Gpu, row: Row) -> MachineCode | None:
    """What a row's launch compiles to on this machine's GPU."""
    problems, capability = profile.workload.problems(), silicon(gpu, True).capability
    config = runtime.launch_of(row).config
    assert isinstance(config, TritonConfig) and capability, "a GPU's row has a GPU kernel's configuration"
    kinds = distinct_layers(profile.policy, row.scale_index)
    wanted = row_binaries(profile.policy, problems, kinds, row.scale_index, config, capability)
    return machine_code(made.compile(wanted, lambda text: None), wanted, made.identity.triton)


def time_row(made: Workshop, policy: Policy, workload: Workload, row: Row) -> tuple[list[float], list[float]] | str:
    """(dense, tuned) milliseconds of one layer's attention, the mean over layers, of each round; or why there are none."""
    config = runtime.launch_of(row).config
    assert isinstance(config, TritonConfig), "a GPU's row has a GPU kernel's configuration"
    kinds = distinct_layers(policy, row.scale_index)
    tasks = {Task(row.scale_index, layer, (config,), ROUNDS, True): count for layer, count in kinds.items()}
    sums = [0.0] * ROUNDS, [0.0] * ROUNDS
    for task, times in made.time(list(tasks), workload, policy, lambda text: None).items():
        if isinstance(times, str):
            return times
        share = tasks[task] / len(policy.heads)
        for total, new in zip(sums, (times.dense_ms, times.tuned_ms[0]), strict=True):
            total[:] = [a + share * ms for a, ms in zip(total, new, strict=True)]
    return sums


def _judge(scale_index: int, speedup: Speedup | None, policy: Policy) -> Verified:
    assert speedup is not None
    if speedup.low > 1:
        return Verified(scale_index, speedup, OK, "")
    if scale_index in deciding(policy):
        return Verified(scale_index, speedup, OK, "later scales live on its ranking")
    return Verified(scale_index, speedup, DEMOTED, f"its gain is not certain: {_interval(speedup)}")


def _say_rows(judged: Collection[Verified], rows: Collection[Row], say: Say) -> None:
    timed = {row.scale_index: row for row in rows}
    for v in judged:
        row = timed.get(v.scale_index)
        times = f"{row.dense.p50_ms:.3f} -> {row.tuned.p50_ms:.3f} ms a layer, " if row and row.dense and row.tuned else ""
        seen = _interval(v.speedup) + (f" ({v.reason})" if v.verdict == OK and v.reason else "") if v.speedup else v.reason
        say(f"scale {v.scale_index:2}: {_said(v.verdict == OK)}: {times}{seen}")


def _interval(s: Speedup) -> str:
    return f"{s.median:.2f}x (95 % interval {s.low:.2f}..{s.high:.2f}, n={s.n})"


def _said(good: bool) -> str:
    return "ok" if good else "FAIL"
