"""Copies of reference images, turned over or moved a little, whose patches stand beside theirs in a bank."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_CLEAR = 2  # standard errors
Transform = Callable[[Tensor], Tensor]  # (B, 3, H, W) to the same


def _moved(degrees: float = 0, zoom: float = 1, pixels: int = 0) -> Transform:
    """Turns images about their centre, counter-clockwise, enlarges them, and shifts them to the right and down.

    What comes in at a border is mirrored.
    """
    cosine, sine = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom

    def transform(images: Tensor) -> Tensor:
        number, _, height, width = images.shape
        # Where each pixel comes from, in halves of width and height.
        across, down = -2 * pixels / width, -2 * pixels / height
        rows = [[cosine, -sine * height / width, across], [sine * width / height, cosine, down]]
        origin = torch.tensor([rows] * number).to(images.device, non_blocking=True)
        grid = F.affine_grid(origin, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="reflection", align_corners=False)

    return transform


def _flipped(*dims: int) -> Transform:
    return lambda images: images.flip(dims)


_FLIPS = (_flipped(3), _flipped(2), _flipped(2, 3))
_JITTER = (_moved(5), _moved(-5), _moved(zoom=1.08), _moved(pixels=7))  # half a patch: what lies between two of them
AUGMENTATIONS: dict[str, tuple[Transform, ...]] = {
    "none": (),
    "flips": _FLIPS,
    "jitter": _JITTER,
    "both": (*_FLIPS, *_JITTER),
}


def with_copies(images: Tensor, augmentation: str) -> Iterator[Tensor]:
    """Prepared images (B, 3, H, W) and then their copies, one set (B, 3, H, W) after the other.

    Args:
        images: prepared, on any device; copies are made there.
        augmentation: one of ``AUGMENTATIONS``.
    """
    yield images
    yield from (transform(images) for transform in AUGMENTATIONS[augmentation])


def choose_augmentation(peaks: Mapping[str, Tensor]) -> str:
    """The augmentation that makes normal images look most normal, or ``"none"`` if none does by more than chance.

    More patches of any kind shorten all residuals, those of anomalies as well, which is no gain. It is one where the
    longest residuals of a normal image, by which it is judged, shorten more than its mean.

    Args:
        peaks: for each augmentation (K,), of every reference against the others the log of its map's maximum over
            the mean.
    """
    gains = {name: peaks["none"] - own for name, own in peaks.items() if name != "none"}
    clear = {
        name: float(gain.mean()) for name, gain in gains.items() if gain.mean() > _CLEAR * gain.std() / len(gain) ** 0.5
    }
    return max(clear, key=lambda name: clear[name], default="none")
