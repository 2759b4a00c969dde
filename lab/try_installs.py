"""The wheel in clean environments: what a user's `pip install sparvar-tune` gives with every Python.

    python -m lab.try_installs --out reports/installs.md 3.10 3.11 3.12 3.13 3.14

Builds the wheel from the sdist, as pip would. A Python that is on this machine (`python3.12` on the PATH, or pyenv's) gets a
virtual environment, the wheel with everything it needs, and the commands a newcomer types; for one that is not, pip says
whether all wheels exist for it. Needs hatchling and an index of packages; every environment is removed again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "--version", "doctor --json", "show --gpus --json", "explain --gpu cpu --model pocketvar --json", "check --gpu cpu --json"
)  # fmt: skip
TOLD = ("torch", "numpy", "pandas", "optuna")
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Tried:
    """One Python. how: "installed" or "resolved". versions: of what matters; failed: the step that did not end well."""

    python: str
    how: str
    versions: Mapping[str, str]
    failed: str | None


def run(words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Outside of the checkout, so that nothing of it can be imported by chance."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | dict(environment or {})
    return subprocess.run(words, capture_output=True, text=True, cwd=tempfile.gettempdir(), env=env, timeout=TIMEOUT_S)


def build(folder: Path) -> tuple[Path, Path]:
    """(sdist, wheel made of that sdist)."""

    def hatch(target: str, tree: Path) -> None:
        words = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(words, cwd=tree, check=True, capture_output=True)

    hatch("sdist", ROOT)
    sdist = next(folder.glob("*.tar.gz"))
    shutil.unpack_archive(sdist, folder / "unpacked")
    hatch("wheel", next((folder / "unpacked").iterdir()))
    return sdist, next(folder.glob("*.whl"))


def interpreter(version: str) -> str | None:
    """A Python of this version, "3.12", or None."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    places = [shutil.which(f"python{version}"), *map(str, pyenv)]
    for place in filter(None, places):
        done = run([place, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"])
        if done.returncode == 0 and done.stdout.strip() == version:
            return place
    return None


def try_install(python: str, version: str, wheel: Path) -> Tried:
    with tempfile.TemporaryDirectory() as place:
        home, env = Path(place) / "home", Path(place) / "env"
        steps: dict[str, list[str | Path]] = {
            "venv": [python, "-m", "venv", env],
            "pip install": [env / "bin" / "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wheel],
        }
        for step, words in steps.items():
            done = run(words)
            if done.returncode:
                return Tried(version, "installed", {}, f"{step}: {' '.join(done.stderr.split())[-300:]}")
        listed = json.loads(run([env / "bin" / "pip", "list", "--format", "json"]).stdout)
        found = {p["name"]: p["version"] for p in listed if p["name"] in TOLD}
        for command in COMMANDS:
            done = run([env / "bin" / "sparvar-tune", *command.split()], {"SPARVAR_TUNE_HOME": str(home)})
            if done.returncode or (command.endswith("--json") and json.loads(done.stdout)["exit_code"]):
                return Tried(version, "installed", found, f"{command}: {' '.join((done.stdout + done.stderr).split())[-300:]}")
        return Tried(version, "installed", found, None)


def try_resolve(version: str, wheel: Path) -> Tried:
    """Whether every package has a wheel for that Python on this kind of machine."""
    with tempfile.TemporaryDirectory() as target:
        words: list[str | Path] = [
            sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary", ":all:",
            "--target", target, "--python-version", version, "--report", "-", "-c", ROOT / "constraints.txt", wheel,
        ]  # fmt: skip
        done = run(words)
    if done.returncode:
        return Tried(version, "resolved", {}, " ".join(done.stderr.split())[-300:])
    found = {p["metadata"]["name"].lower(): p["metadata"]["version"] for p in json.loads(done.stdout)["install"]}
    return Tried(version, "resolved", {name: found[name] for name in TOLD}, None)


def table(tried: Sequence[Tried], wheel: Path, sdist: Path) -> str:
    mib = {path: f"{path.stat().st_size / 2**20:.1f} MiB" for path in (wheel, sdist)}
    rows = [(t.python, t.how, *(t.versions.get(name, "-") for name in TOLD), t.failed or "nothing") for t in tried]
    lines = [
        "# The wheel in clean environments",
        "",
        f"{datetime.date.today().isoformat()}, {platform.system()} {platform.machine()}, no GPU. The wheel ({mib[wheel]}) was "
        f"built from the sdist ({mib[sdist]}).",
        "",
        "- installed: a new virtual environment, `pip install -c constraints.txt` of the wheel, then "
        f"{', '.join(f'`{command}`' for command in COMMANDS)}.",
        "- resolved: that Python is not on this machine; pip finds a wheel of every package for it.",
        "",
        f"| Python | how | {' | '.join(TOLD)} | failed |",
        "|---" * (len(TOLD) + 3) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="PYTHON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sdist, wheel = build(Path(place))
        tried = []
        for version in options.versions:
            python = interpreter(version)
            tried.append(try_install(python, version, wheel) if python else try_resolve(version, wheel))
            print(tried[-1], flush=True)
        text = table(tried, wheel, sdist)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 1 if any(t.failed for t in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
