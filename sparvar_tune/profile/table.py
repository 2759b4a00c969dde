"""A profile's rows as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from sparvar_tune.profile.schema import Profile


def to_frame(profile: Profile) -> pandas.DataFrame:
    """See `Profile.to_frame`."""
    import pandas

    rows: list[dict[str, Any]] = []
    for row in profile.rows:
        dense, tuned, s = row.dense, row.tuned, row.speedup
        rows.append({
            "scale": row.scale_index, "kernel": row.kernel, **dict(row.config), "mode": row.mode, "state": row.state,
            "dense_ms": dense.p50_ms if dense else row.dense_predicted_ms,
            "tuned_ms": tuned.p50_ms if tuned else row.tuned_predicted_ms,
            "speedup": s.median if s else None, "low": s.low if s else None, "high": s.high if s else None,
            "n": s.n if s else None,
        })  # fmt: skip
    columns = ["scale", "kernel", "mode", "state", "dense_ms", "tuned_ms", "speedup", "low", "high", "n"]
    return pandas.DataFrame(rows, columns=None if rows else columns).set_index("scale")
