"""Generation steps against the public code they come from: the same tiny Infinity at 1024x1024, drawn by both.

    python tests/public_models/peers.py scalekv INFINITY_CHECKOUT SCALEKV_CHECKOUT
    python tests/public_models/peers.py fastvar INFINITY_CHECKOUT FASTVAR_CHECKOUT

Prints one JSON line. Each picture is drawn in a process of its own, since both checkouts call their package `infinity`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DEPTH, PIXELS = 6, "1M"
STOOD_IN: set[str] = set()


def build(checkout: str):
    sys.path.insert(0, str(HERE.parent))
    from public_models import tiny_infinity

    tiny_infinity.DEPTH, tiny_infinity.PIXELS = DEPTH, PIXELS
    return tiny_infinity.Tiny(checkout)


def scalekv_public(checkout: str):
    """Their own hooks, with the rows of their budget file that a model of few layers has."""
    tiny = build(checkout)
    import enable_scale_kv_2b as public

    scales = json.loads((Path(checkout) / "budgets" / "2b_10%_budget.json").read_text())
    rows = [[row["Max" if row[f"Block {i}"] else "Min"] for i in range(DEPTH)] for row in scales.values()]
    public.get_cache_sizes = lambda: [None] * 9 + rows
    public.enable_scale_kv(tiny.model, window_size=16, max_capacity=650, kernel_size=5, pooling="maxpool")
    return tiny


def scalekv_own(checkout: str):
    from dataclasses import replace

    from sparvar_tune.generation import CacheBudget

    published = CacheBudget.published("infinity-2b")
    return with_steps(checkout, lambda schedule: [replace(published, keys=tuple(row[:DEPTH] for row in published.keys))])


def fastvar_public(checkout: str):
    """Their package as it is: it prunes and skips by the width of a grid."""
    sys.path.insert(0, str(HERE.parent))
    from public_models.stand_ins import put_module

    for name in ("cv2", "matplotlib", "matplotlib.pyplot", "torchvision", "torchvision.transforms"):  # imported, never called
        if importlib.util.find_spec(name.split(".")[0]) is None or name.split(".")[0] in STOOD_IN:
            STOOD_IN.add(name.split(".")[0])
            put_module(name, pyplot=None, transforms=None)
    return build(str(Path(checkout) / "Infinity"))


def fastvar_own(checkout: str):
    from sparvar_tune.generation import PruneTokens, SkipScales

    return with_steps(checkout, lambda schedule: [SkipScales.last(schedule, 2), PruneTokens.published(schedule, DEPTH)])


def with_steps(checkout: str, steps):
    tiny = build(checkout)
    import adapter_checks as checks

    from sparvar_kernels import Policy, ScaleSchedule
    from sparvar_tune import adapters

    policy = Policy(("AA",) * DEPTH, (), tuple(steps(ScaleSchedule(tuple(tiny.grids())))))
    adapters.apply(tiny.model, checks.attention_of(tiny, policy)[0])
    return tiny


def plain(checkout: str):
    return build(checkout)


def main() -> None:
    from safetensors.torch import load_file, save_file

    if sys.argv[1] == "draw":
        way, checkout, file = sys.argv[2:]
        tiny = globals()[way](checkout)
        import adapter_checks as checks

        drawn = checks.draw(tiny)
        tensors = {"picture": drawn.pictures, **{f"logits {i}": t for i, t in enumerate(drawn.logits)}}
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
        return
    peer, own, theirs = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for way, checkout in ((f"{peer}_public", theirs), (f"{peer}_own", own), ("plain", own)):
            file = str(Path(folder) / f"{way}.safetensors")
            subprocess.run([sys.executable, __file__, "draw", way, checkout, file], check=True)
            found[way] = load_file(file)
    public, ours, untouched = found.values()
    equal = public.keys() == ours.keys() and all(bool((public[name] == ours[name]).all()) for name in public)
    changed = not bool((public["picture"] == untouched["picture"]).all())
    print(json.dumps({"peer": peer, "check": "picture and logits = its public code's, bit for bit", "scales": len(ours) - 1,
                      "holds": equal and changed}))  # fmt: skip


if __name__ == "__main__":
    main()
