"""Runs an expression over a test module in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from places import PYTHONPATH, TESTS


def in_interpreter(module: str, expression: str) -> Any:
    """The JSON value of `expression`, which may use the module as `t`, in a process started with TRITON_INTERPRET=1."""
    folder = next(TESTS.rglob(f"{module}.py")).parent
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(folder), PYTHONPATH])}
    code = f"import json, interpreted, {module} as t\ninterpreted.hurry()\nprint(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def hold(check: Callable[..., None], cases: Sequence[Mapping[str, Any]], **more: Any) -> int:
    """Runs check(**case, **more) of each; how many there were."""
    for case in cases:
        check(**case, **more)
    return len(cases)


def hold_in_interpreter(module: str) -> int:
    """`hold` of the module's check and CASES, in Triton's interpreter: but those in bf16, of which it cuts bits off."""
    return int(in_interpreter(module, "interpreted.hold(t.check, [case for case in t.CASES if case.get('dtype') is not t.BF16])"))


def hurry() -> None:
    """Leaves out of Triton's interpreter what changes no result."""
    patch_once_a_launch()
    leave_overflow_unasked()


def patch_once_a_launch() -> None:
    """Triton's interpreter replaces the functions of its language at every call of a device function, with the same ones: a third
    of its time. Now at the first call of a launch from each kind of module, for they stay replaced until the launch ends.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    def patch_new(fn: Any) -> Any:
        seen = list(map(id, fn.__globals__.values()))
        kind = id(language) in seen, id(language.core) in seen
        if kind in patched:
            return None  # a device function's: only a launch looks at what it gets
        patched.add(kind)
        return patch(fn)

    def launch_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch_alone


def leave_overflow_unasked() -> None:
    """Triton's interpreter does every sum and product of whole numbers again in 64 bits to ask whether it overflowed, half of its
    time, and drops the answer: an assertion counts in its debug mode alone. A number that wraps around stays as wrong as it was.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
