"""What driving the models in the box shares: parked states, pictures finished from them, yardsticks."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparvar_kernels.attention import SparseAttention
from sparvar_tune.adapters.boxed import file_hash
from sparvar_tune.adapters.protocol import Adapter, Pair
from sparvar_tune.adapters.registry import recognise
from sparvar_tune.adapters.whole_images import begin_image
from sparvar_tune.bitwise.sampling import Attend, DenseAttention, Generating, draw_noise
from sparvar_tune.catalog.models import Model
from sparvar_tune.fused.boxed import FusedSampling, sampling
from sparvar_tune.fused.workspace import attention_like

REDRAW = "dense, noise redrawn at the last two scales"
DROP = "dense, last scale left out"
APART = 10_000_000  # above every seed of `measure.pairs`
MOST_TO_WARM = 4  # pictures: the first compiles, the second is captured, one more where a decision was not replayed before


class BoxedAdapter(Adapter):
    """A model in the box, driven. `begin` says what a pair is; `yardsticks_file` what is known of these weights."""

    yardsticks_file: Path
    classes_by_index: tuple[str, ...]
    images: int = 1  # pictures drawn at once: those of `pictures_of` a pair

    def __init__(self, model: Model, device: str, live: Any, weights: Path, temperature: float) -> None:
        self.model, self.device, self.live = model, device, live
        self.schedule = live.schedule
        self.softmax_scale, self.logit_bound = live.softmax_scale, live.logit_bound
        self.weights_sha256 = file_hash(weights)
        self.temperature = temperature
        self.num_classes = len(self.classes_by_index)
        self.dense, self.dense_name = DenseAttention(live.softmax_scale), "torch scaled_dot_product_attention"
        _, self.parts = recognise(live)
        self.as_one = self.parts.on_gpu  # whether pictures are drawn on the path that `apply` would take on a GPU
        self.picture_path = "fused path, CUDA graphs" if self.as_one else ""
        self._paths: WeakKeyDictionary[Any, FusedSampling] = WeakKeyDictionary()
        self._started: Generating | None = None

    @abstractmethod
    def begin(self, pairs: Sequence[Pair], noise: Tensor, attend: Attend | None = None) -> Generating:
        """The generation of pairs, each with its noise, before its first scale, with dense attention unless told otherwise."""

    def pictures_of(self, pair: Pair) -> list[Pair]:
        """The pairs that are drawn at once with this one, which comes first: other classes, seeds that no other pair has."""
        label, seed = pair
        return [((label + i) % self.num_classes, seed + i * APART) for i in range(self.images)]

    def start(self, pair: Pair, until: int) -> Generating:
        pairs = self.pictures_of(pair)
        noise = torch.stack([draw_noise(self.schedule, self.live.config.bits, seed) for _, seed in pairs])
        path = self._drawn_with(self.dense)
        begun = self.begin(pairs, noise, path)
        if self.as_one:
            self._warm(path, begun, lambda: begun.fork().run())
            self._started = begun
        return begun.run(until).parked()

    def finish(self, state: Generating, attend: Attend, redraw_from: int | None = None) -> Tensor:
        if not callable(attend):
            raise ValueError(f"attend: got a {type(attend).__name__}, want what is called with q, k, v: of a profile, "
                             "tuned.sparse_attention()")  # fmt: skip
        begin_image(attend)  # a state is finished many times, maybe with one attention
        noise = None
        if redraw_from is not None:
            begin, noise = self.schedule.starts[redraw_from], state.noise.clone()
            for own in noise:
                own[begin:] = draw_noise(self.schedule, self.live.config.bits, self._seed_of(own))[begin:]
        return state.fork(self._drawn_with(attend), noise).run().pictures()

    def prepare(self, attend: Attend) -> bool:
        path = self._drawn_with(attend)
        if not isinstance(path, FusedSampling):
            return False
        state = self._started or self.start((0, 1), 0)
        self._warm(path, state, lambda: self.finish(state, attend))
        return True

    @staticmethod
    def _warm(path: FusedSampling, state: Generating, draw: Callable[[], object]) -> None:
        """Draws from a state on until nothing is compiled or captured any more."""
        for _ in range(MOST_TO_WARM):
            if path.is_ready(state):
                break
            draw()

    def _drawn_with(self, attend: Any) -> Any:
        """The path with such an attention, its graphs kept as long as the attention is; what looks at each call, as a stopwatch
        does, stays attention alone.
        """
        if not self.as_one or not (isinstance(attend, SparseAttention) or attend is self.dense):
            return attend
        path = self._paths.get(attend)
        if path is None:
            like = attention_like(self.parts, attend, self.schedule) if isinstance(attend, SparseAttention) else None
            path = self._paths[attend] = sampling(self.parts, like)  # which does not hold the key
        return path

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
