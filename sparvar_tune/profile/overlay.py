"""What `sparvar-tune verify` found on this machine about one profile file, kept beside the profiles of this user.

An overlay says of a profile, and of its rows, whether they run sparse or dense here. It holds no launch and no policy, so it
can change nothing else; it counts only for the very bytes, meanings and device it was made with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparvar_tune.profile.reader import Reader, ReadError, sealed_text, to_plain, unique_keys, why_not_sealed
from sparvar_tune.profile.schema import ProfileError, Speedup, Versions, is_date, one_line, why_not_sha256
from sparvar_tune.profile.store import exists, read_bytes, user_folder, write_atomic

OVERLAY_SCHEMA = 2
OK, DEMOTED = "ok", "demoted"
LEAST = 6  # pairs behind a verdict on time: fewer are all on one side of 1 by chance in over 5 % of cases


@dataclass(frozen=True)
class Verified:
    """One row re-timed. speedup: dense / tuned here, None where the launch did not run.

    verdict "demoted" means dense from now on and needs a gain that is not certain; `reason` says what was seen.
    """

    scale_index: int
    speedup: Speedup | None
    verdict: str
    reason: str

    def why_not(self) -> str | None:
        if self.verdict not in (OK, DEMOTED):
            return f'verdict: got {self.verdict!r}, want "{OK}" or "{DEMOTED}"'
        if self.speedup is not None and self.speedup.n < LEAST:
            return f"speedup.n: got {self.speedup.n}, want >= {LEAST}"
        certain = self.speedup is not None and self.speedup.low > 1
        if (self.verdict == DEMOTED and certain) or (self.verdict == OK and self.speedup is None):
            return f"verdict: got {self.verdict!r}, which the speedup does not bear out"
        return None


@dataclass(frozen=True)
class Overlay:
    """The outcome of one `verify`. Rows it had no time for are not in `rows`.

    profile_sha256: of the profile file's bytes. meaning: of what ran (identity.py).
    device: `machine.device_name` of where it ran.
    verdict "demoted": the profile as a whole is not to be used here, because of `reason`.
    """

    schema: int
    created: str
    profile_sha256: str
    meaning: tuple[tuple[str, int], ...]
    versions: Versions
    device: str
    verdict: str
    reason: str
    rows: tuple[Verified, ...]

    def why_not(self) -> str | None:
        if self.schema != OVERLAY_SCHEMA:
            return f"schema: got {self.schema}, want {OVERLAY_SCHEMA}"
        if not is_date(self.created):
            return f'created: got {self.created!r}, want a date such as "2026-11-23"'
        if self.verdict not in (OK, DEMOTED):
            return f'verdict: got {self.verdict!r}, want "{OK}" or "{DEMOTED}"'
        scales = [row.scale_index for row in self.rows]
        if scales != sorted(set(scales)):
            return f"rows: got scales {scales}, want each once and ascending"
        if any(number < 1 for _, number in self.meaning):
            return f"meaning: got {dict(self.meaning)}, want numbers >= 1"
        return why_not_sha256("profile_sha256", self.profile_sha256)


def file(gpu: str, name: str) -> Path:
    """Where the overlay of the profile called `name` is on the GPU of that slug."""
    return user_folder().parent / "overlays" / gpu / name


def to_json(overlay: Overlay) -> str:
    """The file's text, as a profile's: sorted keys and a checksum."""
    return sealed_text(to_plain(overlay))


def from_json(text: str, where: str) -> Overlay:
    """The overlay in `text`; raises ProfileError naming `where` and the field."""
    try:
        data: Any = json.loads(text, object_pairs_hook=unique_keys)
        fields = {k: v for k, v in data.items() if k != "checksum"} if isinstance(data, dict) else data
        made = Reader().read(Overlay, fields, "")
        reason = why_not_sealed(data)
        if reason:
            raise ReadError(reason)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise ProfileError(f"{where}: damaged: {reason}; run sparvar-tune verify again") from None
    return made


def find(gpu: str, name: str) -> Overlay | None:
    """The overlay, None where there is none. Raises ProfileError for a damaged or unreadable one."""
    path = file(gpu, name)
    if not exists(path):
        return None
    return from_json(read_bytes(path).decode("utf-8", "replace"), str(path))


def save(overlay: Overlay, path: Path) -> None:
    """Writes the file in one step. Raises ProfileError where it cannot be written or could not be read again."""
    text = to_json(overlay)
    from_json(text, f"{path}: not written")
    write_atomic(path, text.encode())
