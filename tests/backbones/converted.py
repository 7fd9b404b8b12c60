"""Maps of a converted tower, how far they lie from the original's, and a pickle with code in it."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel


@torch.no_grad()
def maps(model: CLIPVisionModel, images: Tensor) -> list[Tensor]:
    """(B, C, h, w) of every block."""
    states = model(images, output_hidden_states=True).hidden_states[1:]
    side = math.isqrt(states[0].shape[1] - 1)
    return [state[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for state in states]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its block."""
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)
