"""What `import sparvar_tune` offers beside loading and applying a profile: tuning, its trials, what runs here, a capture.

Every function takes the names the command line takes, and raises ValueError with the line the command would print.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparvar_tune.adapters import Adapter, Pair
from sparvar_tune.adapters.protocol import lacks
from sparvar_tune.catalog.gpus import check_device
from sparvar_tune.catalog.inputs import path_of, paths_of, whole
from sparvar_tune.catalog.names import DEFAULT_PRESET, shown
from sparvar_tune.live import LiveModel
from sparvar_tune.measure.capture import Recorder
from sparvar_tune.measure.capture_file import CaptureFile, CaptureWriter
from sparvar_tune.profile.schema import Profile
from sparvar_tune.ways.settings import BUDGET_S, PAIRS, Settings, seconds
from sparvar_tune.ways.subject import Subject, place_of

if TYPE_CHECKING:
    import pandas


def tune(
    model: Any, *, generate: Callable[[Any, int], Any] | None = None, prompts: Path | str | Sequence[Any] | None = None,
    name: str | None = None, source: Path | str | None = None, weights: Path | str | None = None,
    gpu: str = "auto", quality: str = DEFAULT_PRESET, resolution: str | None = None, aspect: str | None = None,
    images: int = 1, bounds: Mapping[str, float] | None = None, budget: float | str = BUDGET_S,
    pairs: int = PAIRS, seed: int = 0, out: Path | str | None = None, resume: bool = False, search: bool = False,
    workers: int | None = None, mode: str = "eager", merge: Sequence[Path | str] = (), log: Path | str | None = None,
    storage: str | None = None, metric_weights: Mapping[str, Path | str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Profile:  # fmt: skip
    """Tunes as `sparvar-tune` does, by the same code, and returns the profile that is then in its file.

    model: a name as the command takes it, an adapter (of a model of one's own), or a live Infinity, HART or VAR with
    generate(prompt, seed) -> picture, which draws with it, and the prompts to tune on (`sparvar_tune.live.LiveModel`). name:
    of a live model that is in no table. source, weights: a checkout of the authors' code and a folder of weights, or "random",
    to open a model of the table from; prompts is then a text file, a line each, or a list.
    quality: "near-lossless", "paper" or "fast"; bounds: such as {"psnr": 34.5, "psnr_worst_class": 33}, what the confidence bound
    of the mean must reach instead. budget: seconds, or text such as "3m". out: folder that gets <gpu>/<model>.json, None for
    this user's. progress: gets every line the command would print, such as `print`; None for silence. The others are those
    of `sparvar_tune.ways.settings.Settings`. Where nothing can be measured the profile is marked so (`state`,
    `policy_state`), as the command's is.

    Raises ValueError: an unknown name, a value out of range, a bound nothing meets, a file that cannot be written.
    """
    from sparvar_tune.ways.choose_way import choose_way

    if bounds is not None and not isinstance(bounds, Mapping):
        raise ValueError(f"bounds: got {shown(repr(bounds), 80)}, want one by metric such as {{'psnr': 34.5}}")
    if metric_weights is not None and not isinstance(metric_weights, Mapping):
        raise ValueError(f"metric_weights: got {shown(repr(metric_weights), 80)}, want one path by metric: {{'lpips': path}}")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress: got {shown(repr(progress), 80)}, want a function that takes a line, such as print")
    if name is not None and generate is None:
        raise ValueError(f"name: got {shown(repr(name), 80)} without generate=...; only a live model is named here")
    settings = Settings(
        dict(bounds or {}), seconds(budget), pairs, seed, _path("out", out), resume, search, workers, mode,
        paths_of("merge", merge), _path("log", log), _url(storage),
        {name: path_of("metric_weights", path) for name, path in (metric_weights or {}).items()},
    )  # fmt: skip
    with ExitStack() as opened:
        if generate is not None:
            drawn: Any = () if prompts is None else prompts
            model, prompts = opened.enter_context(LiveModel(model, generate, drawn, name=name)), None
        place = place_of(source, weights, prompts)
        way = choose_way(Subject.of(model, gpu, quality, resolution, aspect, images, place), settings)
        return way.run(_silent if progress is None else progress, _silent)


def trials(
    model: str, *, gpu: str = "auto", quality: str = DEFAULT_PRESET, resolution: str | None = None, aspect: str | None = None,
    storage: str | None = None,
) -> pandas.DataFrame:  # fmt: skip
    """The finished trials of the last search, or of every study of the model in `storage` (a URL): a row each.

    Raises ValueError where there are none.
    """
    from sparvar_tune.ways.trials import trials_of

    return trials_of(Subject.of(model, gpu, quality, resolution, aspect), _url(storage))


def explain(
    model: str, *, gpu: str = "auto", quality: str = DEFAULT_PRESET, resolution: str | None = None, aspect: str | None = None,
    images: int = 1, path: Path | str | None = None,
) -> str:  # fmt: skip
    """What would run on this machine and why, in a few lines. Raises ValueError as `load_profile` does."""
    return Subject.of(model, gpu, quality, resolution, aspect, images).load(_path("path", path)).explain()


def capture(
    model: str | Adapter, pair: Pair = (0, 0), *, scales: Sequence[int] | None = None, device: str = "cpu",
    out: Path | str | None = None,
) -> Mapping[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """q, k and v of every attention call of one dense generation: by (layer, scale index).

    model: a slug, or an adapter, that of a model of one's own. pair: (class, noise seed). scales: those kept, None for the
    last two. device: "cpu" or "cuda", where a slug's model runs. q is [B, H, Nq, D], k and v [B, H, Nk, D], in the model's
    dtype, on its device; k and v are views of one cache, so a capture takes the memory of its queries and one cache a layer.

    out: a safetensors file that gets them call by call instead, so that memory holds one call; the answer reads them from it.

    Raises ValueError for an unknown model, one without an adapter, a device that is not here, scales it does not have, and a
    disk without the room.
    """
    kind = check_device(device).type
    adapter = Subject.of(model, kind if kind == "cpu" else "auto").adapter if isinstance(model, str) else model
    reason = lacks(adapter)
    if reason:
        raise ValueError(f"model: {reason}")
    last, file = len(adapter.schedule) - 1, _path("out", out)
    given = (last - 1, last) if scales is None else scales
    if not isinstance(given, Collection) or not len(given) or not all(isinstance(s, int) and 0 <= s <= last for s in given):
        raise ValueError(f"scales: got {shown(repr(scales), 80)}, want some of 0..{last}")
    kept = tuple(sorted(set(given)))
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"pair: got {shown(repr(pair), 80)}, want (class, seed)")
    pair = whole("pair: class", pair[0], 0, adapter.num_classes - 1), whole("pair: seed", pair[1], 0, 2**62 - 1)
    if file is not None:
        about = {
            "softmax_scale": adapter.softmax_scale,
            "weights_sha256": adapter.weights_sha256,
            "class": pair[0],
            "seed": pair[1],
        }
        with CaptureWriter(file, adapter.dense, adapter.model, adapter.schedule, kept, **about) as writer:
            adapter.finish(adapter.start(pair, kept[0]), writer)
        return CaptureFile(file)
    recorder = Recorder(adapter.dense, kept)
    adapter.finish(adapter.start(pair, kept[0]), recorder)
    return recorder.calls


def _path(name: str, path: Path | str | None) -> Path | None:
    return None if path is None else path_of(name, path)


def _url(storage: str | None) -> str | None:
    if storage is not None and (not isinstance(storage, str) or not storage):
        raise ValueError(f"storage: got {shown(repr(storage), 80)}, want a URL such as sqlite:///FILE")
    return storage


def _silent(_text: str) -> None:
    pass
