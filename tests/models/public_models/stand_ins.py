"""What the public code imports that a CPU or this environment has not, put in place from outside while it is imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import io
import sys
import types

import torch

# names that Infinity's modules import at the top and tiny models never call
UNUSED = {
    "timm.models": {"register_model": lambda f: f},
    "timm.models.layers": {"DropPath": torch.nn.Identity, "drop_path": None},
    "timm.loss": {"SoftTargetCrossEntropy": torch.nn.Identity},
    "pytz": {"timezone": lambda name: None},
    "tqdm": {"tqdm": None},
}


def put_module(name: str, **names: object) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(names)
    sys.modules[name] = module


def put_missing() -> None:
    for name, names in UNUSED.items():
        root = name.split(".")[0]
        try:
            importlib.import_module(name)
        except Exception:  # a torchvision of another build raises RuntimeError
            if not getattr(sys.modules.get(root), "ours", False):
                for loaded in [m for m in sys.modules if m.split(".")[0] == root]:
                    del sys.modules[loaded]
                put_module(root, ours=True)
            put_module(name, ours=True, **names)


@contextlib.contextmanager
def quietly():
    """No prints of constructors, no compiling of the fused norms."""
    real = torch.compile
    torch.compile = lambda f=None, **kw: (lambda g: g) if f is None else f
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.compile = real


def autocast(dtype: str):
    return contextlib.nullcontext() if dtype == "fp32" else torch.autocast("cpu", dtype=torch.bfloat16)
