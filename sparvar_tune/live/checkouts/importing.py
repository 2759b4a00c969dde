"""Importing from a checkout: its folder first on the path, what it prints kept quiet, and what it imports and never calls
stood in for where it is not installed. Afterwards nothing of that is left but the checkout's own modules."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import io
import sys
import types
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparvar_tune.adapters.cross_attention import flash_attn_stand_in

Names = Mapping[str, Mapping[str, Any]]  # module -> what it is to have


@contextlib.contextmanager
def checkout(source: Path, package: str, device: str, unused: Names | None = None) -> Iterator[None]:
    """While it lasts `package` is imported from `source`. Raises ValueError where another one is loaded, or something is missing.

    unused: modules that the code imports and drawing never calls, with the names it takes from them.
    """
    loaded = sys.modules.get(package)
    if loaded is not None and not str(getattr(loaded, "__file__", None) or "").startswith(str(source)):
        raise ValueError(f"--source {source}: a module {package} of another place is loaded; use a process of its own")
    sys.path.insert(0, str(source))
    try:
        with flash_attn_stand_in(), stand_ins(unused or {}), quietly(compiling=device != "cpu"):
            yield
    except ImportError as error:
        todo = f"pip install {error.name.split('.')[0]}" if error.name else "see its requirements"
        raise ValueError(f"--source {source}: {' '.join(str(error).split())}; {todo}") from error
    finally:
        sys.path.remove(str(source))


@contextlib.contextmanager
def stand_ins(names: Names) -> Iterator[None]:
    """While it lasts the modules that cannot be imported are there, with the given names; afterwards they are gone."""
    put: list[str] = []
    try:
        for name, has in names.items():
            try:
                importlib.import_module(name)
            except Exception:  # a torchvision of another build raises RuntimeError
                root = name.split(".")[0]
                if root not in put:
                    for loaded in [m for m in sys.modules if m.split(".")[0] == root]:
                        del sys.modules[loaded]
                for made in dict.fromkeys((root, name)):
                    if made not in put:
                        put.append(made)
                        sys.modules[made] = module_of(made)
                vars(sys.modules[name]).update(has)
                parent, _, child = name.rpartition(".")
                if parent in put:
                    setattr(sys.modules[parent], child, sys.modules[name])
        yield
    finally:
        for name in put:
            sys.modules.pop(name, None)


def module_of(name: str, **names: Any) -> types.ModuleType:
    """An empty package of that name with these names in it."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(names)
    return module


@contextlib.contextmanager
def quietly(compiling: bool = True) -> Iterator[None]:
    """Nothing is printed, no deprecation of theirs said; without `compiling` torch.compile leaves functions as they are, as a CPU
    wants it."""
    real = torch.compile
    if not compiling:
        torch.compile = lambda f=None, **kw: (lambda g: g) if f is None else f  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        torch.compile = real


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """While it lasts linear layers are made without numbers: billions of them take a CPU minutes. `fill` makes them."""
    own = torch.nn.Linear.reset_parameters
    torch.nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Linear.reset_parameters = own  # type: ignore[method-assign]


def fill(model: torch.nn.Module) -> None:
    """Random numbers for every linear layer, made where it is, in torch's own range."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()


def noise_of(prompt: str, *shape: int) -> torch.Tensor:
    """What stands for a prompt's text where there is no text encoder: normal numbers that depend on it alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))


def need(folder: Path, *names: str) -> Path:
    """The first of `names` that is in the folder of weights; raises ValueError naming them."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"--weights {folder}: has no {' or '.join(names)}")
