"""The classes of the synthetic set: their names, and the scenes that each is photographed in."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, zip_longest

import numpy as np

from training.synthetic.camera import BOARD, STAGE, Scene, scenes
from training.synthetic.cloth import CLOTH
from training.synthetic.devices import DEVICES
from training.synthetic.materials import SHEETS, Recipe
from training.synthetic.minerals import MINERALS
from training.synthetic.noise import generator
from training.synthetic.parts import TURNED_PARTS

PARTS = TURNED_PARTS | DEVICES
_GROUPS = (SHEETS, TURNED_PARTS, CLOTH, DEVICES, MINERALS)
# In turn, so that any number of classes has materials and parts of all kinds.
RECIPES: dict[str, Recipe] = dict(
    pair for pair in chain(*zip_longest(*(group.items() for group in _GROUPS))) if pair is not None
)

# What a part lies on: quiet enough to leave it the eye.
_GROUNDS = ("paint", "cardboard", "linen", "leather", "brushed_metal", "concrete")


def class_names(count: int) -> list[str]:
    """Names of the first ``count`` classes: each recipe once, then each in a second make (``gear_2``), and so on."""
    recipes = list(RECIPES)
    makes = ((recipes[k % len(recipes)], k // len(recipes) + 1) for k in range(count))
    return [recipe if make == 1 else f"{recipe}_{make}" for recipe, make in makes]


def class_scenes(name: str, seed: int, size: int) -> dict[str, Scene]:
    """The scene of each view of the class called ``name``, for photographs of ``size`` px."""
    rng = generator(seed, name)
    recipe = name if name in RECIPES else name.rpartition("_")[0]
    stage, board, unit = round(STAGE * size), round(BOARD * size), size / 256
    if recipe not in PARTS:
        return scenes(RECIPES[recipe](rng, stage, unit), None, rng, size)
    ground = RECIPES[str(rng.choice(_GROUNDS))](rng, stage, unit)
    gray = ground.colour.mean(-1, keepdims=True)
    muted = replace(ground, colour=gray + (ground.colour - gray) * np.float32(rng.uniform(0, 0.4)))
    return scenes(muted, RECIPES[recipe](rng, board, unit), rng, size)
