"""Stopping when asked: SIGTERM and SIGINT set a flag, and the loop stops after the step that it is in."""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import FrameType


class StopRequest:
    """Takes SIGTERM and SIGINT for as long as a ``with`` block lasts; a second SIGINT interrupts at once.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._over = multiprocessing.Event()

    def __enter__(self) -> StopRequest:
        self._before = {one: signal.signal(one, self._note) for one in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def leave_to_parent(self, worker: int = 0) -> None:
        """Lets a data worker ignore signals that all processes get, while the loop still needs its last batches."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_if_over)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def _end_if_over(self, number: int, frame: FrameType | None) -> None:
        if self._over.is_set():
            os._exit(0)
