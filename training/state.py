"""What changes while a run goes on: weights, optimiser, progress. Begun anew or from the checkpoint, and kept in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adpretrain_hf.projector import Projectors
from training import distributed
from training.checkpoint import Progress, load_checkpoint, save_checkpoint
from training.preparation import Preparation
from training.reporting import Reporter
from training.run_folder import RunFolder
from training.settings import PretrainSettings


@dataclass
class TrainingState:
    """The moving parts of a run.

    Attributes:
        progress: where it stands.
        projectors: float32 weights that are trained.
        optimizer: Adam, as published.
        centers: L x (C,), the normal centres, fixed.
    """

    settings: PretrainSettings
    run: RunFolder
    progress: Progress
    projectors: Projectors
    optimizer: torch.optim.Optimizer
    centers: list[Tensor]
    steps_per_epoch: int
    _last_checkpoint: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, parts: Preparation, run: RunFolder) -> TrainingState:
        """Takes up the run's checkpoint, or measures what is fixed from now on: centres and the scale of residuals.

        Raises:
            InputError: a checkpoint that is damaged or of another run.
        """
        settings = parts.settings
        projectors = parts.extractor.projectors.requires_grad_().train()
        optimizer = torch.optim.Adam(
            projectors.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        if run.checkpoint.exists():
            progress, centers = load_checkpoint(run.checkpoint, projectors, optimizer)
        else:
            centers, scale = parts.references.measure()
            progress = Progress(residual_scale=scale)
        parts.extractor.config = parts.extractor.config.replace(residual_scale=tuple(progress.residual_scale))
        steps = len(parts.data.positions) // settings.batch_size
        return cls(settings, run, progress, projectors, optimizer, centers, steps)

    @property
    def images_done(self) -> int:
        """How many training images were seen, over all epochs."""
        return (self.progress.epoch * self.steps_per_epoch + self.progress.step) * self.settings.batch_size

    @property
    def total_images(self) -> int:
        """How many training images the whole run sees."""
        return self.settings.epochs * self.steps_per_epoch * self.settings.batch_size

    def distributed_projectors(self) -> nn.Module:
        """The projectors, with their gradients averaged over the processes if there are several."""
        if distributed.world_size() == 1:
            return self.projectors
        return DistributedDataParallel(self.projectors, gradient_as_bucket_view=True)

    def update(self) -> None:
        """Makes a step of the optimiser and counts it."""
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.projectors.parameters(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = decayed(self.settings.learning_rate, self.images_done / self.total_images)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1

    def checkpoint_is_due(self) -> bool:
        """Whether the last one is longer ago than the settings say."""
        return time.monotonic() - self._last_checkpoint > 60 * self.settings.checkpoint_minutes

    def save_checkpoint(self, reporter: Reporter) -> None:
        """Writes a checkpoint from the first process. Where that fails, the last one is intact, and the run goes on."""
        self._last_checkpoint = time.monotonic()
        if distributed.rank() > 0:
            return
        try:
            save_checkpoint(self.run.checkpoint, self.progress, self.projectors, self.optimizer, self.centers)
        except OSError as error:
            reporter.say(f"no checkpoint was written, the last one is intact: {error}")


def decayed(rate: float, share_done: float) -> float:
    """A tenth of the rate after 70 % of the steps, a hundredth after 90 % (released: after 7 and 9 of 10 epochs)."""
    return rate * 0.1 ** ((share_done >= 0.7) + (share_done >= 0.9))
