"""Profiles that earlier versions wrote, as today's are: nothing that a file says is refused because it is old."""

from __future__ import annotations

from typing import Any

from sparvar_tune.generation import SkipScales
from sparvar_tune.profile.identity import first_meaning


def as_today(data: Any, schema: int) -> Any:
    """The values of an older file as a file of `schema` has them; what is no such file is left for the reader to refuse."""
    if isinstance(data, dict) and data.get("schema") == 2:
        data = _from_schema_2(data, schema)
    return _with_skip(_with_metrics(data))


def _from_schema_2(data: dict[str, Any], schema: int) -> dict[str, Any]:
    """The values of an older file as today's have them; what is not as it should be there is left for `read` to refuse."""
    policy, rows, evidence = data.get("policy"), data.get("rows"), data.get("evidence")
    rules = policy.get("rules") if isinstance(policy, dict) else None
    if not isinstance(rules, list) or not isinstance(rows, list):
        return data
    kinds = [rule["variant"]["kind"] for rule in rules if isinstance(rule, dict) and isinstance(rule.get("variant"), dict)
             and isinstance(rule["variant"].get("kind"), str)]  # fmt: skip
    kernels = [row["kernel"] for row in rows if isinstance(row, dict) and isinstance(row.get("kernel"), str)]
    meaning = dict(first_meaning([*kinds, *kernels]))
    if isinstance(evidence, dict):
        workload = data.get("workload")
        weights = workload.get("weights_sha256") if isinstance(workload, dict) else None
        since = {r["variant"]["kind"]: 1 for r in rules if isinstance(r, dict) and isinstance(r.get("variant"), dict)
                 and isinstance(r["variant"].get("kind"), str)}  # fmt: skip
        evidence = {"measured": data.get("created"), "weights_sha256": weights, "meaning": since} | evidence
    rows = [{"binary": None} | row if isinstance(row, dict) else row for row in rows]
    return data | {"schema": schema, "meaning": meaning, "rows": rows, "evidence": evidence}


def _with_metrics(data: Any) -> Any:
    """The values of a file from before evidence had its metrics by name, as today's have them."""
    flat = data.get("evidence") if isinstance(data, dict) else None
    if not isinstance(flat, dict) or "metrics" in flat:
        return data
    psnr, ssim = ("psnr_mean_db", "psnr_lower_db", "required_psnr_db"), ("ssim_mean", "ssim_lower", "required_ssim")
    columns = {"psnr": psnr, "ssim": ssim, "ms_ssim": ("ms_ssim_mean", "", "")}
    metrics = {
        metric: dict(zip(("mean", "bound", "required"), map(flat.get, names), strict=True)) for metric, names in columns.items()
    }
    kept = {name: value for name, value in flat.items() if not any(name in names for names in columns.values())}
    return data | {"evidence": kept | {"metrics": metrics}}


def _with_skip(data: Any) -> Any:
    """The values of a file from before steps of the generation had meanings, as today's have them."""
    policy, meaning = (data.get("policy"), data.get("meaning")) if isinstance(data, dict) else (None, None)
    if not isinstance(policy, dict) or not isinstance(meaning, dict) or not policy.get("skip_scales"):
        return data
    return data | {"meaning": {SkipScales.kind: 1} | meaning}
