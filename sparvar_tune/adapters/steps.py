"""Generation steps put into a live model, each by what its family's `STEPS` says of its kind."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from sparvar_kernels.attention import SparseAttention
from sparvar_kernels.policy import Step
from sparvar_tune.adapters.instance_forward import Undos
from sparvar_tune.adapters.protocol import Family, Parts, Undoable
from sparvar_tune.generation import why_not_steps, works_inside


def why_not_does(family: Family, found: Parts, attend: SparseAttention) -> str | None:
    """Why a model of this family cannot do the steps of a policy, or None."""
    return why_not_steps(attend.policy.steps, getattr(family, "STEPS", ()), f"the {found.family} adapter")


def put_on(family: Family, found: Parts, attend: SparseAttention, inside: Collection[bool] = (True, False)) -> Undos:
    """The steps of a policy that the family can do, for images of its schedule; one that raises takes all back.

    Those inside the blocks come first, what leaves out tokens before what multiplies them. inside: which of the two.
    """
    undos = Undos()
    chosen = [step for step in attend.policy.steps if works_inside(step) in inside]
    try:
        for step in sorted(chosen, key=lambda step: (not works_inside(step), not step.thins)):
            undos.add(family.STEPS[step.kind](replace(found, schedule=attend.schedule), step))  # type: ignore[attr-defined]
    except BaseException:
        undos.undo()
        raise
    return undos


def by_scale(change: Callable[[Parts, int], Undoable]) -> Callable[[Parts, Step], Undoable]:
    """What does a step that is all said by the first scale it changes."""
    return lambda found, step: change(found, step.from_scale)


class WithSteps(Undos):
    """A live model's attention and its policy's steps. live: the attention alone."""

    def __init__(self, live: Undoable, steps: Undos) -> None:
        super().__init__()
        self.live = live
        self.add(live)
        self.add(steps)

    @property
    def reason(self) -> str | None:
        """Why the last image, from some call on, ran the model's own attention; None if it did not."""
        reason: Any = getattr(self.live, "reason", None)
        return None if reason is None else str(reason)


def attach(family: Family, found: Parts, attend: SparseAttention) -> Undoable:
    """Makes a model use `attend` and do its policy's steps. Raises ValueError, and changes nothing, for what does not fit."""
    reason = why_not_does(family, found, attend)
    if reason:
        raise ValueError(f"this profile does not fit the model: {reason}")
    live = family.attach(found, attend)
    if not attend.policy.steps:
        return live
    try:
        return WithSteps(live, put_on(family, found, attend))
    except BaseException:
        live.undo()
        raise
