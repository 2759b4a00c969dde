"""A model of your own: its row, how to drive it, and from then on every command and function takes its name."""

from dataclasses import replace

import torch
import torch.nn.functional as F

import sparvar_tune
from sparvar_kernels import Policy, ScaleSchedule, SparseAttention
from sparvar_tune.adapters import ADAPTERS, Adapter
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.measure.fidelity import compare_pictures
from sparvar_tune.policy_search.menu import paper_policy

LAYERS, HEADS, DIM = 2, 2, 32
SCHEDULE = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16))


class TinyAdapter(Adapter):
    """A state is (canvas, keys and values by layer, noise, next scale); none of them is ever changed."""

    def __init__(self, model, device: str) -> None:
        torch.manual_seed(0)
        self.model, self.schedule, self.device = model, SCHEDULE, device
        self.qkv = [torch.randn(HEADS * DIM, 3 * HEADS * DIM, device=device) / 8 for _ in range(LAYERS)]
        self.softmax_scale, self.logit_bound, self.temperature = 1.0, 10.0, 1.0
        self.weights_sha256, self.num_classes = "0" * 64, 10
        self.dense, self.dense_name = SparseAttention(Policy(("A" * HEADS,) * LAYERS, ()), SCHEDULE), "all dense"

    def start(self, pair: tuple[int, int], until: int):
        label, seed = pair
        noise = torch.randn(1, SCHEDULE.num_tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed)) + label / 10
        empty = torch.empty(1, HEADS, 0, DIM)
        return self._draw((torch.zeros(1, HEADS * DIM, 16, 16), [(empty, empty)] * LAYERS, noise, 0), self.dense, until)

    def _draw(self, state, attend, until: int):
        canvas, caches, noise, first = state
        for s in range(first, until):
            grid, caches = SCHEDULE.grids[s], list(caches)
            x = F.adaptive_avg_pool2d(canvas, grid).flatten(2).mT + noise[:, SCHEDULE.starts[s] : SCHEDULE.starts[s + 1]]
            for layer, weight in enumerate(self.qkv):
                q, k, v = (F.layer_norm(x, x.shape[-1:]) @ weight).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
                new = F.normalize(k, dim=-1), v
                caches[layer] = keys, values = tuple(torch.cat(both, 2) for both in zip(caches[layer], new, strict=True))
                x = x + attend(10 * F.normalize(q, dim=-1), keys, values, layer, s).transpose(1, 2).flatten(2)
            canvas = canvas.lerp(F.interpolate(x.mT.unflatten(2, grid), canvas.shape[-2:]), 0.5)
        return canvas, caches, noise, max(first, until)

    def finish(self, state, attend, redraw_from: int | None = None) -> torch.Tensor:
        canvas = self._draw(state, attend, len(SCHEDULE) - len(attend.skip_scales))[0]
        return canvas[:, :3].sigmoid()  # [1, 3, 16, 16] in 0..1

    def classes(self) -> list[str]:
        return [f"shade {i}" for i in range(self.num_classes)]


open_model = TinyAdapter
MODELS["tiny"] = replace(
    MODELS["pocketvar"], slug="tiny", title="Tiny", layers=LAYERS, heads=HEADS, head_dim=DIM, width=HEADS * DIM,
    resolutions={"16": {"1.000": SCHEDULE}}, default_resolution="16", adapter="tiny", source="this file",
)  # fmt: skip
ADAPTERS["tiny"] = __name__

calls = sparvar_tune.capture("tiny", (3, 7))
print("captured:", {at: tuple(q.shape) for at, (q, _, _) in calls.items()})
model = TinyAdapter(MODELS["tiny"], "cpu")
sparse = SparseAttention(paper_policy(SCHEDULE, LAYERS, HEADS), SCHEDULE, logit_bound=model.logit_bound)
pictures = [model.finish(model.start((3, 7), 4), attend) for attend in (model.dense, sparse)]
print("the paper's setting:", compare_pictures(pictures[1], pictures[0]))
print('next: sparvar_tune.tune("tiny", gpu="cpu", quality="fast", progress=print)')
