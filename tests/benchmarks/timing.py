"""Times of several computations, taken in turn, so that all see the same state of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def side_by_side(*calls: Callable[[], object], repeats: int = 5) -> list[float]:
    """The median seconds of each call, after one that is not timed.

    What a GPU was asked for is waited for after each call.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + repeats):
        for taken, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [median(taken[1:]) for taken in seconds]
