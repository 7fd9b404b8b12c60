"""What a run shows while it goes on: a bar with losses, images/s and time left, and a tracker's curves."""

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import begin_copy
from training.run import distributed

PARTS = ("loss", "angle", "norm")
_SECONDS = 2.0  # between two looks at the losses

Log = Callable[[Mapping[str, float], int], None]  # values by name, images so far


class Reporter:
    """Shows and logs the progress of a run, in the first process alone.

    Args:
        folder: of the run.
        total: images of the whole run.
        done: images that are done already.
        tracker: one of ``TRACKERS``, or ``"none"``.

    Raises:
        InputError: the tracker is not installed.
    """

    def __init__(self, folder: Path, *, total: int, done: int = 0, tracker: str = "none") -> None:
        enabled = distributed.rank() == 0
        self._bar = tqdm(total=total, initial=done, unit="image", desc="pretrain", disable=not enabled)
        self._log, self._close = TRACKERS[tracker](folder) if enabled else _nothing(folder)
        self._waiting: list[Tensor] = []  # (3,) of each step
        self._arriving: tuple[list[Tensor], torch.cuda.Event | None] | None = None
        self._looked = time.monotonic()
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Starts the means of an epoch anew."""
        self._epoch_losses, self._epoch_images = [torch.zeros(0, len(PARTS))], 0
        self._epoch_began, self._epoch_seconds = time.monotonic(), 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._close()

    def step(self, losses: Tensor, images: int) -> None:
        """Notes a step; every two seconds the losses begin their way to the host, and the last ones are shown.

        Args:
            losses: (3,), detached, on the device: of the step, by ``PARTS``.
            images: of the step.
        """
        self._waiting.append(losses)
        self._epoch_images += images
        self._bar.update(images)
        if time.monotonic() - self._looked > _SECONDS:
            self._look()

    def end_steps(self) -> None:
        """Stops the clock of images/s once the device has done the epoch's steps; validation does not count."""
        self._look()
        self._show()
        self._epoch_seconds = time.monotonic() - self._epoch_began

    def end_epoch(self, epoch: int, scores: Mapping[str, Mapping[str, float]], what: str = "") -> dict[str, float]:
        """Logs the epoch's scores, by detector and metric.

        Returns:
            The means of the parts of the loss, and images/s of the steps, since this process took the epoch up.
        """
        means = _means(torch.cat(self._epoch_losses))
        flat = {f"{detector}/{name}": value for detector, own in scores.items() for name, value in own.items()}
        self._log({f"validation/{name}": value for name, value in flat.items()}, self._bar.n)
        self.say(f"epoch {epoch + 1}: loss {means['loss']:.3f}; {scores_text(scores)}{what}")
        return means | {"images_per_second": self._epoch_images / self._epoch_seconds}

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def _look(self) -> None:
        """Shows the losses that were sent last, and sends those since then: nothing waits for the device."""
        self._show()
        if self._waiting:
            self._arriving = begin_copy([torch.stack(self._waiting)])
        self._waiting, self._looked = [], time.monotonic()

    def _show(self) -> None:
        if self._arriving is None:
            return
        (losses,), arrived = self._arriving
        if arrived is not None:
            arrived.synchronize()
        self._arriving = None
        if not losses.isfinite().all():
            advice = "lower --learning-rate, or give --clip-norm; the last checkpoint is intact"
            raise InputError(f"the loss is not finite after some {self._bar.n} images: {advice}")
        self._epoch_losses.append(losses)
        means = _means(losses)
        self._bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
        self._log({f"train/{name}": mean for name, mean in means.items()}, self._bar.n)


def _means(losses: Tensor) -> dict[str, float]:
    """The means of the parts of the losses (N, 3) of N steps; 0 of none."""
    means = losses.double().sum(dim=0) / max(1, len(losses))
    return dict(zip(PARTS, means.tolist(), strict=True))


def scores_text(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Scores in percent, detector by detector."""
    texts = {name: " / ".join(f"{100 * value:.1f}" for value in metrics.values()) for name, metrics in scores.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items())


def _nothing(folder: Path) -> tuple[Log, Callable[[], None]]:
    return lambda values, images: None, lambda: None


def _tensorboard(folder: Path) -> tuple[Log, Callable[[], None]]:
    if find_spec("tensorboard") is None:
        return _nothing(folder)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(values: Mapping[str, float], images: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, images)

    return log, writer.close


def _wandb(folder: Path) -> tuple[Log, Callable[[], None]]:
    wandb = _library("wandb")
    name = folder.resolve().name
    run = wandb.init(project="adpretrain-hf", name=name, id=name, dir=str(folder), resume="allow")
    return lambda values, images: run.log(dict(values), step=images), run.finish


def _mlflow(folder: Path) -> tuple[Log, Callable[[], None]]:
    mlflow, name = _library("mlflow"), folder.resolve().name
    mlflow.set_experiment("adpretrain-hf")
    begun = mlflow.search_runs(filter_string=f'attributes.run_name = "{name}"', output_format="list", max_results=1)
    mlflow.start_run(begun[0].info.run_id if begun else None, run_name=name)  # one that is resumed goes on
    return lambda values, images: mlflow.log_metrics(dict(values), step=images), mlflow.end_run


def check_tracker(name: str) -> None:
    """Raises InputError if the library of a tracker that was asked for is not installed."""
    if name in ("wandb", "mlflow"):
        _library(name)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--tracker {name} needs its library: pip install {name}") from error


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "none": _nothing}
