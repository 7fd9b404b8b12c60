"""Random generators that depend on names and numbers, and on nothing else that is there."""

import zlib

import numpy as np


def named_generator(seed: int, *names: str) -> np.random.Generator:
    """A generator of its own for a seed and some names, the same on every run (Python's own hash of a text is not)."""
    return np.random.default_rng((seed, *(zlib.crc32(name.encode()) for name in names)))


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator of its own for a seed, a purpose and some numbers.

    How many numbers there are counts as well: numpy fills up with zeros, so that (1, 2) and (1, 2, 0) would be one.
    """
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), len(numbers), *numbers))
