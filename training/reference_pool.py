"""ReferencePool: which normal images may be references of an image, and drawing some of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from adpretrain_hf.errors import InputError
from training.seeds import named_generator


class ReferencePool:
    """Normal images by category and view, at most some of each, to draw references from.

    The published run draws from all normal images, whose patches take 100 GB at ViT-L and 224 px. A fixed pool of a few
    dozen of each category and view keeps them in memory. Which images are in it follows from the seed, the category's
    own images and their order alone, so that other categories may come and go.

    Args:
        categories, views, is_anomalous: of every image of the data set, by its position.
        among: positions that may be used, e.g. those of the training images; all by default.
        pool_size: N, normal images of each category and view; None for all.
        seed: of the choice.

    Raises:
        InputError: a category and view without a normal image (all such are named), ``pool_size`` below 1, or not as
            many views or labels as categories.
    """

    def __init__(
        self,
        categories: Sequence[str],
        views: Sequence[str],
        is_anomalous: Sequence[bool],
        *,
        among: Iterable[int] | None = None,
        pool_size: int | None = 64,
        seed: int = 0,
    ) -> None:
        if not len(categories) == len(views) == len(is_anomalous):
            raise InputError(
                f"got {len(categories)} categories, {len(views)} views and {len(is_anomalous)} labels, expected as "
                "many of each: one for every image"
            )
        categories, views, is_anomalous = (
            list(categories),
            list(views),
            list(is_anomalous),
        )  # quicker than Arrow columns
        if pool_size is not None and pool_size < 1:
            raise InputError(f"pool_size is {pool_size}, expected at least 1, or None for all normal images")
        normal: dict[tuple[str, str], list[int]] = defaultdict(list)
        for position in range(len(categories)) if among is None else sorted(set(among)):
            group = normal[categories[position], views[position]]
            if not is_anomalous[position]:
                group.append(position)
        self._groups = {key: _choose(key, group, pool_size, seed) for key, group in normal.items()}
        self._check()

    @property
    def members(self) -> list[int]:
        """The positions of all images that can be drawn, in rising order."""
        return sorted(position for group in self._groups.values() for position in group)

    def draw(
        self, category: str, view: str, number: int, generator: np.random.Generator, exclude: int | None = None
    ) -> list[int]:
        """Draws references of the same category and view, with replacement as published (released ``train.py``).

        Args:
            category, view: of the image that the references are for.
            number: how many; 1, 4 or 8 in the published run.
            generator: where chance comes from.
            exclude: the position of the image itself. It is not drawn where there is another one: its residual against
                itself is exactly 0, which no image at test time has. The published run does not exclude it, but draws
                from hundreds of images, where it is rarely met; in a small pool it often would be.

        Returns:
            ``number`` positions.

        Raises:
            InputError: no such category and view.
        """
        group = self._groups.get((category, view))
        if group is None:
            raise InputError(
                f"there are no references of category {category!r} and view {view!r}: the pool was made of other images"
            )
        others = [position for position in group if position != exclude] or group
        return [others[index] for index in generator.integers(len(others), size=number)]

    def without(self, unusable: Iterable[int]) -> ReferencePool:
        """A pool without some images, e.g. such that cannot be read; others do not take their place.

        Raises:
            InputError: none is left of a category and view.
        """
        gone = set(unusable)
        pool = object.__new__(type(self))
        pool._groups = {key: [p for p in group if p not in gone] for key, group in self._groups.items()}
        pool._check()
        return pool

    def _check(self) -> None:
        empty = [f"{category} {view}" for (category, view), group in self._groups.items() if not group]
        if empty:
            more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
            raise InputError(
                f"{len(empty)} categories and views have no normal image to be a reference: "
                f"{', '.join(empty[:10])}{more}. Add normal images, or leave these categories out"
            )


def _choose(key: tuple[str, str], group: list[int], pool_size: int | None, seed: int) -> list[int]:
    if pool_size is None or len(group) <= pool_size:
        return group
    random = named_generator(seed, *key)
    return sorted(group[index] for index in random.choice(len(group), pool_size, replace=False))
