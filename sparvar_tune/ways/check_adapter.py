"""Every promise of an adapter tried on a few of its own pictures, one line each: what `sparvar-tune check-adapter` says.

The untouched model is the oracle where an adapter offers it (`untouched`); its attention is held against a softmax in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparvar_kernels.geometry.problem import DTYPES
from sparvar_tune.adapters import Adapter
from sparvar_tune.adapters.opening import blame
from sparvar_tune.adapters.protocol import why_not_adapter
from sparvar_tune.measure.fidelity import compare_pictures, relative_l2
from sparvar_tune.policy_search.judge import first_touched, make_attention, prepare
from sparvar_tune.policy_search.menu import fixed_points

CLOSE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}  # relative error of dense attention against fp64
LEAST_DB = 20.0  # dense in the model's place against the untouched model, where the two are not equal bit for bit
ORACLE_ELEMENTS = 1 << 24  # scores in fp64 at once


@dataclass(frozen=True)
class Check:
    """One promise. reason: why it does not hold, None if it does; note: what was seen."""

    name: str
    reason: str | None
    note: str = ""


class Broken(Exception):
    """A promise does not hold; the message says how."""


def check_adapter(adapter: Adapter) -> Iterator[Check]:
    """Every check in turn; those that need what an earlier one drew are left out when it could not."""
    reason = why_not_adapter(adapter)
    yield Check("attributes", reason, "" if reason else _about(adapter))
    if reason:
        return
    try:
        trial = _Trial(adapter)
        first_touched(adapter)
    except ValueError as error:
        yield Check("schedule", str(error))
        return
    for name, work in trial.checks().items():
        try:
            yield Check(name, None, work() or "")
        except Broken as broken:
            yield Check(name, str(broken))
        except Exception as error:
            yield Check(name, blame(error))
        if not trial.drawn:
            return


def _about(adapter: Adapter) -> str:
    m, s = adapter.model, adapter.schedule
    return f"{m.slug}, {len(s)} scales up to {s.aspect()}, {m.layers} layers of {m.heads} x {m.head_dim}"


@dataclass
class _Watched:
    """Dense attention that looks at every call. wrong: the first thing that was not as promised."""

    adapter: Adapter
    skip_scales: tuple[int, ...] = ()
    look: bool = False  # at q, k and v, and hold the answers against fp64
    change: Callable[[Tensor, int, int], Tensor] = lambda out, layer, scale: out
    calls: list[tuple[int, int]] = field(default_factory=list)
    wrong: str | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    largest: float = 0.0
    error: float = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale_index: int) -> Tensor:
        self.calls.append((scale_index, layer))
        if self.look:
            self.wrong = self.wrong or self._why_not(q, k, v, layer, scale_index)
        out: Tensor = self.adapter.dense(q, k, v, layer, scale_index)
        if self.look and self.wrong is None:
            self._against_fp64(q, k, v, out)
        return self.change(out, layer, scale_index)

    def _why_not(self, q: Tensor, k: Tensor, v: Tensor, layer: int, s: int) -> str | None:
        m, schedule = self.adapter.model, self.adapter.schedule
        if not 0 <= s < len(schedule) or not 0 <= layer < m.layers:
            return f"called with layer={layer}, scale_index={s}; want 0..{m.layers - 1} and 0..{len(schedule) - 1}"
        sizes = {"q": schedule.num_queries(s), "k": schedule.num_keys(s), "v": schedule.num_keys(s)}
        for name, t in (("q", q), ("k", k), ("v", v)):
            want = (m.guidance_batch, m.heads, sizes[name], m.head_dim)
            if tuple(t.shape) != want:
                return f"{name} at layer {layer}, scale {s}: got {list(t.shape)}, want {list(want)} [B, H, N, D]"
            if t.dtype != DTYPES[m.dtype]:
                return f"{name} at layer {layer}, scale {s}: got {t.dtype}, want {m.dtype} as its model row says"
            if t.device.type != self.adapter.device.split(":")[0]:
                return f"{name} at layer {layer}, scale {s}: got it on {t.device}, want {self.adapter.device}"
            if t.requires_grad and torch.is_grad_enabled():
                return f"{name} at layer {layer}, scale {s}: it requires grad; draw under torch.no_grad()"
            if not bool(torch.isfinite(t).all()):
                return f"{name} at layer {layer}, scale {s}: it holds NaN or infinity"
        before = self.keys.get(layer)
        if before is not None and not torch.equal(k[:, :, : before.shape[2]], before):
            return f"k at layer {layer}, scale {s}: it does not begin with the keys of the scale before, in their order"
        self.keys[layer] = k.detach().clone()
        return None

    def _against_fp64(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Some queries' attention and logits in fp64, on a CPU."""
        rows = max(1, min(q.shape[2], ORACLE_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2])))
        picked = torch.linspace(0, q.shape[2] - 1, min(rows, 64), device=q.device).long()
        logits = q[:, :, picked].double().cpu() @ k.double().cpu().transpose(-1, -2) * self.adapter.softmax_scale
        self.largest = max(self.largest, float(logits.abs().max()))
        self.error = max(self.error, relative_l2(out[:, :, picked].cpu(), torch.softmax(logits, -1) @ v.double().cpu()))


