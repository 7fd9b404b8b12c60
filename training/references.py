"""The references of every step, and what is measured on normal images before the first one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm

from adpretrain_hf.matching import nearest_residual
from training import distributed
from training.centers import normal_statistics
from training.reference_cache import ReferenceCache
from training.reference_pool import ReferencePool
from training.settings import PretrainSettings
from training.training_data import TrainingData

_CENTER_REFERENCES = 4  # of each normal image, as in the released code
_STEP, _IMAGE, _CENTER = range(3)  # keep the seeds of the draws apart


class References:
    """Draws reference images of the same category and view, and looks their patches up.

    What is drawn follows from the seed, the epoch, the step and the image, so that it is the same for any number of
    processes, and after a stop.

    Args:
        data: the data of the run.
        pool: normal images to draw from.
        cache: their patches.
        settings: numbers of references, and the seed.
    """

    def __init__(
        self, data: TrainingData, pool: ReferencePool, cache: ReferenceCache, settings: PretrainSettings
    ) -> None:
        self._categories, self._views = data.dataset["category"], data.dataset["view"]
        self._pool, self._cache, self._settings = pool, cache, settings

    def draw(self, positions: Sequence[int], epoch: int, step: int) -> list[list[Tensor]]:
        """The reference patches of the images of a batch: for each, L x (K, C), K the same for all."""
        seed = self._settings.seed
        number = int(np.random.default_rng((seed, epoch, step, _STEP)).choice(self._settings.references))
        return self._patches(positions, number, [(seed, epoch, position, _IMAGE) for position in positions])

    def normal_residuals(self) -> Iterator[list[Tensor]]:
        """The unscaled residuals of every normal image of the pool against four others: L x (1, C, 1, K)."""
        for position in tqdm(self._pool.members, unit="image", desc="centres", disable=distributed.rank() > 0):
            seeds = [(self._settings.seed, position, _CENTER)]
            (patches,) = self._patches([position], _CENTER_REFERENCES, seeds)
            tokens = self._cache.get([position])
            yield [
                nearest_residual(level.float().T[None, :, None], own.float())
                for level, own in zip(tokens, patches, strict=True)
            ]

    def measure(self) -> tuple[list[Tensor], list[float]]:
        """Normal centres (C,) of scaled residuals, and every level's scale: one over the mean length of a residual.

        Without ``scale_residuals`` the scale is 1.
        """
        statistics = normal_statistics(self.normal_residuals())
        scale = statistics.residual_scale() if self._settings.scale_residuals else (1.0,) * len(statistics.centers)
        return [factor * center for factor, center in zip(scale, statistics.centers, strict=True)], list(scale)

    def _patches(self, positions: Sequence[int], number: int, seeds: Sequence[tuple[int, ...]]) -> list[list[Tensor]]:
        drawn = [
            reference
            for position, seed in zip(positions, seeds, strict=True)
            for reference in self._pool.draw(
                self._categories[position], self._views[position], number, np.random.default_rng(seed), exclude=position
            )
        ]
        levels = [level.chunk(len(positions)) for level in self._cache.get(drawn)]
        return [list(patches) for patches in zip(*levels, strict=True)]
