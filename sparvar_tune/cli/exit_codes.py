"""What a command's exit code says. `--help` and docs/tune.md say it in these words; scripts may rely on the numbers."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The number, and what it means."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code

    DONE = 0, "done; also where no policy certified the preset: a line says why, and what runs here instead"
    FAILED = 1, "a check did not pass, or not every recorded miss was tuned"
    BAD_INPUT = 2, "bad input, or a bound of your own that nothing meets: one line on stderr says what to do"
    MISSING_TOOL = 3, "`trace --with nsys` or `ncu`: the tool is not on the PATH; its command is printed"
    INTERRUPTED = 130, "interrupted: finished trials are kept, `--resume` goes on"


EPILOG = "exit codes:\n" + "\n".join(f"  {code:3d}  {code.meaning}" for code in ExitCode)
