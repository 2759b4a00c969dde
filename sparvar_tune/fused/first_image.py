"""What is done for a first image: Python collects no garbage and its threads take turns more often, and kernels are loaded ahead.

A first image makes hundreds of thousands of objects, none of them garbage, and a full collection walks all that PyTorch and
Triton hold: 0.2 s of a first image of 2 s. Threads that compile need Python's lock for moments, and get it every 5 ms.

CUDA loads a kernel when it is first launched, 5 to 10 ms each, and cuBLAS takes other kernels for other numbers of rows: each
scale begins with some that are new. A thread launches them once while the drawing one plans, and drawing finds them.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

TURN_S = 0.0005
CHOICES = (2, 4096)  # of a bit, of a code book's entry: PyTorch sorts few by another kernel than many

_lock = threading.Lock()
_before: list[tuple[bool, float]] = []  # what there was when the first of those that are being drawn began, once for each


@contextmanager
def undisturbed() -> Iterator[None]:
    """Around a first image; the last of several that ends puts back what there was."""
    with _lock:
        _before.append(_before[0] if _before else (gc.isenabled(), sys.getswitchinterval()))
        gc.disable()
        sys.setswitchinterval(min(TURN_S, sys.getswitchinterval()))
    try:
        yield
    finally:
        with _lock:
            collects, turn_s = _before.pop()
            if not _before:
                sys.setswitchinterval(turn_s)
                if collects:
                    gc.enable()


def beside(work: Callable[[], object], device: torch.device) -> threading.Thread:
    """Begins to do what is done to no end but that libraries load their kernels; returns the thread that does it.

    On the caller's stream. What it raises an image will meet itself.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> None:
        with suppress(Exception), torch.no_grad(), torch.cuda.stream(stream):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def sample_once(device: torch.device) -> None:
    """Launches what sampling by top-k and top-p does, on next to nothing. Of no random number of anybody's."""
    own = torch.Generator(device)
    for choices in CHOICES:
        logits = torch.zeros(1, 1, choices, device=device)
        least = logits.topk(2, sorted=False)[0].amin(-1, keepdim=True)
        logits.masked_fill_(logits < least, -torch.inf)
        values, places = logits.sort(-1)
        outside = values.softmax(-1).cumsum_(-1) <= 0.0
        logits.masked_fill_(outside.scatter(2, places, outside), -torch.inf)
        torch.multinomial(logits.softmax(-1).view(-1, choices), 1, replacement=True, generator=own)
