"""Models opened from a checkout: what is missing is one line, and a checkout leaves nothing behind but its modules.

The checkout is one of ours with VAR's names, over a look-alike. Where the environment names real ones they are opened too.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import lookalikes
import pytest
import torch

from sparvar_tune.catalog import models
from sparvar_tune.catalog.models import MODELS, ScaleSchedule
from sparvar_tune.cli import parser
from sparvar_tune.live.checkouts import Place, prompts_of
from sparvar_tune.live.checkouts.importing import checkout, stand_ins
from sparvar_tune.ways.subject import Subject, place_of

FAKE = """
import lookalikes, torch
from huggingface_hub import PyTorchModelHubMixin

class Coder(torch.nn.Module):
    Cvae = 3
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(2, 2)

class Var(lookalikes.VarLike, PyTorchModelHubMixin):
    def init_weights(self, **given):
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.3)

def build_vae_var(device, patch_nums, num_classes, depth, shared_aln):
    torch.nn.Linear.reset_parameters = lambda self: None
    print("its constructors speak")
    return Coder().to(device), Var(layers=depth).to(device)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkout with VAR's names; the table's row is of the look-alike's size."""
    (tmp_path / "code" / "models").mkdir(parents=True)
    (tmp_path / "code" / "models" / "var.py").write_text(FAKE)
    (tmp_path / "code" / "models" / "__init__.py").write_text("from .var import build_vae_var\n")
    sizes = {"256": {"1.000": ScaleSchedule.square(lookalikes.SIDES)}}
    row = dataclasses.replace(MODELS["var-d16"], layers=4, heads=2, head_dim=16, width=32, resolutions=sizes)
    monkeypatch.setattr(models, "MODELS", {**MODELS, "var-d16": row})
    yield tmp_path / "code"
    for name in [m for m in sys.modules if m.split(".")[0] == "models"]:
        del sys.modules[name]


def test_random_weights_are_opened_under_a_name_of_their_own(home, source, capsys):
    before, path, rng = torch.nn.Linear.reset_parameters, list(sys.path), torch.get_rng_state()
    subject = Subject.of("var-d16", "cpu", place=place_of(source, "random", None))
    assert (subject.model.slug, subject.resolution, subject.file_name()) == ("var-d16-random", "8x8", "var-d16-random.json")
    adapter = subject.adapter
    assert torch.nn.Linear.reset_parameters is before and sys.path == path and "huggingface_hub" not in sys.modules
    assert torch.equal(torch.get_rng_state(), rng) and capsys.readouterr().out == ""
    assert adapter.model == subject.model and adapter.num_classes == 1000 and adapter.model.dtype == "fp16"
    again = Subject.of("var-d16", "cpu", place=place_of(source, "random", None)).adapter
    assert again.weights_sha256 == adapter.weights_sha256
    words = ["--gpu", "cpu", "--model", "var-d16", "--source", str(source), "--weights", "random", "--min-psnr", "9", "--dry-run"]
    assert parser.main(words) == 0
    assert "tuning var-d16-random on cpu" in capsys.readouterr().out


