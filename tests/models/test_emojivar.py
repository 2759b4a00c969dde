"""The second model in the box: its generation against a straightforward fp64 one, captions, guidance, steps."""

from __future__ import annotations

import math

import pytest
import tiny_emojivar
import torch

from lab.emojivar.train import TeacherForcing
from sparvar_kernels import Cs4a, Policy, Rule, SparseAttention, Tile
from sparvar_tune.adapters import apply, load_adapter
from sparvar_tune.adapters import emojivar as adapter
from sparvar_tune.catalog.models import find_model
from sparvar_tune.cli.parser import main
from sparvar_tune.emojivar import installed
from sparvar_tune.emojivar.caption import CLASSES, COLOURS, HEIGHT, LATTICE, LAYOUTS, SLOTS, THINGS, WIDTH, caption, say
from sparvar_tune.emojivar.model import EmojiConfig, Generation, draw_noise, load_emojivar
from sparvar_tune.generation import CacheBudget, DropUnconditional, PruneTokens, SkipScales
from sparvar_tune.measure.timing import Stopwatch
from sparvar_tune.policy_search.certify import TimedByScale
from sparvar_tune.policy_search.judge import first_touched, make_attention
from sparvar_tune.policy_search.menu import paper_policy, step_menu

GRIDS = ((1, 1), (2, 2), (3, 4), (6, 8))
WORDS = (3, 2, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def model():
    return tiny_emojivar.make_model(GRIDS, heads=3, head_dim=16, mlp=40, bits=5)


def generation(model, words=WORDS, seed=1, guidance=1.5, attend=None):
    return Generation(model, [words], draw_noise(model.schedule, 5, seed), 0.7, guidance, attend)


def sparse(model, *steps, rules=()):
    c = model.config
    policy = Policy(("A" * c.heads,) * c.depth, tuple(rules), tuple(steps))
    return SparseAttention(policy, model.schedule, softmax_scale=c.head_dim**-0.5, logit_bound=None)


class Oracle:
    """The whole model again in fp64: every token a row, no cache, a loop over heads, sums for pooling and enlarging."""

    def __init__(self, model):
        self.t = {name: t.double() for name, t in model.state_dict().items()}
        self.c, self.grids = model.config, model.config.grids

    def linear(self, name, x):
        return x @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def rope(self, x, places):
        """x [N, D]; places: (y, x) on the last grid, or None for the prefix."""
        quarter, out = x.shape[1] // 4, x.clone()
        for n, place in enumerate(places):
            for j in range(2 * quarter if place else 0):
                angle = place[j // quarter] * 1.5 * 100 ** (-(j % quarter) / quarter)
                a, b = x[n, 2 * j], x[n, 2 * j + 1]
                out[n, 2 * j] = a * math.cos(angle) - b * math.sin(angle)
                out[n, 2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def logits(self, words, fhats):
        """Of every token of the scales before which `fhats` stood."""
        first, rows, places, block = 1, [self.t["words.weight"][0]], [None], [-1]
        for word, count in zip(words, self.c.slots, strict=True):
            rows.append(self.t["words.weight"][first + 1 + word])
            first += 1 + count
            places.append(None)
            block.append(-1)
        full = self.grids[-1]
        for s, (h, w) in enumerate(self.grids[: len(fhats)]):
            for y in range(h):
                for x in range(w):
                    cells = fhats[s][:, y * full[0] // h : (y + 1) * full[0] // h, x * full[1] // w : (x + 1) * full[1] // w]
                    drawn = self.linear("embed", cells.mean((1, 2))) if s else self.t["start"]
                    rows.append(drawn + self.t["levels.weight"][s])
                    places.append(((y + 0.5) / h * full[0], (x + 0.5) / w * full[1]))
                    block.append(s)
        x, block = torch.stack(rows), torch.tensor(block)
        hidden = (block[:, None] < block[None, :]).double() * -1e30
        for layer in range(self.c.depth):
            name, d, out = f"blocks.{layer}", self.c.head_dim, []
            qkv = self.linear(f"{name}.qkv", self.norm(f"{name}.norm1", x))
            for head in range(self.c.heads):
                q, k, v = (qkv[:, i * self.c.width + head * d :][:, :d] for i in range(3))
                weights = torch.softmax(self.rope(q, places) @ self.rope(k, places).T / math.sqrt(d) + hidden, -1)
                out.append(weights @ v)
            x = x + self.linear(f"{name}.proj", torch.cat(out, 1))
            y = self.linear(f"{name}.fc1", self.norm(f"{name}.norm2", x))
            x = x + self.linear(f"{name}.fc2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
        return self.linear("head", self.norm("norm", x))[block >= 0]

    def draw(self, words, noise, temperature, guidance, drop=99):
        """fhat [bits, H, W] in the end, and the mixed logits of every token."""
        full, first, told = self.grids[-1], 0, []
        fhats = [torch.zeros(self.c.bits, *full, dtype=torch.float64)]
        for s, (h, w) in enumerate(self.grids):
            mixed = self.logits(words, fhats)[first:]
            if s < drop:
                mixed = (1 + guidance) * mixed - guidance * self.logits((-1,) * len(words), fhats)[first:]
            bits = mixed + temperature * noise[self.c.prefix + first :][: h * w].double() > 0
            step = (2.0 * bits - 1).T.unflatten(1, (h, w)) * self.t["quantiser.amplitude"][s][:, None, None]
            grown = torch.nn.functional.interpolate(step[None], full, mode="bilinear", align_corners=False)[0]
            fhats.append(fhats[-1] + grown)
            told.append(mixed)
            first += h * w
        return fhats[-1], torch.cat(told)


@pytest.mark.parametrize(("guidance", "drop"), [(0.0, None), (1.5, None), (1.5, 2)])
def test_generation_is_the_oracle(model, guidance, drop, monkeypatch):
    attend, seen, take = sparse(model, *([] if drop is None else [DropUnconditional(drop)])), [], Generation.take
    monkeypatch.setattr(Generation, "take", lambda self, logits: (seen.append(logits[0]), take(self, logits)))
    run = generation(model, guidance=guidance, attend=attend).run()
    want, logits = Oracle(model).draw(WORDS, run.noise[0], 0.7, guidance, len(GRIDS) if drop is None else drop)
    assert torch.allclose(torch.cat(seen).double(), logits, atol=1e-4)
    assert torch.allclose(run.fhat[0].double(), want, atol=1e-5)


def test_dropping_the_half_runs_half_of_the_rows(model):
    rows = []

    class Seen:
        skip_scales = ()
        policy = sparse(model, DropUnconditional(2)).policy

        def __call__(self, q, k, v, layer, scale_index):
            rows.append((scale_index, q.shape[0], k.shape[2]))
            return model.attend(q, k, v, layer, scale_index)

    generation(model, attend=Seen()).run()
    assert rows[::2] == [(0, 2, 9), (1, 2, 13), (2, 1, 25), (3, 1, 73)]


@pytest.mark.parametrize("wrap", [lambda attend: attend, lambda attend: TimedByScale(attend, Stopwatch("cpu"))])
def test_what_lives_on_a_decision_goes_on_with_one_half(model, wrap):
    """The oracle: the same attention on both halves to the end, mixed with guidance 0 from there on."""
    rules, words = [Rule(3, "A", Cs4a(1, 0.3, Tile(0, 8)))], [WORDS, (1, *WORDS[1:])]
    noise = draw_noise(model.schedule, 5, 3)
    whole = Generation(model, words, noise, 0.7, 1.5, sparse(model, rules=rules)).run(2)
    whole.guidance = 0.0
    want = whole.run().fhat
    attend = sparse(model, DropUnconditional(2), rules=rules)
    for _ in range(2):  # a second picture with the same object
        assert torch.allclose(Generation(model, words, noise, 0.7, 1.5, wrap(attend)).run().fhat, want, atol=1e-5)
    parked = Generation(model, words, noise, 0.7, 1.5).run(1).parked()
    for _ in range(2):
        attend.reset()
        timed = wrap(attend)
        assert torch.allclose(parked.fork(timed).run().fhat, want, atol=1e-5)
        assert timed is attend or set(timed.spent_ms) == {1, 2, 3}
    assert not torch.allclose(Generation(model, words, noise, 0.7, 1.5, sparse(model, DropUnconditional(2))).run().fhat, want)


def test_a_parked_state_goes_on_alike(model):
    parked = generation(model).run(2).parked()
    whole = generation(model, attend=sparse(model, DropUnconditional(2))).run().pictures()
    for _ in range(2):
        assert torch.equal(parked.fork(sparse(model, DropUnconditional(2))).run().pictures(), whole)
    assert not torch.equal(parked.fork().run().pictures(), whole)


def test_a_live_model_does_the_steps(model):
    dense = generation(model).run().pictures()
    undo = apply(model, sparse(model, SkipScales((3,)), DropUnconditional(2)))
    changed = generation(model).run()
    undo.undo()
    assert changed.scale == 3 and changed.cache.shape[2] == 1
    assert torch.equal(generation(model).run().pictures(), dense)


def test_pruned_tokens(model):
    """Every token kept draws the plain picture; of fewer, those appended are the farthest of the scale's input."""
    plain = generation(model)
    every = sparse(model, PruneTokens(2, (12, 48), 1, 0, 1))
    assert torch.allclose(generation(model, attend=every).run().fhat, plain.run().fhat, atol=1e-5)
    run, dense = generation(model, attend=sparse(model, PruneTokens(3, (10,), 2, 0, 0))).run(), plain
    x = model.inputs([generation(model).run(3).fhat], range(3, 4))[0]
    far = sorted(range(48), key=lambda i: -float((x[i] - x.mean(0)).square().sum()))[:10]
    start = model.schedule.starts[3]
    assert run.filled == [start + 10, start + 48]
    assert torch.allclose(run.cache[0, :, :, :, start : start + 10], dense.cache[0, :, :, :, [start + i for i in far]])


def test_cut_caches(model):
    """What each half and head of a layer keeps, key by key; the caption's tokens compete like all others."""
    step, (h, w), c = CacheBudget(3, ((14, 17),), window=4, pool=3), GRIDS[2], model.config
    cut, dense = generation(model, attend=sparse(model, step)).run(3), generation(model).run(3)
    assert cut.filled == [14, 17]
    first = model.schedule.starts[2]
    window = [y * w + x for y in (0, 1) for x in (0, 2)]  # middles of halves of 3 rows and 4 columns
    x = model.inputs([generation(model).run(2).fhat], range(2, 3)).expand(2, -1, -1)
    block = model.blocks[0]
    queries = (block.norm1(x)[:, window] @ block.qkv.weight[: c.width].T).unflatten(-1, (c.heads, -1))
    own, keys = [first + i for i in window], dense.cache[0, 0]
    for half in range(2):
        for head in range(c.heads):
            score = [float((queries[half, :, head] @ keys[half, head, n]).sum()) for n in range(first + h * w)]
            score = [-math.inf if n in own else s for n, s in enumerate(score)]
            pooled = [max(score[max(0, n - 1) : n + 2]) for n in range(len(score))]
            others = sorted((n for n in range(len(score)) if n not in own), key=lambda n: -pooled[n])
            best = pooled[others[9]]
            kept = [n for n in range(len(score)) if n in own or pooled[n] > best]
            got = cut.cache[0, 0, half, head, :14]
            found = [n for n in range(len(score)) if (got == keys[half, head, n]).all(1).any()]
            assert set(kept) <= set(found) and len(found) == 14 and all(n in own or pooled[n] >= best for n in found)
    whole = sparse(model, CacheBudget(3, ((25, 25),), window=4, pool=3))
    assert torch.equal(generation(model, attend=whole).run().fhat, generation(model).run().fhat)


def test_teacher_forcing_equals_sampling(model, monkeypatch):
    """One pass over the caption and all scales gives the logits that sampling saw scale by scale."""
    seen, states, take = [], [], Generation.take
    monkeypatch.setattr(Generation, "take", lambda self, logits: (seen.append(logits), take(self, logits)))
    run = generation(model, guidance=0.0)
    while run.scale < len(GRIDS):
        run.step()
        states.append(run.fhat)
    forced = TeacherForcing(model, False)(states, torch.tensor([WORDS]))
    assert torch.allclose(torch.cat(seen, 1), forced, atol=2e-5)


def test_captions():
    drawn = [caption(thing, seed) for thing in range(len(CLASSES)) for seed in range(50)]
    assert drawn[0] == caption(0, 0) and len(set(drawn)) > 1100
    for words in drawn:
        thing, which, layout, row, column, *_ = words
        size, rows, columns = list(LAYOUTS.values())[layout]
        assert which < len(THINGS[CLASSES[thing]]) and row < rows and column < columns
        assert LATTICE * row + size <= HEIGHT and LATTICE * column + size <= WIDTH
        assert all(w < most for w, most in zip(words, SLOTS.values(), strict=True))
    assert len(COLOURS) == 8 and say((0, 0, 0, 1, 2, 3, 4)) == "😺 large, row 1, column 2, green over sand"


def test_wrong_requests_are_refused(model):
    with pytest.raises(ValueError, match=r"caption \(99, .*want 7 words"):
        generation(model, words=(99, *WORDS[1:]))
    with pytest.raises(ValueError, match="guidance=-1"):
        generation(model, guidance=-1.0)


def test_the_row_is_the_model():
    row, c = find_model("emojivar"), EmojiConfig()
    assert (row.layers, row.heads, row.head_dim, row.width) == (c.depth, c.heads, c.head_dim, c.width)
    assert row.schedule() == c.schedule and row.softmax_scale == c.head_dim**-0.5


@pytest.fixture
def driven(monkeypatch):
    tiny_emojivar.install(monkeypatch.setattr)
    return load_adapter(find_model("emojivar"), "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("driven")
def test_the_adapter_keeps_every_promise(capsys):
    assert main(["check-adapter", "emojivar"]) == 0
    assert "all 18 checks hold: sparvar-tune --model emojivar" in capsys.readouterr().out


def test_a_policy_may_take_every_step(driven):
    """Also half dropped in the midst of scales that live on a decision: what the search is offered, it can draw."""
    state, rules = driven.start((3, 1), first_touched(driven)), paper_policy(driven.schedule, 2, 2).rules
    offered = step_menu(driven.schedule, driven.steps, 2, ("int8", "e4m3"))
    assert {step.kind for option in offered.values() for step in option.steps} == set(driven.steps) == set(adapter.STEPS)
    dense = driven.finish(state, driven.dense)
    for name, option in offered.items():
        skipped = {s for step in option.steps for s in step.skips}
        kept = tuple(r for r in rules if r.scale_index not in skipped and not option.steps[0].thins)
        attend = make_attention(driven, Policy(("AA", "BB"), kept, option.steps))
        first, again = (driven.finish(state, attend) for _ in range(2))
        assert torch.equal(first, again) and not torch.equal(first, dense), name


def test_without_the_weights_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "site" / "sparvar_tune" / "emojivar" / "installed.py"))
    monkeypatch.setattr(installed, "PACKAGE", "sparvar_tune_not_here")
    with pytest.raises(FileNotFoundError, match=r"no weights; pip install 'sparvar-tune\[emojivar\]'"):
        load_emojivar()
    assert main(["generate", "--gpu", "cpu", "--model", "emojivar", "--out", str(tmp_path / "a.png")]) != 0
    said = capsys.readouterr().err.strip()
    assert "pip install 'sparvar-tune[emojivar]'" in said and "\n" not in said


def test_shipped_weights():
    assert installed.place("emojivar.safetensors").stat().st_size <= 20 * 2**20
    found = load_adapter(find_model("emojivar"), "cpu")
    assert found.live.config == EmojiConfig()
    assert len(found.yardsticks()) == 2, "yardsticks.json must be of the shipped weights"
    assert adapter.weights_sha256(found.live) == found.weights_sha256
