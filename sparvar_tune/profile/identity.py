"""What a profile still stands for after the code around it changed: three identities, of which only the first refuses.

meaning   an integer for each variant, generation step and backend, raised when the same fields come to stand for other keys or
          arithmetic. Rows of another meaning run dense, and the generation goes without such a step. A golden test over lists
          and tables forces the bump.
binary    the machine code a row's launch compiled to, and by which Triton. Another one keeps the row: it says "time it again".
source    the kernels' sources without their words (`kernel_hash`). Where a measurement came from, and the key of its log lines.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparvar_kernels
from sparvar_kernels.backends.registry import KERNELS, kernel_for
from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import VARIANTS
from sparvar_tune.catalog.gpus import Gpu
from sparvar_tune.generation import STEPS

if TYPE_CHECKING:
    from sparvar_tune.profile.schema import Profile, Row, Versions

Meaning = tuple[tuple[str, int], ...]  # (kind of variant or step, or backend; its meaning), sorted by name
STARTS = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)  # what comes before a statement


def meaning_of(policy: Policy, kernels: Collection[str]) -> Meaning:
    """The meanings today of what a policy's rules, its steps and these backends use."""
    return tuple((name, _today(name)) for name in sorted({*used_by(policy), *kernels}))


def used_by(policy: Policy) -> set[str]:
    """The kinds of variants and generation steps it is made of."""
    return {r.variant.kind for r in policy.rules} | {step.kind for step in policy.steps}


def stamp(policy: Policy, rows: Iterable[Row], gpu: Gpu) -> dict[str, Any]:
    """The profile's fields `meaning` and `kernel_hash` for rows measured or predicted now."""
    return {"meaning": meaning_of(policy, {row.kernel for row in rows}), "kernel_hash": kernel_hash(gpu)}


def every_meaning() -> Meaning:
    """The meanings today of all there is: what a search may choose from."""
    return tuple((name, _today(name)) for name in sorted({*VARIANTS, *KERNELS, *STEPS}))


def first_meaning(names: Iterable[str]) -> Meaning:
    """The meanings of a file from before they were counted."""
    return tuple((name, 1) for name in sorted(set(names)))


def _today(name: str) -> int:
    thing: Any = VARIANTS.get(name) or STEPS.get(name) or KERNELS[name]
    return int(thing.meaning)


def refused(profile: Profile) -> dict[int, str]:
    """Scale -> why its row no longer means what was tuned; such a scale runs dense."""
    found = {}
    for row in profile.rows:
        uses = {r.variant.kind for r in profile.policy.rules if r.scale_index == row.scale_index} | {row.kernel}
        changed = [f"{name} {was} (now {_today(name)})" for name, was in profile.meaning if name in uses and was != _today(name)]
        if changed:
            found[row.scale_index] = (
                f"it was tuned for {', '.join(changed)}, which stood for other keys; run sparvar-tune verify, or tune again"
            )
    return found


def refused_steps(profile: Profile) -> dict[str, str]:
    """Kind of step -> why it no longer means what was certified; the generation goes without it."""
    found = {}
    for name, was in profile.meaning:
        if name in {step.kind for step in profile.policy.steps} and was != _today(name):
            found[name] = f"its meaning was {was} (now {_today(name)}): it stood for another picture; tune again"
    return found


def retime(profile: Profile, versions: Versions) -> list[str]:
    """Why times of a profile may have moved, a line each; its rows stay."""
    made_by = {row.binary.triton for row in profile.rows if row.binary} or ({profile.versions.triton} - {None})
    out = []
    if made_by and versions.triton and made_by != {versions.triton}:
        was = ", ".join(sorted(str(v) for v in made_by))
        out.append(f"timed with Triton {was}, here {versions.triton}: times may have moved; run sparvar-tune verify --write")
    if profile.versions.torch != versions.torch:
        out.append(f"timed with torch {profile.versions.torch}, here {versions.torch}")
    return out


def code_of_row(codes: Iterable[str]) -> str:
    """One sha256 for all binaries a row's launch takes, whatever their order."""
    return hashlib.sha256("\n".join(sorted(set(codes))).encode()).hexdigest()


def kernel_hash(gpu: Gpu) -> str:
    """sha256 over the sources that decide what is computed on `gpu` and how fast.

    That is every module of sparvar_kernels but the oracle, what only the backends of other devices run, and the passes
    around attention (`path`), without comments, docstrings and blank lines.
    """
    here = kernel_for(gpu.device)
    others = ("path/", *(f"backends/{k.folder}/" for k in KERNELS.values() if k.name != here))
    digest = hashlib.sha256()
    root = Path(sparvar_kernels.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if path.stem != "oracle" and not name.startswith(others):
            digest.update(name.encode() + b"\0" + code_of(path.read_bytes()).encode() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=64)
def code_of(source: bytes) -> str:
    """A module's lines without comments, strings that are statements and blank lines; the same for every version of Python."""
    text = source.decode().replace("\r\n", "\n")
    lines, words, quoted, before = text.split("\n"), [], set[int](), tokenize.NEWLINE  # as the tokenizer counts them
    for token, after in pairwise(tokenize.generate_tokens(io.StringIO(text).readline)):
        (first, begin), (last, end) = token.start, token.end
        alone = token.type == tokenize.STRING and before in STARTS and after.type in (tokenize.NEWLINE, tokenize.COMMENT)
        if alone or token.type == tokenize.COMMENT:
            words.append((first, begin, last, end))
        elif first < last and token.type not in (tokenize.NEWLINE, tokenize.NL):
            quoted.update(range(first, last + 1))  # a string of several lines is code to the last blank
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type
    for first, begin, last, end in reversed(words):
        lines[first - 1] = lines[first - 1][:begin] + lines[last - 1][end:]
        lines[first:last] = [""] * (last - first)
    kept = (line if i in quoted else line.rstrip() for i, line in enumerate(lines, 1) if line.strip() or i in quoted)
    return "\n".join(kept)
