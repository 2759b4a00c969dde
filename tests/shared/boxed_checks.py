"""What tests of the fused path of the models in the box share: tiny models, the logits they draw from, poisoned buffers."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import tiny_emojivar
import torch

from sparvar_kernels import Policy, SparseAttention
from sparvar_tune import adapters, fused
from sparvar_tune.bitwise.sampling import Generating
from sparvar_tune.emojivar.model import Generation as Emoji
from sparvar_tune.emojivar.model import draw_noise
from sparvar_tune.pocketvar.model import Generation as Pocket
from sparvar_tune.policy_search.menu import paper_policy

BOUND = 2e-5  # relative, of logits: two fp32 orders of summation
NAMES = ("pocketvar", "emojivar")
WORDS = (3, 2, 1, 2, 3, 4, 5)


class Driven:
    """A tiny model, what begins a picture of it, and the logits of every scale that it drew."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.name, self.model = name, tiny.make_model() if name == "pocketvar" else tiny_emojivar.make_model()
        self.model.requires_grad_(False).to(device)
        self.last = len(self.model.schedule) - 1

    def begin(self, seed: int = 1, attend=None, pictures: int = 1, guidance: float = 1.5) -> Generating:
        noise = torch.stack([draw_noise(self.model.schedule, self.model.config.bits, seed + i) for i in range(pictures)])
        if self.name == "pocketvar":
            return Pocket(self.model, list(range(3, 3 + pictures)), noise, 0.7, attend)
        return Emoji(self.model, [(i, *WORDS[1:]) for i in range(pictures)], noise, 0.7, guidance, attend)

    def attention(self, *steps, rules=None) -> SparseAttention:
        c, schedule = self.model.config, self.model.schedule
        if rules is None:
            skipped = {s for step in steps for s in step.skips}
            rules = [r for r in paper_policy(schedule, c.depth, c.heads).rules if r.scale_index not in skipped]
        policy = Policy((("AB" * c.heads)[: c.heads],) * c.depth, tuple(rules), tuple(steps))
        return SparseAttention(policy, schedule, softmax_scale=self.model.softmax_scale, logit_bound=self.model.logit_bound)

    def everything(self) -> list[tuple[str, int]]:
        """What hangs on the model and its modules, by name and identity."""
        found = [(f"{name}.{key}", id(v)) for name, m in self.model.named_modules() for key, v in vars(m).items()]
        return [*found, *((name, id(t)) for name, t in self.model.state_dict(keep_vars=True).items())]

    @contextlib.contextmanager
    def on(self, attend=None, **options):
        family, parts = adapters.recognise(self.model)
        path = fused.put_on(family, parts, attend, "fused", **options)
        try:
            yield path
        finally:
            path.undo()


def logits_of(run: Generating) -> list[torch.Tensor]:
    """What the rest of a picture's scales are drawn from."""
    seen, take = [], Generating.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generating, "take", lambda self, logits: (seen.append(logits.clone()), take(self, logits)))
        run.run()
    return seen


def error(got, want) -> float:
    assert len(got) == len(want)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def poison(path: fused.boxed.FusedSampling) -> None:
    """NaN in every buffer that a picture has to write before it reads."""
    picture = path._picture
    for t in (
        path.work.x,
        path.work.cached,
        path.stack.modulation,
        path._fhat,
        *path.work.thinning.given.values(),
        *(getattr(picture, n) for n in picture.constants),
    ):
        t.fill_(float("nan"))
