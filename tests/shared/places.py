"""Where the repository's files are, and where a process that a test starts finds what it imports."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SHARED = (TESTS / "shared", TESTS / "shared" / "lookalike_models", TESTS / "shared" / "targets")
PYTHONPATH = os.pathsep.join(map(str, (*SHARED, ROOT, ROOT / "kernels")))
