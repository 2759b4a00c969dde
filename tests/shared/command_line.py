"""The command line called in this process, and the one line that a refusal is."""

from __future__ import annotations

import pytest

from sparvar_tune.cli import parser


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = parser.main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *words: str, after_work: bool = False) -> str:
    """The one line a refusal prints; fails unless the exit code is 2 and nothing looks like a traceback.

    after_work: lines of progress come before it where the machine is slow.
    """
    code, _, err = run(capsys, *words)
    assert code == 2, (code, err)
    if after_work:
        err = err.splitlines(keepends=True)[-1]
    assert err.startswith("sparvar-tune: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err
