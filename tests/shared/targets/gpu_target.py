"""What the GPU tests of the worker pool call: work that breaks its CUDA context, runs out of memory or is fine."""

from __future__ import annotations

import torch


def target(payload: dict) -> object:
    if payload["do"] == "break":
        torch.zeros(8, device="cuda")[torch.tensor([10**6], device="cuda")].cpu()  # a device-side assert
    if payload["do"] == "fill":
        torch.empty(1 << 45, device="cuda")
    return float(torch.ones(8, device="cuda").sum())
