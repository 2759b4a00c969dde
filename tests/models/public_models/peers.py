"""Generation steps against the public code they come from: the same tiny Infinity or HART at 1024x1024, drawn by both.

    python tests/models/public_models/peers.py scalekv INFINITY_CHECKOUT SCALEKV_CHECKOUT
    python tests/models/public_models/peers.py fastvar INFINITY_CHECKOUT FASTVAR_CHECKOUT
    python tests/models/public_models/peers.py fastvar_hart HART_CHECKOUT FASTVAR_CHECKOUT

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
PATH = [str(HERE.parent), str(HERE.parents[1] / "shared" / "lookalike_models")]
DEPTH, PIXELS = 6, "1M"
HART_DEPTH, HART_SIDES = 4, (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
STOOD_IN: set[str] = set()


def build(checkout: str):
    sys.path[:0] = PATH
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
    sys.path[:0] = PATH
    from public_models.stand_ins import put_module

    for name in ("cv2", "matplotlib", "matplotlib.pyplot", "torchvision", "torchvision.transforms"):  # imported, never called
        if importlib.util.find_spec(name.split(".")[0]) is None or name.split(".")[0] in STOOD_IN:
            STOOD_IN.add(name.split(".")[0])
            put_module(name, pyplot=None, transforms=None)
    return build(str(Path(checkout) / "Infinity"))


def fastvar_own(checkout: str):
    from sparvar_tune.generation import PruneTokens, SkipScales

    return with_steps(
        checkout, lambda schedule: [SkipScales.last(schedule, 2), PruneTokens.published("infinity", schedule, DEPTH)]
    )


def fastvar_hart_public(checkout: str):
    return build_hart(str(Path(checkout) / "HART"))


def fastvar_hart_own(checkout: str):
    from sparvar_tune.generation import PruneTokens

    return with_steps(checkout, lambda schedule: [PruneTokens.published("hart", schedule, HART_DEPTH)], build_hart)


def build_hart(checkout: str):
    """In bf16: their code runs with flash-attn's layout alone."""
    sys.path[:0] = PATH
    from public_models import tiny_hart

    tiny_hart.SIDES = HART_SIDES
    return tiny_hart.Tiny(checkout, "bf16", flash=True)


def with_steps(checkout: str, steps, build=build):
    tiny = build(checkout)
    import adapter_checks as checks

    from sparvar_kernels import Policy, ScaleSchedule
    from sparvar_tune import adapters

    schedule = adapters.recognise(tiny.model)[1].schedule or ScaleSchedule(tuple(tiny.grids()))
    policy = Policy(("AA",) * len(tiny.blocks), (), tuple(steps(schedule)))
    adapters.apply(tiny.model, checks.attention_of(tiny, policy)[0])
    return tiny


def plain(checkout: str):
    return build(checkout)


def plain_hart(checkout: str):
    return build_hart(checkout)


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
        untouched = "plain_hart" if peer == "fastvar_hart" else "plain"
        for way, checkout in ((f"{peer}_public", theirs), (f"{peer}_own", own), (untouched, own)):
            file = str(Path(folder) / f"{way}.safetensors")
            subprocess.run([sys.executable, __file__, "draw", way, checkout, file], check=True)
            found[way] = load_file(file)
    public, ours, untouched = found.values()
    equal = public.keys() == ours.keys() and all(bool((public[name] == ours[name]).all()) for name in public)
    changed = not bool((public["picture"] == untouched["picture"]).all())
    dtype = "bf16" if peer == "fastvar_hart" else "fp32"
    check = "picture and logits = its public code's, bit for bit"
    print(json.dumps({"options": peer, "dtype": dtype, "check": check, "scales": len(ours) - 1, "holds": equal and changed}))


if __name__ == "__main__":
    main()
