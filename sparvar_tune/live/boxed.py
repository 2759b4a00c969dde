"""What driving the models in the box shares: parked states, pictures finished from them, yardsticks."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparvar_tune.adapters.boxed import file_hash
from sparvar_tune.adapters.protocol import Adapter
from sparvar_tune.adapters.whole_images import begin_image
from sparvar_tune.bitwise.sampling import Attend, DenseAttention, Generating, draw_noise
from sparvar_tune.catalog.models import Model

REDRAW = "dense, noise redrawn at the last two scales"
DROP = "dense, last scale left out"


class BoxedAdapter(Adapter):
    """A model in the box, driven. `begin` says what a pair is; `yardsticks_file` what is known of these weights."""

    yardsticks_file: Path
    classes_by_index: tuple[str, ...]

    def __init__(self, model: Model, device: str, live: Any, weights: Path, temperature: float) -> None:
        self.model, self.device, self.live = model, device, live
        self.schedule = live.schedule
        self.softmax_scale, self.logit_bound = live.softmax_scale, live.logit_bound
        self.weights_sha256 = file_hash(weights)
        self.temperature = temperature
        self.num_classes = len(self.classes_by_index)
        self.dense, self.dense_name = DenseAttention(live.softmax_scale), "torch scaled_dot_product_attention"

    @abstractmethod
    def begin(self, pair: tuple[int, int], noise: Tensor) -> Generating:
        """The generation of a pair before its first scale, with dense attention."""

    def start(self, pair: tuple[int, int], until: int) -> Generating:
        return self.begin(pair, draw_noise(self.schedule, self.live.config.bits, pair[1])).run(until).parked()

    def finish(self, state: Generating, attend: Attend, redraw_from: int | None = None) -> Tensor:
        begin_image(attend)  # a state is finished many times, maybe with one attention
        noise = None
        if redraw_from is not None:
            begin = self.schedule.starts[redraw_from]
            noise = state.noise[0].clone()
            noise[begin:] = draw_noise(self.schedule, self.live.config.bits, self._seed_of(noise))[begin:]
        return state.fork(attend, noise).run().pictures()

    @staticmethod
    def _seed_of(noise: Tensor) -> int:
        """A number that depends on the noise alone, so that redrawing is a pure function of the pair."""
        return int(hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest()[:10], 16)

    def classes(self) -> Sequence[str]:
        return self.classes_by_index

    def required(self, preset: str) -> Mapping[str, float]:
        if preset == "near-lossless":
            for name, psnr_db, _ssim in self.yardsticks():
                if name == REDRAW:
                    return {"psnr": psnr_db, "ssim": 0.93}
            slug = self.model.slug
            raise ValueError(f"{self.yardsticks_file.name}: not of these weights; run python -m lab.yardsticks {slug}")
        return super().required(preset)

    def class_levels(self) -> tuple[float, ...]:
        for row in self._yardstick_rows():
            if row["name"] == REDRAW:
                return tuple(row["psnr_db_by_class"])
        return (0.0,) * self.num_classes

    def yardsticks(self) -> tuple[tuple[str, float, float], ...]:
        return tuple((row["name"], row["psnr_db"], row["ssim"]) for row in self._yardstick_rows())

    def _yardstick_rows(self) -> list[dict[str, Any]]:
        """Rows of yardsticks.json if they were measured with these weights, else none."""
        if not self.yardsticks_file.is_file():
            return []
        data = json.loads(self.yardsticks_file.read_text("utf-8"))
        return data["rows"] if data["weights_sha256"] == self.weights_sha256 else []
