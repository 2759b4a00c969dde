"""Structure: imports point one way, the runtime stays light, the shipped profiles are sound and current."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

# A room may import itself and rooms before it; a face (`__init__`) speaks for its room.
ROOMS = (
    "sparvar_kernels.geometry", "sparvar_kernels.variants", "sparvar_kernels.policy", "sparvar_kernels.backends",
    "sparvar_kernels.path",
    "sparvar_kernels.oracle", "sparvar_kernels.attention", "sparvar_kernels", "sparvar_tune.catalog", "sparvar_tune.generation",
    "sparvar_tune.bitwise", "sparvar_tune.pocketvar", "sparvar_tune.emojivar", "sparvar_tune.profile", "sparvar_tune.measure",
    "sparvar_tune.adapters", "sparvar_tune.fused", "sparvar_tune.live", "sparvar_tune.runtime", "sparvar_tune.policy_search",
    "sparvar_tune.launch_search", "sparvar_tune.tracing", "sparvar_tune.monitoring", "sparvar_tune.regression",
    "sparvar_tune.ways", "sparvar_tune.report", "sparvar_tune", "sparvar_tune.cli", "sparvar_tune.__main__", "lab",
)  # fmt: skip
SOURCES = [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("sparvar_tune/**/*.py"), *ROOT.glob("lab/**/*.py")]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__")


def rank(module: str) -> int:
    """Place in ROOMS of the room a module or a name in it belongs to."""
    return ROOMS.index(max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_one_way(path):
    for node in ast.walk(ast.parse(path.read_text())):
        for name in (f"{node.module}.{a.name}" for a in node.names) if isinstance(node, ast.ImportFrom) else ():
            if name.split(".")[0] in ("sparvar_kernels", "sparvar_tune", "lab"):
                assert rank(name) <= rank(module_of(path)), f"{module_of(path)} imports {name}, whose room comes after its own"


# Names that say the same of several things: a family's, a backend's or a model's own kind of it.
EACH_HAS_ONE = {"Block", "Layer", "Generation", "Decoder", "Encoder", "TeacherForcing"}


def test_a_class_name_has_one_meaning():
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module_of(path))
    assert {name: where for name, where in found.items() if len(where) > 1 and name not in EACH_HAS_ONE} == {}


def test_few_import_optuna():
    users = [module_of(p) for p in SOURCES if "import optuna" in p.read_text() or "from optuna" in p.read_text()]
    assert sorted(users) == ["lab.sampler_study", "sparvar_tune.policy_search.storage", "sparvar_tune.policy_search.study"]


@pytest.mark.slow
def test_runtime_is_light():
    heavy = {"optuna", "pandas", "triton", "torchmetrics", "nvtx", "prometheus_client", "opentelemetry"}
    off = {"sparvar_tune.tracing", "sparvar_tune.monitoring"}  # what is off is not even imported
    code = f"import sys, sparvar_tune.runtime; print(sorted({heavy | off} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=_env())
    assert done.stdout.strip() == "[]"


def test_help_needs_no_torch():
    code = "import sys, sparvar_tune.cli.parser; sparvar_tune.cli.parser.build_parser(); print('torch' in sys.modules)"
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


@pytest.mark.slow
def test_a_machine_without_triton_predicts_and_searches():
    """The default install on a CPU: the front door's words must not need a GPU's compiler."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from sparvar_tune.ways import search_here, take_over\n"
        "from sparvar_tune.cli.parser import main\n"
        "sys.exit(main(['--gpu', 'a100', '--model', 'hart', '--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "predicted" in done.stdout
