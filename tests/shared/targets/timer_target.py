"""Stands in for the timing task in workers: times made up from the configuration, and faults on order. Without torch."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

from sparvar_tune.launch_search.worker import Poisoned

FAULTS = ("raise", "illegal", "die", "kill", "hang", "garbage")


def made_up_ms(config: dict, scale: int) -> float:
    digest = hashlib.sha256(json.dumps([config, scale], sort_keys=True).encode()).digest()
    return 0.1 + digest[0] / 1000


def time_task(payload: dict) -> object:
    folder = Path(os.environ["FAKE"])
    task = payload["task"]
    seed = json.dumps(task, sort_keys=True)
    with (folder / "calls").open("a") as file:
        file.write(seed + "\n")
    plan = json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else {}
    rng = random.Random(f"{plan.get('seed')} {seed} {sum(1 for line in (folder / 'calls').open() if line == seed + chr(10))}")
    orders = (plan.get("always", {}).get(json.dumps(config, sort_keys=True)) for config in task["configs"])
    bad = next((fault for fault in orders if fault), None) if not task["dense"] else None
    fault = bad or (rng.choice(FAULTS) if rng.random() < plan.get("faults", 0.0) else None)
    if fault:
        with (folder / "faults").open("a") as file:
            file.write(fault + "\n")
    if fault == "raise":
        raise RuntimeError("out of resource: shared memory")
    if fault == "illegal":
        raise Poisoned("CUDA error: an illegal memory access was encountered")
    if fault == "die":
        os._exit(9)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(1000)
    if fault == "garbage":
        return {"dense_ms": [], "tuned_ms": [[0.0]], "setup_ms": 1.0, "clocks": None}
    time.sleep(plan.get("slow", 0.0))
    rounds = task["rounds"]
    drift = [1.2 if plan.get("drift") and task["again"] == 0 and i >= rounds // 2 else 1.0 for i in range(rounds)]
    tuned = [[made_up_ms(c, task["scale_index"]) * d for d in drift] for c in task["configs"]]
    return {
        "dense_ms": [3.0] * rounds if task["dense"] else [], "tuned_ms": tuned, "setup_ms": 12.5,
        "clocks": {"sm_mhz": 1980, "power_w": 400.0, "celsius": 50, "slowed": []} if task["dense"] else None,
    }  # fmt: skip
