"""What is published: the sdist, the wheel that is built from it, their contents and metadata."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from lab.try_installs import ROOT, build
from sparvar_tune import __version__

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    _, wheel = build(folder)
    tree = next((folder / "unpacked").iterdir())
    with zipfile.ZipFile(wheel) as file:
        assert file.testzip() is None
        file.extractall(folder / "installed")
    return tree, folder / "installed"


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_the_sdist_holds_what_builds_the_wheel_and_no_more(built):
    tree, _ = built
    tops = {PurePosixPath(name).parts[0] for name in files(tree)}
    assert tops == {"sparvar_tune", "kernels", "profiles", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}


def test_the_wheel_holds_the_packages_the_profiles_and_no_more(built):
    _, installed = built
    own = {"sparvar_tune": ROOT / "sparvar_tune", "sparvar_kernels": ROOT / "kernels" / "sparvar_kernels",
           "sparvar_tune/_profiles": ROOT / "profiles"}  # fmt: skip
    want = {f"{place}/{name}" for place, folder in own.items() for name in files(folder) if "__pycache__" not in name}
    assert {name for name in files(installed) if ".dist-info/" not in name} == want
    assert {"sparvar_tune/py.typed", "sparvar_kernels/py.typed", "sparvar_tune/pocketvar/pocketvar.safetensors"} <= want


def test_metadata(built):
    _, installed = built
    info = installed / f"sparvar_tune-{__version__}.dist-info"
    told = email.message_from_string((info / "METADATA").read_text())
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("sparvar-tune", __version__, "Apache-2.0")
    assert told["Requires-Python"] == ">=3.10" and "# sparvar-tune" in told.get_payload()
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "sparvar-tune = sparvar_tune.cli:main" in (info / "entry_points.txt").read_text()
    needed = [r for r in told.get_all("Requires-Dist") if "extra ==" not in r]
    assert any(r.startswith("torch") for r in needed) and not any(r.startswith(("triton", "pytest")) for r in needed)


def test_emojivars_weights_are_a_wheel_of_their_own(built, tmp_path):
    """It holds them, what is measured of them and their card; beside the wheel without them they are found."""
    _, installed = built
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(words, cwd=ROOT / "weights" / "emojivar", check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "weights")
    names = {name for name in files(tmp_path / "weights") if ".dist-info/" not in name}
    inside = ("__init__.py", "MODEL_CARD.md", "emojivar.safetensors", "yardsticks.json")
    assert names == {f"sparvar_tune_emojivar/{name}" for name in inside} and wheel.stat().st_size <= 20 * 2**20
    told = email.message_from_string(next((tmp_path / "weights").glob("*.dist-info/METADATA")).read_text("utf-8"))
    assert (told["Name"], told["License-Expression"]) == ("sparvar-tune-emojivar", "CC-BY-4.0")
    main = email.message_from_string((installed / f"sparvar_tune-{__version__}.dist-info" / "METADATA").read_text())
    assert "sparvar-tune-emojivar; extra == 'emojivar'" in main.get_all("Requires-Dist")
    code = "from sparvar_tune.emojivar.installed import place; print(place('emojivar.safetensors'))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(tmp_path / "weights")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "weights" / "sparvar_tune_emojivar" / "emojivar.safetensors"


def test_an_installed_wheel_finds_its_profiles(built, tmp_path):
    """Unpacked beside torch, with nothing of the checkout in reach."""
    _, installed = built
    env = {**os.environ, "PYTHONPATH": str(installed), "SPARVAR_TUNE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "sparvar_tune", "explain", "--gpu", "cpu", "--model", "pocketvar", "--json"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["profile"]) == installed / "sparvar_tune" / "_profiles" / "cpu" / "pocketvar.json"
