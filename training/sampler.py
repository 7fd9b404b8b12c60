"""The order of the training images: a function of seed, epoch and step, so that a stopped run finds its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from adpretrain_hf.errors import InputError


class Item(NamedTuple):
    """One image of a batch.

    Attributes:
        position: in the data set.
        epoch: counted from 0; with the run's seed and the position it seeds all that is random about the image.
    """

    position: int
    epoch: int


class EpochBatches(Sampler[list[Item]]):
    """The batches of one epoch for one process.

    All processes go through one random order. Of every global batch, part by part, each takes its contiguous share:
    the images of a step do not depend on the number of processes. A rest smaller than a batch is left for the next
    epoch's order.

    Args:
        positions: of the training images in the data set.
        batch_size: images of a step, over all processes.
        accumulate: parts that a step is computed in.
        seed: of the order.
        epoch: counted from 0.
        first_step: steps of this epoch that are done already.
        rank, world_size: of the processes.

    Raises:
        InputError: fewer images than a batch, or a batch that cannot be shared evenly.
    """

    def __init__(
        self,
        positions: Sequence[int],
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        epoch: int = 0,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(positions) < batch_size:
            raise InputError(
                f"{len(positions)} training images do not fill one batch of {batch_size}: lower --batch-size"
            )
        if batch_size % (accumulate * world_size):
            raise InputError(
                f"--batch-size {batch_size} cannot be shared by {world_size} processes in {accumulate} parts: expected "
                f"a multiple of {accumulate * world_size}"
            )
        order = np.random.default_rng((seed, epoch)).permutation(len(positions))
        steps = len(positions) // batch_size
        shares = order[: steps * batch_size].reshape(steps, accumulate, world_size, -1)[first_step:, :, rank]
        self._batches = [[Item(positions[place], epoch) for place in share] for step in shares for share in step]

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self._batches)

    def __len__(self) -> int:
        """The number of batches that are left, parts of a step counted one by one."""
        return len(self._batches)
