"""The share of the picture decoder: device time of one function of a live model, by events."""

from __future__ import annotations

from typing import Any

import torch


class Decoding:
    """Wraps `owner.name` on the instance; `ms()` gives every call's device time since the last asking."""

    def __init__(self, owner: Any, name: str) -> None:
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        own = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            out = own(*args, **kwargs)
            end.record()
            self.marks.append((begin, end))
            return out

        vars(owner)[name] = timed

    def ms(self) -> list[float]:
        torch.cuda.synchronize()
        out = [begin.elapsed_time(end) for begin, end in self.marks]
        self.marks.clear()
        return out
