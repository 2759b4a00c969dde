"""Structure: imports point one way, the runtime stays light, the shipped profiles are sound and current."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sparvar_tune import profiles, schema
from sparvar_tune.gpus import GPUS
from sparvar_tune.models import MODELS

ROOT = Path(__file__).parent.parent
# Every module may import only modules of lines above its own (or its own line, where that is one package).
LAYERS = [
    {"scales"}, {"problem", "variants", "lists"}, {"configs"}, {"registry", "csla"}, {"cs4a", "dense", "residual", "reference"},
    {"pooled", "policy", "work"}, {"binary"}, {"gathered_cpu", "gathered_triton", "gathered_gluon"}, {"selecting_triton"},
    {"layer_cpu", "layer_triton"}, {"attention"}, {"sparvar_kernels"},
    {"names"}, {"gpus", "models"}, {"json_reader"}, {"schema"}, {"profiles", "runs"}, {"misses", "overlay"},
    {"worker"}, {"workers", "machine", "measure", "fidelity", "lpips", "pairs", "capture", "policies"},
    {"bench", "costmodel", "peers"}, {"compiling"}, {"timer"}, {"measurements"},
    {"sheet"}, {"tokenizer", "photos"}, {"model"}, {"train"}, {"adapters"}, {"adapters.pocketvar"}, {"yardsticks"},
    {"sensitivity", "runtime", "schedule", "recorded"}, {"predict", "timed", "kernel_bench"}, {"costfit"},
    {"storage"}, {"search"}, {"replay"}, {"judge"}, {"certify"}, {"tune", "report", "verifying"}, {"transfer"},
    {"console"}, {"tuning"}, {"commands"}, {"cli"},
]  # fmt: skip
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    if path.name == "__init__.py":
        return path.parent.name
    return f"adapters.{path.stem}" if path.parent.name == "adapters" else path.stem


def sources() -> list[Path]:
    found = [*ROOT.glob("kernels/sparvar_kernels/*.py"), *ROOT.glob("sparvar_tune/**/*.py")]
    return [p for p in found if module_name(p) not in ("sparvar_tune", "__main__", "pocketvar") or p.parent.name == "adapters"]


def imported(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("sparvar_kernels", "sparvar_tune"):
            tail = node.module.split(".")[1:]
            if "adapters" in tail:
                out.add(".".join(tail[tail.index("adapters") :]))
            elif tail and tail != ["pocketvar"]:
                out.add(tail[-1])
            else:
                names = [a.name for a in node.names]
                out |= {n for n in names if n in RANK} or ({"sparvar_kernels"} if node.module == "sparvar_kernels" else set())
    return out


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_one_way(path):
    own = module_name(path)
    assert own in RANK, f"{own}: give the new module its place in LAYERS"
    for other in imported(path):
        assert other in RANK and RANK[other] < RANK[own], f"{own} imports {other}, which is not below it"


def test_few_import_optuna():
    users = [module_name(p) for p in sources() if "import optuna" in p.read_text() or "from optuna" in p.read_text()]
    assert sorted(users) == ["replay", "search", "storage"]


def test_runtime_is_light():
    code = (
        "import sys, sparvar_tune.runtime; print([m for m in ('optuna', 'pandas', 'triton', 'torchmetrics') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=_env())
    assert done.stdout.strip() == "[]"


def test_help_needs_no_torch():
    code = "import sys, sparvar_tune.cli; sparvar_tune.cli.build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=_env())
    assert done.stdout.strip() == "False"


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


SHIPPED = sorted((ROOT / "profiles").glob("*/*.json"))


def test_profiles_are_shipped():
    assert {p.relative_to(ROOT / "profiles").as_posix() for p in SHIPPED} >= {
        "cpu/pocketvar.json", "cpu/pocketvar--paper.json", "a100-80/hart.json"
    }  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_profiles_are_sound_and_current(path):
    profile = profiles.load(path)
    assert profile.silicon.gpu == path.parent.name and path.parent.name in GPUS
    model = MODELS[profile.workload.model]
    assert profile.workload.schedule == model.schedule(profile.workload.resolution, profile.workload.aspect)
    assert schema.to_json(profile) == path.read_text()
    assert profile.kernel_hash == profiles.kernel_hash(GPUS[profile.silicon.gpu]), "the kernels changed: tune this profile again"


def test_a_machine_without_triton_predicts_and_searches():
    """The default install on a CPU: the front door's words must not need a GPU's compiler."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from sparvar_tune import tune, transfer\n"
        "from sparvar_tune.cli import main\n"
        "sys.exit(main(['--gpu', 'a100', '--model', 'hart', '--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "predicted" in done.stdout
