"""What changes while a run goes on: weights, optimiser, progress. Begun anew or from the checkpoint, and kept in it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adpretrain_hf.errors import InputError
from adpretrain_hf.projector import Projectors
from training.run import distributed
from training.run.checkpoint import Progress, load_checkpoint, save_checkpoint
from training.run.folder import RunFolder
from training.settings import PretrainSettings


class TrainingState:
    """The moving parts of a run.

    Args:
        settings: of the run.
        run: its folder; a checkpoint that is there is taken up.
        projectors: float32 weights that are trained, on this process's device.
        images: how many are trained on.
        data: digest of their names.

    Attributes:
        progress: where the run stands.
        centers: (L, C), the normal centres, on the device; set by ``begin``.
        is_new: whether there was no checkpoint.

    Raises:
        InputError: a checkpoint that is damaged, or of other data.
    """

    def __init__(
        self, settings: PretrainSettings, run: RunFolder, projectors: Projectors, *, images: int, data: str
    ) -> None:
        self.settings, self._run, self.projectors = settings, run, projectors.requires_grad_().train()
        self._optimizer = torch.optim.Adam(
            projectors.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._averaged = copy.deepcopy(projectors).requires_grad_(False) if settings.ema else None
        self.steps_per_epoch = images // settings.batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"{images} training images do not fill one batch of {settings.batch_size}: lower --batch-size"
            )
        self.total_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps:
            self.total_steps = min(self.total_steps, settings.max_steps)
        self.progress, self.centers = Progress(data=data), torch.empty(0)
        self.is_new = not run.checkpoint.exists()
        if not self.is_new:
            self.progress, centers = load_checkpoint(run.checkpoint, projectors, self._optimizer, self._averaged)
            self.centers = centers.to(self._device)
            if self.progress.data != data:
                raise InputError(
                    f"the run in {run.path} was begun with other data than --data {' '.join(settings.data)}: other "
                    "images, or other names. Give those, or another --output"
                )
        self._last_checkpoint = self._clock = time.monotonic()

    def begin(self, centers: Tensor, scale: list[float]) -> None:
        """Fixes what was measured before the first step of a new run."""
        self.centers, self.progress.residual_scale = centers.to(self._device), scale

    @property
    def weights(self) -> Projectors:
        """What is judged and kept: the weights that are trained, or their moving average."""
        return self.projectors if self._averaged is None else self._averaged

    @property
    def is_done(self) -> bool:
        """Whether the run is at its end: of its epochs, its steps or its time."""
        return self.share_done() >= 1

    def share_done(self) -> float:
        """Of the run, in steps or in time, whichever is further."""
        of_steps, budget = self.progress.steps_done / self.total_steps, 60 * self.settings.time_budget
        return max(of_steps, self.progress.seconds / budget) if budget else of_steps

    def step(self) -> None:
        """Makes a step of the optimiser and counts it."""
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.projectors.parameters(), self.settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = decayed(self.settings.learning_rate, self.share_done())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._averaged is not None:  # not AveragedModel, which looks at a number on the device at every step
            decay = self.settings.ema if self.progress.steps_done else 0.0
            get_ema_multi_avg_fn(decay)(list(self._averaged.parameters()), list(self.projectors.parameters()), 0)
        self.progress.step += 1
        self.progress.steps_done += 1

    def begin_epoch(self) -> None:
        """Starts the clock: what is done between two epochs is no time of training."""
        self._clock = time.monotonic()

    def end_epoch(self) -> None:
        """Counts an epoch."""
        self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0

    def agree(self, stopping: bool, unreadable: int) -> tuple[bool, int]:
        """What the processes have to agree on at every step, in one exchange on the CPU; counts the step's time.

        Returns:
            Whether any of them is to stop, and the unreadable images of all.
        """
        before, self._clock = self._clock, time.monotonic()
        stops, number, milliseconds = distributed.totals(stopping, unreadable, round(1000 * (self._clock - before)))
        self.progress.seconds += milliseconds / 1000 / distributed.world_size()
        return stops > 0, number

    def checkpoint_is_due(self) -> bool:
        """Whether the last one is longer ago than the settings say."""
        return time.monotonic() - self._last_checkpoint > 60 * self.settings.checkpoint_minutes

    def save_checkpoint(self, say: Callable[[str], None]) -> None:
        """Writes a checkpoint from the first process. Where that fails, the last one is intact, and the run goes on."""
        self._last_checkpoint = time.monotonic()
        if distributed.rank() > 0:
            return
        try:
            save_checkpoint(
                self._run.checkpoint, self.progress, self.projectors, self._optimizer, self.centers, self._averaged
            )
        except OSError as error:
            say(f"no checkpoint was written, the last one is intact: {error}")

    @property
    def _device(self) -> torch.device:
        return next(self.projectors.parameters()).device


def decayed(rate: float, share_done: float) -> float:
    """A tenth of the rate after 70 % of the steps, a hundredth after 90 % (released: after 7 and 9 of 10 epochs)."""
    return rate * 0.1 ** ((share_done >= 0.7) + (share_done >= 0.9))
