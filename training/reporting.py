"""What a run shows while it goes on: a bar with losses, images/s and time left, and TensorBoard if installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training import distributed
from training.step import StepLoss

_PARTS = ("loss", "angle", "norm")
_SECONDS = 2.0  # between two looks at the losses, each of which waits for the device


class Reporter:
    """Shows and logs the progress of a run, in the first process alone.

    Args:
        folder: of TensorBoard's files.
        total: images of the whole run.
        done: images that are done already.
    """

    def __init__(self, folder: Path, *, total: int, done: int = 0) -> None:
        enabled = distributed.rank() == 0
        self._bar = tqdm(total=total, initial=done, unit="image", desc="pretrain", disable=not enabled)
        self._writer = _tensorboard(folder) if enabled else None
        self._sums: Tensor | None = None
        self._steps, self._looked = 0, time.monotonic()
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Starts the means of an epoch anew."""
        self._epoch_sums, self._epoch_steps, self._epoch_images = [0.0] * len(_PARTS), 0, 0
        self._epoch_began = time.monotonic()
        self._epoch_seconds = 0.0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def step(self, loss: StepLoss, images: int) -> None:
        """Notes a step; the losses are added up on the device and looked at every two seconds."""
        parts = torch.stack([loss.total.detach(), loss.angle, loss.norm])
        self._sums = parts if self._sums is None else self._sums + parts
        self._steps += 1
        self._epoch_images += images
        self._bar.update(images)
        if time.monotonic() - self._looked > _SECONDS:
            self._look()

    def end_steps(self) -> None:
        """Stops the clock of images/s once the device has done the epoch's steps; validation does not count."""
        self._look()
        self._epoch_seconds = time.monotonic() - self._epoch_began

    def end_epoch(self, epoch: int, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Logs the epoch's scores, by detector and metric.

        Returns:
            The means of the parts of the loss, and images/s of the steps, since this process took the epoch up.
        """
        steps = max(1, self._epoch_steps)
        means = {name: value / steps for name, value in zip(_PARTS, self._epoch_sums, strict=True)}
        for detector, metrics in scores.items():
            for name, value in metrics.items():
                self._log(f"validation/{detector}/{name}", value)
        shown = [f"{detector} " + " / ".join(f"{100 * v:.1f}" for v in m.values()) for detector, m in scores.items()]
        self.say(f"epoch {epoch + 1}: loss {means['loss']:.3f}; {'; '.join(shown)}")
        return means | {"images_per_second": self._epoch_images / self._epoch_seconds}

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def _look(self) -> None:
        if self._sums is None:
            return
        values = self._sums.tolist()
        means = {name: value / self._steps for name, value in zip(_PARTS, values, strict=True)}
        self._epoch_sums = [old + new for old, new in zip(self._epoch_sums, values, strict=True)]
        self._epoch_steps += self._steps
        self._bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
        for name, mean in means.items():
            self._log(f"train/{name}", mean)
        self._sums, self._steps, self._looked = None, 0, time.monotonic()

    def _log(self, name: str, value: float) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, self._bar.n)


def _tensorboard(folder: Path) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
