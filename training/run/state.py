"""What changes while a run goes on: weights, optimiser, progress; how it begins, and the checkpoint that it is kept in.

A checkpoint is all that a run needs to go on as if it had never stopped, in one safetensors file. No state of a random
generator is among it: all that is drawn follows from the seed, the epoch, the step and the image.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import atomic_path, read_safetensors
from adpretrain_hf.projector import Projectors
from training.run import distributed
from training.settings import PretrainSettings

_FORMAT = "adpretrain_checkpoint_1"


class TrainingState:
    """The moving parts of a run.

    Args:
        settings: of the run.
        checkpoint: the file; one that is there is taken up.
        projectors: float32 weights that are trained, on this process's device.
        images: how many are trained on.
        data: digest of their names.

    Attributes:
        progress: where the run stands.
        centers: (L, C), the normal centres, on the device; to be set before the first step of a new run, as is the
            residuals' scale in ``progress``.
        is_new: whether there was no checkpoint.

    Raises:
        InputError: a batch that cannot be shared evenly, a checkpoint that is damaged, or of other data.
    """

    def __init__(
        self, settings: PretrainSettings, checkpoint: Path, projectors: Projectors, *, images: int, data: str
    ) -> None:
        self.settings, self._checkpoint, self.projectors = settings, checkpoint, projectors.requires_grad_().train()
        self._optimizer = torch.optim.Adam(
            projectors.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._modules = {"model": projectors}
        if settings.ema:
            self._modules["averaged"] = copy.deepcopy(projectors).requires_grad_(False)
        size = settings.batch_size
        self.steps_per_epoch = images // size
        if not self.steps_per_epoch:
            raise InputError(f"{images} training images do not fill one batch of {size}: lower --batch-size")
        if size % (shares := settings.accumulate * distributed.world_size()):
            processes = f"{distributed.world_size()} processes in {settings.accumulate} parts"
            raise InputError(f"--batch-size {size} cannot be shared by {processes}: expected a multiple of {shares}")
        self.total_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps:
            self.total_steps = min(self.total_steps, settings.max_steps)
        self.progress, self.centers = Progress(data=data), torch.empty(0)
        self.is_new = not checkpoint.exists()
        if not self.is_new:
            self._load()
            if self.progress.data != data:
                raise InputError(
                    f"the run in {checkpoint.parent} was begun with other data than --data {' '.join(settings.data)}: "
                    "other images, or other names. Give those, or another --output"
                )
        self._last_checkpoint = self._clock = time.monotonic()

    @property
    def weights(self) -> Projectors:
        """What is judged and kept: the weights that are trained, or their moving average."""
        return self._modules.get("averaged", self.projectors)

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
        done = self.share_done()  # the rate falls to a tenth twice (released: after 7 and 9 of 10 epochs)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * 0.1 ** ((done >= 0.7) + (done >= 0.9))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.settings.ema:  # not AveragedModel, which looks at a number on the device at every step
            decay = self.settings.ema if self.progress.steps_done else 0.0
            get_ema_multi_avg_fn(decay)(list(self.weights.parameters()), list(self.projectors.parameters()), 0)
        self.progress.step += 1
        self.progress.steps_done += 1

    def begin_epoch(self) -> None:
        """Starts the clock: what is done between two epochs is no time of training."""
        self._clock = time.monotonic()

    def end_epoch(self) -> None:
        """Counts an epoch, unless the run ends within it: one that goes on with more time has its rest to do."""
        if self.progress.step == self.steps_per_epoch:
            self.progress.epoch, self.progress.step, self.progress.unreadable = self.progress.epoch + 1, 0, []

    def agree(self, stopping: bool, unreadable: Sequence[str]) -> bool:
        """Whether any process is to stop; notes what any could not read in a step, and the time that it took."""
        before, self._clock = self._clock, time.monotonic()
        milliseconds = round(1000 * (self._clock - before))
        stops, number, total = distributed.totals(stopping, len(unreadable), milliseconds)
        self.progress.seconds += total / 1000 / distributed.world_size()
        if number:
            self.progress.unreadable += distributed.union(unreadable)
        return stops > 0

    def checkpoint_is_due(self) -> bool:
        """Whether the last one is longer ago than the settings say."""
        return time.monotonic() - self._last_checkpoint > 60 * self.settings.checkpoint_minutes

    def save_checkpoint(self, say: Callable[[str], None]) -> None:
        """Writes a checkpoint from the first process. Where that fails, the last one is intact, and the run goes on."""
        self._last_checkpoint = time.monotonic()
        if distributed.rank() > 0:
            return
        states = {name: module.state_dict() for name, module in self._modules.items()}
        states |= {f"optimizer.{number}": state for number, state in self._optimizer.state_dict()["state"].items()}
        tensors = {f"{name}.{key}": torch.as_tensor(one) for name, own in states.items() for key, one in own.items()}
        tensors["centers"] = self.centers
        # Copies, for safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        try:
            with atomic_path(self._checkpoint) as temporary:
                save_file(tensors, temporary, metadata={_FORMAT: json.dumps({"progress": vars(self.progress)})})
        except OSError as error:
            say(f"no checkpoint was written, the last one is intact: {error}")

    def _load(self) -> None:
        """Takes the checkpoint up."""
        try:
            tensors, about = read_safetensors(self._checkpoint)
            for name, module in self._modules.items():
                module.load_state_dict(_below(tensors, f"{name}."))
            numbers = {int(name.split(".")[0]) for name in _below(tensors, "optimizer.")}
            state = {number: _below(tensors, f"optimizer.{number}.") for number in numbers}
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})
            self.progress = Progress(**json.loads(about[_FORMAT])["progress"])
            self.centers = tensors["centers"].to(next(self.projectors.parameters()).device)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{self._checkpoint} is not a checkpoint of this run: {error}") from error


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: that is running, counted from 0.
        step: optimiser steps of this epoch that are done.
        unreadable: what was wrong with images of this epoch, over all processes.
        history: one record for every epoch that was judged, whole or as far as the run's time went.
        best: for every variant, the epoch that it was taken from and its score.
        baseline: validation scores of the untrained residuals, by detector and metric.
        residual_scale: of the extractor's configuration, measured when the run began.
        data: digest of the images' names; a run goes on with the same data, wherever they lie.
        steps_done: optimiser steps of all epochs.
        seconds: of training so far, over all starts.
    """

    epoch: int = 0
    step: int = 0
    unreadable: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    residual_scale: list[float] = field(default_factory=list)
    data: str = ""
    steps_done: int = 0
    seconds: float = 0.0


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def initialise(projectors: Projectors, scale: float) -> None:
    """Gives the layers that make a projector differ from the identity a share of their published start.

    The published start (scale 1) hides the residuals, which already tell anomalies from normal patches, behind noise:
    reference tokens from N(0, 1), their map Kaiming-normal with gain sqrt 2, the attention's projections as
    ``nn.MultiheadAttention`` begins, the MLP as ``nn.Linear`` does. With 0 all is as ``Projectors`` makes it: exactly
    the identity.

    Args:
        projectors: new ones; changed in place.
        scale: of the attention's output, the MLP's last layer and the reference tokens.
    """
    if scale == 0:
        return
    for level in projectors:
        nn.init.kaiming_normal_(level.reference_projection.weight)  # of gain sqrt 2 by default
        for layer in (level.attention.out_proj, level.mlp.fc2):
            layer.reset_parameters()
        nn.init.zeros_(level.attention.out_proj.bias)
        for parameter in (level.attention.out_proj.weight, *level.mlp.fc2.parameters(), level.reference_tokens):
            parameter.mul_(scale)
