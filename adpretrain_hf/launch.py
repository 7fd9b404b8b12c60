"""Which of several processes this is, as ``torchrun`` tells it in the environment."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from adpretrain_hf.errors import InputError


class Launch(NamedTuple):
    """One process of several that were started together."""

    rank: int
    world_size: int


def launched() -> Launch | None:
    """What ``RANK`` and ``WORLD_SIZE`` say, or None where they are not set.

    Raises:
        InputError: they are no numbers, or do not fit each other.
    """
    texts = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(texts):
        return None
    if not all(text.isdigit() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise InputError(f"RANK={texts[0]} WORLD_SIZE={texts[1]} in the environment: expected 0 <= RANK < WORLD_SIZE")
    return Launch(*map(int, texts))


def default_device() -> str:
    """The process's own GPU under ``torchrun``, else the first one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() and "LOCAL_RANK" in os.environ else "cuda"
