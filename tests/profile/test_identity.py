"""What makes a profile stale: only another meaning. Words change nothing; another Triton or source keeps every row."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from examples import example
from places import ROOT

import sparvar_kernels
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.registry import KERNELS
from sparvar_kernels.variants import VARIANTS
from sparvar_tune.catalog.gpus import GPUS, find_gpu
from sparvar_tune.catalog.models import MODELS
from sparvar_tune.profile import identity, schema, store
from sparvar_tune.runtime.load import prepare

SHIPPED = sorted((ROOT / "profiles").glob("*/*.json"))


def state(path: Path) -> set[int]:
    """Scales of a shipped profile that run dense on its own silicon."""
    profile = store.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return set(prepare(profile, path, GPUS[profile.silicon.gpu], [], "").demoted)


def demoted_by_meaning(profile: schema.Profile) -> set[int]:
    return set(identity.refused(profile))


@pytest.mark.parametrize("slug", ["cpu", "h200"])
def test_the_source_is_all_that_runs_there_without_its_words(tmp_path, monkeypatch, slug):
    package, gpu = Path(sparvar_kernels.__file__).parent, find_gpu(slug)
    shutil.copytree(package, tmp_path / "package")
    before = identity.kernel_hash(gpu)
    monkeypatch.setattr(sparvar_kernels, "__file__", str(tmp_path / "package" / "__init__.py"))
    assert identity.kernel_hash(gpu) == before and len(before) == 64
    unseen, now = set(), before
    for path in sorted((tmp_path / "package").rglob("*.py")):
        path.write_text(path.read_text() + "\n# words\n")
        assert identity.kernel_hash(gpu) == now, path
        path.write_text(path.read_text() + "\nTOUCHED = 1\n")
        was, now = now, identity.kernel_hash(gpu)
        if now == was:
            unseen.add(path.relative_to(tmp_path / "package").as_posix())
    other = {"cpu": "triton", "h200": "cpu"}[slug]
    unlike = ("path/", f"backends/{other}/")
    assert all(name.startswith(unlike) or name.endswith("oracle.py") for name in unseen)
    assert all(any(name.startswith(folder) for name in unseen) for folder in unlike) and "oracle.py" in unseen


def test_rewording_an_error_changes_no_profiles_state(tmp_path, monkeypatch):
    """The source does change: it is where a measurement came from, and nothing is refused for it."""
    package = tmp_path / "package"
    shutil.copytree(Path(sparvar_kernels.__file__).parent, package)
    before = {slug: identity.kernel_hash(find_gpu(slug)) for slug in ("cpu", "h100-sxm")}
    states = {path: state(path) for path in SHIPPED}
    reworded = 0
    for path in package.rglob("*.py"):
        text = path.read_text()
        other = re.sub(r"(raise ValueError\(f?\")", r"\1reworded: ", text)
        reworded += other != text
        path.write_text(other)
    monkeypatch.setattr(sparvar_kernels, "__file__", str(package / "__init__.py"))
    assert reworded > 3 and all(identity.kernel_hash(find_gpu(slug)) != was for slug, was in before.items())
    assert {path: state(path) for path in SHIPPED} == states


@pytest.mark.parametrize("name", ["csla", "cs4a", "pooled", "reuse", "cpu", "triton"])
def test_another_meaning_refuses_the_scales_that_use_it(name, monkeypatch):
    thing = VARIANTS.get(name) or KERNELS[name]
    if name in VARIANTS:
        monkeypatch.setattr(thing, "meaning", thing.meaning + 1)
    else:
        monkeypatch.setitem(KERNELS, name, dataclasses.replace(thing, meaning=thing.meaning + 1))
    seen = 0
    for path in SHIPPED:
        profile = store.load(path)
        uses = {r.scale_index for r in profile.policy.rules if r.variant.kind == name}
        uses |= {row.scale_index for row in profile.rows if row.kernel == name}
        assert uses <= demoted_by_meaning(profile), path
        seen += bool(uses)
    assert seen or name in ("reuse",)


@pytest.mark.filterwarnings("ignore:.*(unverified|predicted)")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_profiles_are_sound_and_run_sparse(path):
    profile = store.load(path)
    assert profile.silicon.gpu == path.parent.name and path.parent.name in GPUS
    model = MODELS[profile.workload.model]
    assert profile.workload.schedule == model.schedule(profile.workload.resolution, profile.workload.aspect)
    assert schema.to_json(profile) == path.read_text()
    assert not identity.refused(profile), "a meaning changed: tune this profile again, or re-time it on its silicon"


def test_a_file_of_schema_2_still_loads():
    """With the first meanings, no binaries, and evidence as old as the file."""
    data = json.loads(schema.to_json(example()))
    for name in ("meaning", "checksum"):
        del data[name]
    for row in data["rows"]:
        del row["binary"]
    for name in ("measured", "weights_sha256", "meaning"):
        del data["evidence"][name]
    data["schema"] = 2
    named = data["evidence"].pop("metrics")
    (mean, lower, required), (similar, bound, wanted) = (
        [named[name][part] for part in ("mean", "bound", "required")] for name in ("psnr", "ssim")
    )
    data["evidence"] |= {
        "psnr_mean_db": mean, "psnr_lower_db": lower, "required_psnr_db": required, "ssim_mean": similar,
        "ssim_lower": bound, "required_ssim": wanted, "ms_ssim_mean": named["ms_ssim"]["mean"],
    }  # fmt: skip
    from sparvar_tune.profile.reader import sealed_text

    made = schema.from_json(sealed_text(data), "f")
    assert made.schema == schema.SCHEMA and set(dict(made.meaning).values()) == {1}
    assert {name for name, _ in made.meaning} == {"cpu", "cs4a", "csla", "pooled", "reuse"}
    assert made.evidence is not None and made.evidence.measured == made.created
    assert made.evidence.of("psnr") == example().evidence.of("psnr")
    assert made.evidence.of("ms_ssim") == schema.Measured(0.99, None, None)
    assert made.evidence.weights_sha256 == made.workload.weights_sha256 and all(row.binary is None for row in made.rows)
    assert schema.from_json(schema.to_json(made), "f") == made


@pytest.mark.slow
def test_the_binary_follows_the_code_and_not_its_words():
    """One small launch, compiled without a GPU: another constant is other machine code, the same launch the same."""
    pytest.importorskip("triton")
    from sparvar_kernels import AttentionProblem, Csla, Policy, ScaleSchedule, Tile
    from sparvar_tune.launch_search.compiling import compile_all, compilers, machine_code, row_binaries

    schedule = ScaleSchedule(((1, 1), (4, 4), (8, 8)))
    policy = Policy.uniform(1, 1, {2: Csla((0, 1, 3), 1, Tile(4, 4))})
    problems = {s: AttentionProblem(schedule, s, 1, 1, 64, "bf16") for s in range(3)}
    configs = {"one": TritonConfig(16, 32, 4, 1), "other": TritonConfig(16, 32, 4, 2)}
    wanted = {name: row_binaries(policy, problems, [0], 2, c, (9, 0)) for name, c in configs.items()}
    with compilers(1) as pool:
        made = compile_all([b for group in wanted.values() for b in group], pool, lambda text: None)
        again = compile_all(wanted["one"], pool, lambda text: None)
    codes = {name: machine_code(made, group, "3.9") for name, group in wanted.items()}
    assert codes["one"] and codes["one"] == machine_code(again, wanted["one"], "3.9")
    assert codes["one"].code != codes["other"].code and codes["one"].target == "sm_90"
