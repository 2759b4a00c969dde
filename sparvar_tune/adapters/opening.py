"""Opening a model that somebody names: a function of a file of theirs, or one an installed package offers.

    --model my_model.py:open_model      open_model(device) -> an Adapter
    --model theirs                      the entry point `theirs` of the group sparvar_tune.models

Only what a user types names a file; no profile does.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from sparvar_tune.adapters.protocol import Adapter, why_not_adapter
from sparvar_tune.catalog.names import words_of

GROUP = "sparvar_tune.models"
_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*)")


def is_file(name: str) -> bool:
    """Whether a model's name is that of a file and a function in it."""
    return _FILE.fullmatch(name) is not None


def entry_point(name: str) -> EntryPoint | None:
    """The installed package's model of that name, or None."""
    return next(iter(entry_points(group=GROUP, name=name)), None)


def open_own(name: str, device: str) -> Adapter:
    """The adapter that the function behind `name` returns, its attributes checked. Raises ValueError, in one line."""
    adapter = make(name, device)
    reason = why_not_adapter(adapter)
    if reason:
        raise ValueError(f"{name}: {reason} (sparvar-tune check-adapter {name} tries every promise)")
    return adapter


def make(name: str, device: str) -> Any:
    """What the function behind `name` returns, unchecked. Raises ValueError, in one line, where there is none or it raises."""
    return call(name, lambda: _function(name)(device))


def call(name: str, work: Callable[[], Any]) -> Any:
    """What `work`, code of the user's, returns; raises ValueError in one line, with the place in their file, if it raises."""
    try:
        return work()
    except Exception as error:
        raise ValueError(f"{name}: {blame(error)}") from error


def blame(error: BaseException) -> str:
    """An exception in one line: its kind, what it says, and the last place outside this package and the installed ones."""
    text = words_of(error, 400) or "no message"
    others = (str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text}{where}"


def _function(name: str) -> Callable[[str], Any]:
    found = _FILE.fullmatch(name)
    if found is None:
        point = entry_point(name)
        if point is None:
            raise ValueError(f"want FILE.py:FUNCTION, or the name of an entry point of {GROUP}")
        made = point.load()
    else:
        path = Path(found["file"]).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"no such file; want FILE.py:FUNCTION ({path})")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # last: a file beside it hides no installed package
        sys.modules.setdefault(path.stem, module)  # its classes can be found again, as dataclasses and pickles do
        spec.loader.exec_module(module)
        made = getattr(module, found["function"], None)
    if not callable(made):
        raise ValueError(f"{found['file'] if found else name} has no function {found['function'] if found else name}")
    return made