def test_a_folder_of_weights_is_loaded_into_the_tables_model(home, source, tmp_path):
    (tmp_path / "prompts.txt").write_text("7\n\n 12 \n7\n")
    sys.path.insert(0, str(source))
    with stand_ins({"huggingface_hub": {"PyTorchModelHubMixin": type("Mixin", (), {})}}):
        from models import build_vae_var
    sys.path.remove(str(source))
    before = torch.nn.Linear.reset_parameters
    coder, model = build_vae_var("cpu", (), 1000, 4, False)
    torch.nn.Linear.reset_parameters = before
    model.init_weights()
    torch.save(coder.state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    place = place_of(source, tmp_path, tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match=r"has no var_d4\.pth"):
        assert Subject.of("var-d16", "cpu", place=place).adapter
    torch.save(model.state_dict(), tmp_path / "var_d4.pth")
    subject = Subject.of("var-d16", "cpu", place=place)
    assert subject.adapter.model.slug == "var-d16" and subject.adapter.classes() == ("7", "12")
    loaded = subject.adapter.parts.model.state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(("words", "said"), [
    (["--source", "nowhere", "--weights", "random"], "no checkout of"), (["--weights", "random"], "want --source CHECKOUT"),
    (["--prompts", "x"], "want --source CHECKOUT"), (["--source", "SOURCE"], "want --weights FOLDER"),
    (["--source", "SOURCE", "--weights", "nowhere"], "no such folder"),
    (["--source", "SOURCE", "--weights", "random", "--prompts", "nowhere"], "nowhere: No such file"),
    (["--source", "SOURCE", "--weights", "random", "--prompts", "WORDS"], "numbers of ImageNet classes"),
    (["--source", "SOURCE", "--weights", "random", "--resolution", "9"], 'resolution "9": unknown'),
    (["--source", "SOURCE", "--weights", "random", "--model", "hart"], "it has no hart/modules"),
    (["--source", "SOURCE", "--weights", "random", "--model", "pocketvar"], "not opened from a checkout"),
])  # fmt: skip
def test_what_is_missing_is_one_line(home, source, tmp_path, capsys, words, said):
    (tmp_path / "words.txt").write_text("a cat\n")
    words = [{"SOURCE": str(source), "WORDS": str(tmp_path / "words.txt")}.get(word, word) for word in words]
    assert parser.main(["--gpu", "cpu", "--model", "var-d16", "--min-psnr", "9", "--dry-run", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_package_that_is_not_installed_is_named(source):
    (source / "models" / "__init__.py").write_text("import not_there_at_all\n")
    with pytest.raises(ValueError, match="pip install not_there_at_all"), checkout(source, "models", "cpu"):
        import models  # noqa: F401
    sys.modules["models"] = type(sys)("models")
    with pytest.raises(ValueError, match="another place"), checkout(source, "models", "cpu"):
        pass


def test_prompts_are_lines_each_once(tmp_path):
    assert prompts_of([" a ", "b", "a", ""]) == ("a", "b")
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    for wrong in (tmp_path / "p", [], ["  "], [3]):
        with pytest.raises(ValueError, match="prompts"):
            prompts_of(wrong)


def test_the_authors_loaders_need_their_gpu(tmp_path):
    from sparvar_tune.live.checkouts import hart, infinity

    place = Place(tmp_path, tmp_path, ("x",))
    with pytest.raises(ValueError, match="--weights random runs on a CPU"):
        infinity.open_live(MODELS["infinity-2b"], ("1M", "1.000"), "cpu", place)
    with pytest.raises(ValueError, match="on a CUDA GPU"):
        hart.open_live(MODELS["hart"], ("1024", "1.000"), "cpu", place)
    assert set(infinity.RELEASES) == {m.slug for m in MODELS.values() if m.family == "infinity"}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "slug"), [("infinity", "infinity-2b"), ("infinity", "infinity-8b"), ("var", "var-d16")])
def test_the_public_code_is_opened(family, slug, monkeypatch):
    """Random weights, four layers, the smallest pictures."""
    checkout = os.environ.get(f"SPARVAR_{family.upper()}_SRC")
    if not checkout:
        pytest.skip(f"SPARVAR_{family.upper()}_SRC names no checkout")
    row = MODELS[slug]
    small = {"default_resolution": "0.06M"} if family == "infinity" else {}
    made = dataclasses.replace(row, layers=4, heads=2, width=2 * row.head_dim, **small)
    monkeypatch.setattr(models, "MODELS", {**MODELS, slug: made})
    adapter = Subject.of(slug, "cpu", place=place_of(Path(checkout), "random", None)).adapter
    picture = adapter.finish(adapter.start((3, 5), 0), adapter.dense)
    assert picture.shape[1] == 3 and float(picture.std()) > 0.01
    assert torch.equal(picture, adapter.untouched((3, 5)))
