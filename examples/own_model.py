"""A model of your own, ready to be tuned. Run as it stands it draws a picture the paper's way; on the command line:

sparvar-tune check-adapter own_model.py:open_model
sparvar-tune --gpu cpu --model own_model.py:open_model --quality fast
"""

import torch
import torch.nn.functional as F

from sparvar_kernels import ScaleSchedule
from sparvar_tune.adapters import WholeImages, own_model

LAYERS, HEADS, DIM, WIDTH = 2, 2, 32, 64
SCHEDULE = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16))


class Model(torch.nn.Module):
    """Stands for yours: each scale attends to all so far; what it makes is blended into a canvas."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, noise, attend, scales):
        canvas, cache = torch.zeros(1, WIDTH, 16, 16, device=noise.device), [[] for _ in self.qkv]
        for s in range(scales):
            grid = SCHEDULE.grids[s]
            x = F.adaptive_avg_pool2d(canvas, grid).flatten(2).mT + noise[:, SCHEDULE.starts[s] : SCHEDULE.starts[s + 1]]
            for layer, linear in enumerate(self.qkv):
                q, k, v = linear(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
                cache[layer].append((F.normalize(k, dim=-1), v))
                keys, values = (torch.cat(part, 2) for part in zip(*cache[layer], strict=True))
                x = x + attend(10 * F.normalize(q, dim=-1), keys, values, layer, s).transpose(1, 2).flatten(2)
            canvas = canvas.lerp(F.interpolate(x.mT.unflatten(2, grid), canvas.shape[-2:]), 0.5)
        return canvas[:, :3].sigmoid()  # [1, 3, 16, 16] in 0..1


class Mine(WholeImages):
    def __init__(self, device: str) -> None:
        self.net = Model().to(device).eval()
        row = own_model(
            "mine", SCHEDULE, layers=LAYERS, heads=HEADS, head_dim=DIM, dtype="fp32", softmax_scale=1.0, logit_bound=10.0
        )
        super().__init__(row, device=device, classes=[f"shade {i}" for i in range(10)], weights=self.net)

    def draw(self, label, seed, attend):
        noise = torch.randn(1, SCHEDULE.num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) + label / 10
        return self.net(noise.to(self.device), attend, len(SCHEDULE) - len(attend.skip_scales))


def open_model(device: str) -> Mine:
    return Mine(device)


if __name__ == "__main__":
    import sparvar_tune

    calls = sparvar_tune.capture(open_model("cpu"), (3, 7))
    print("captured:", {at: tuple(q.shape) for at, (q, _, _) in calls.items()})