class _Trial:
    """What the checks share: the adapter, its dense picture of one pair, and the watch over it."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.pair = adapter, (0, 5)
        self.first = first_touched(adapter)
        self.dense: Tensor | None = None
        self.watch = _Watched(adapter)

    @property
    def drawn(self) -> bool:
        return self.dense is not None

    def checks(self) -> dict[str, Callable[[], str | None]]:
        return {
            "a picture": self.picture,
            "the same pair, the same picture": self.repeats,
            "another seed, another picture": self.other_seed,
            "another class, another picture": self.other_class,
            "a state is finished many times": self.state_stays,
            "from every scale the same picture": self.parked,
            "attention is called in order": self.order,
            "q, k and v fit the schedule": self.inputs,
            "dense is attention to every key": self.is_attention,
            "no logit is above logit_bound": self.bound,
            "dense is the model's own picture": self.untouched,
            "what attention answers is drawn": self.counts,
            "NaN is not hidden": self.nan,
            "scales are left out": self.skips,
            "a sparse policy runs": self.sparse,
            "nothing is left behind": self.left_behind,
            "nothing is left after an error": self.after_error,
        }

    def draw(self, attend: Any = None, until: int = 0, pair: tuple[int, int] | None = None) -> Tensor:
        attend = attend or self.adapter.dense
        prepare(self.adapter, attend)
        found = self.adapter.finish(self.adapter.start(pair or self.pair, until), attend)
        if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[:2] != (1, 3) or not found.is_floating_point():
            got = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise Broken(f"finish returned {got}, want a float tensor [1, 3, H, W]")
        return found.detach().float().cpu()

    def same(self, found: Tensor, what: str) -> None:
        assert self.dense is not None
        if found.shape != self.dense.shape:
            raise Broken(f"{what}: got {list(found.shape)}, before it was {list(self.dense.shape)}")
        if not torch.equal(found, self.dense):
            raise Broken(f"{what}: {int((found != self.dense).sum())} of {found.numel()} values differ")

    def other(self, found: Tensor, what: str) -> None:
        assert self.dense is not None
        if torch.equal(found, self.dense):
            raise Broken(what)

    def picture(self) -> str:
        found = self.draw()
        if not bool(torch.isfinite(found).all()):
            raise Broken("the picture holds NaN or infinity")
        low, high = (float(x) for x in torch.aminmax(found))
        if not -1e-3 <= low <= high <= 1 + 1e-3:
            raise Broken(f"the picture holds {low:.3g}..{high:.3g}, want 0..1")
        if low == high:
            raise Broken("the picture is of one colour")
        self.dense = found
        return f"{found.shape[-2]} x {found.shape[-1]}"

    def repeats(self) -> None:
        self.same(self.draw(), "drawn again: seed every generator from the pair")

    def other_seed(self) -> None:
        self.other(
            self.draw(pair=(self.pair[0], self.pair[1] + 1)), "seeds 5 and 6 give one picture: draw the noise from the seed"
        )

    def other_class(self) -> str | None:
        if self.adapter.num_classes == 1:
            return "there is one class"
        self.other(self.draw(pair=(1, self.pair[1])), "classes 0 and 1 give one picture: use the class")
        return None

    def state_stays(self) -> None:
        state = self.adapter.start(self.pair, self.first)
        for time in ("first", "second"):
            self.same(self.adapter.finish(state, self.adapter.dense).detach().float().cpu(), f"finished for the {time} time")

    def parked(self) -> str:
        scales = sorted({1, self.first, len(self.adapter.schedule) - 1})
        for until in scales:
            self.same(self.draw(until=until), f"parked before scale {until}")
        return f"parked before {', '.join(map(str, scales))}"

    def order(self) -> None:
        layers, scales = self.adapter.model.layers, len(self.adapter.schedule)
        self.watch = _Watched(self.adapter, look=True)
        self.draw(self.watch)
        for until, calls in ((0, self.watch.calls), (self.first, self._calls(self.first))):
            wanted = [(s, layer) for s in range(until, scales) for layer in range(layers)]
            if calls != wanted:
                at = next((i for i, pair in enumerate(zip(calls, wanted, strict=False)) if pair[0] != pair[1]), None)
                where = f"{len(calls)} calls, want {len(wanted)}"
                if at is not None:
                    where = f"call {at} is (scale, layer) {calls[at]}, want {wanted[at]}"
                raise Broken(f"from scale {until} on: {where}; attend(q, k, v, layer, scale_index) once a scale and layer")

    def _calls(self, until: int) -> list[tuple[int, int]]:
        watch = _Watched(self.adapter)
        self.draw(watch, until)
        return watch.calls

    def inputs(self) -> None:
        if self.watch.wrong:
            raise Broken(self.watch.wrong)

    def is_attention(self) -> str:
        most = CLOSE[self.adapter.model.dtype]
        if self.watch.wrong is None and self.watch.error > most:
            formula = f"softmax(q k^T * {self.adapter.softmax_scale:g}) v in fp64"
            raise Broken(f"relative error {self.watch.error:.1e} against {formula}, want at most {most:g}; see softmax_scale")
        return f"relative error {self.watch.error:.1e} against fp64"

    def bound(self) -> str:
        bound = self.adapter.logit_bound
        if bound is not None and self.watch.largest > bound * (1 + 1e-2):
            raise Broken(
                f"a |logit| of {self.watch.largest:.4g} was seen, logit_bound is {bound:g}; give None where nothing bounds it"
            )
        return f"largest seen {self.watch.largest:.3g}"

    def untouched(self) -> str:
        """The watched picture against the untouched model's, where the adapter offers that."""
        draw = getattr(self.adapter, "untouched", None)
        if draw is None:
            return "not tried: the adapter has no untouched(pair)"
        own, ours = draw(self.pair).detach().float().cpu(), self.draw(_Watched(self.adapter))
        if torch.equal(own, ours):
            return "bit for bit"
        psnr = compare_pictures(ours, own)["psnr"]
        if psnr < LEAST_DB:
            raise Broken(f"PSNR {psnr:.1f} dB between dense attention in the model's place and the untouched model")
        return f"PSNR {psnr:.1f} dB: no sparse picture can be told to be closer than that"

    def counts(self) -> None:
        last = len(self.adapter.schedule) - 1
        for layer in range(self.adapter.model.layers):
            watch = _Watched(self.adapter, change=lambda out, at, s: out + 3 if (at, s) == (layer, last) else out)  # noqa: B023
            self.other(self.draw(watch), f"the picture is the same when layer {layer} attends otherwise at the last scale")
            if layer == 3:  # the others are called by the same code
                return

    def nan(self) -> str:
        """A picture with NaN in it, or an error, or at least another picture: never the dense one."""
        last = len(self.adapter.schedule) - 1
        watch = _Watched(self.adapter, change=lambda out, _layer, s: out * math.nan if s == last else out)
        try:
            found = self.draw(watch)
        except Broken:
            raise
        except Exception as error:
            return f"it raises {type(error).__name__}"
        self.other(found, "a picture whose last scale attended to NaN is the dense one")
        return "it is in the picture" if bool(torch.isnan(found).any()) else "the picture is another one"

    def skips(self) -> None:
        scales = len(self.adapter.schedule)
        watch = _Watched(self.adapter, (scales - 1,))
        found = self.draw(watch, self.first)
        if any(s == scales - 1 for s, _ in watch.calls):
            raise Broken("attend.skip_scales names the last scale, and it was drawn all the same")
        assert self.dense is not None
        if found.shape != self.dense.shape or not bool(torch.isfinite(found).all()):
            raise Broken(f"without the last scale the picture is {list(found.shape)}, want {list(self.dense.shape)} and no NaN")
        self.other(found, "without the last scale the picture is the same")

    def sparse(self) -> str:
        m = self.adapter.model
        points = fixed_points(self.adapter.schedule, m.layers, m.heads)
        policy = points.get("paper") or points["drop last scale"]
        attend = make_attention(self.adapter, policy)
        found, again = (self.draw(attend, self.first) for _ in range(2))
        if not torch.equal(found, again):
            raise Broken("the sparse picture is another one the second time")
        assert self.dense is not None
        return f"PSNR {compare_pictures(found, self.dense)['psnr']:.1f} dB with the paper's fixed setting"

    def left_behind(self) -> None:
        self.same(self.draw(), "the dense picture after sparse ones")

    def after_error(self) -> None:
        def fail(out: Tensor, _layer: int, s: int) -> Tensor:
            if s == self.first:
                raise _OursError
            return out

        try:
            self.draw(_Watched(self.adapter, change=fail))
        except _OursError:
            self.same(self.draw(), "the dense picture after attention raised in the middle of one")
        else:
            raise Broken("attention raised, and the adapter went on: an error must come through")


class _OursError(Exception):
    """Raised inside a picture, to see what is left of it."""
