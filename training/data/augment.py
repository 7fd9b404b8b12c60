"""The two augmented views of training images, drawn image by image and made on the device for a batch at once.

The augmentation is the published one (paper, appendix; MoCo v2's without its geometric part, so that patches at the
same position of both views show the same thing): ColorJitter(.4, .4, .4, .1) with probability .8, grey .2, Gaussian
blur of sigma .1 to 2 px .5. What torchvision and kornia have takes one order of the jitter's operations for a whole
batch, and torchvision one strength; here every view has its own, without a loop over images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adpretrain_hf.images import to_device

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LOWEST, _HIGHEST = (0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1)  # ColorJitter(.4, .4, .4, .1)
_UNCHANGED = (0, 1, 2, 3, 1, 1, 1, 0, 0, 0)
_STRENGTHS, _GREY, _SIGMA = slice(4, 8), 8, 9
_LUMA = (0.299, 0.587, 0.114)  # of Pillow's mode "L"
_PIXEL_VARIANCE = 1 / 12  # of the box that a pixel is: it blurs, too


def draw_augmentation(random: np.random.Generator, *, plain_first: bool = False) -> Tensor:
    """Draws how the two views of one image are changed, as ``augment`` takes it.

    Args:
        random: where chance comes from.
        plain_first: leave the first view as it is at test time, rather than augment both as published.

    Returns:
        (2, 10), float32: the order of the jitter's four operations, the strength of each, grey or not, sigma in px.
    """
    first = _UNCHANGED if plain_first else _draw(random)
    return torch.tensor([first, _draw(random)], dtype=torch.float32)


def _draw(random: np.random.Generator) -> tuple[float, ...]:
    jitter: Sequence[float] = _UNCHANGED[:8]
    if random.random() < 0.8:
        strengths = random.uniform(_LOWEST, _HIGHEST)
        jitter = [*random.permutation(4), *strengths]
    grey = random.random() < 0.2
    sigma = random.uniform(0.1, 2.0) if random.random() < 0.5 else 0.0
    return (*jitter, grey, sigma)


def augment(images: Tensor, drawn: Tensor) -> Tensor:
    """Changes the colours and the sharpness of a batch, each view by what was drawn for it.

    Values stay between two operations as they are, where Pillow rounds them to 8 bits.

    Args:
        images: (B, 3, S, S), uint8, on any device.
        drawn: (B, 2, 10), of ``draw_augmentation``, on the CPU: from there no operation waits for the device.

    Returns:
        (2 B, 3, S, S), float32 from 0 to 255, on the images' device: the first views before the second.
    """
    drawn = drawn.transpose(0, 1).flatten(0, 1)  # (2 B, 10)
    order, strengths = drawn[:, :4], drawn[:, _STRENGTHS]
    strength = torch.where(order == _HUE, 1, strengths.gather(1, order.long()))
    # Brightness, contrast and saturation mix a view with black, with its mean grey, or with each pixel's grey.
    mixes = torch.stack([order == _SATURATION, order == _CONTRAST, strength], dim=2)  # (2 B, 4, 3)
    hues = torch.where(order == _HUE, strengths[:, _HUE:], 0)
    numbers = torch.cat([mixes.flatten(1), drawn[:, _GREY:]], dim=1)
    on_device = to_device(numbers.T, images.device, torch.float32)[:, :, None, None, None]  # (14, 2 B, 1, 1, 1)
    grey, sigma = on_device[12:]
    pixels = images.float().repeat(2, 1, 1, 1)
    for turn in range(4):
        luma, (own, mean, kept) = _luma(pixels), on_device[3 * turn : 3 * turn + 3]
        base = own * luma + mean * luma.mean(dim=(2, 3), keepdim=True)
        pixels = torch.lerp(base, pixels, kept).clamp_(0, 255)
        pixels = _shift_hues(pixels, hues[:, turn])
    pixels = torch.lerp(pixels, _luma(pixels), grey)
    return _blur(pixels, sigma[:, 0])


def _shift_hues(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Turns the hues of some views by a share of the circle, in HSV; the shifts lie on the CPU."""
    turned = shifts.nonzero()[:, 0]
    if not len(turned):
        return pixels
    index = to_device(turned, pixels.device, torch.int64)
    picked = pixels[index]
    value, least = picked.amax(dim=1), picked.amin(dim=1)
    red, green, blue = picked.unbind(1)
    chroma = value - least
    divisor = chroma.clamp_min(1e-12)  # grey has no hue, and none to turn
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    hue = hue + 6 * to_device(shifts[turned], pixels.device, pixels.dtype)[:, None, None]
    places = torch.stack([(start + hue) % 6 for start in (5, 3, 1)], dim=1)  # of red, green and blue on the circle
    colours = value[:, None] - chroma[:, None] * torch.minimum(places, 4 - places).clamp_(0, 1)
    return pixels.index_copy(0, index, colours)


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur as two products with a matrix of each view; what lies outside is as the pixel at the edge."""
    wide = (sigma.square() - _PIXEL_VARIANCE).clamp_min(1e-12).sqrt()  # (2 B, 1, 1)
    steps = _distances(pixels.shape[-1], pixels.device) / wide  # (2 B, S, S + 1)
    rows = torch.special.ndtr(steps).diff(dim=2)[:, None]
    return rows @ pixels @ rows.mT


@functools.lru_cache(maxsize=4)
def _distances(side: int, device: torch.device) -> Tensor:
    """(S, S + 1): from every pixel to the edges of all, of which the first and the last lie at infinity."""
    edges = torch.arange(side + 1) - 0.5
    edges[0], edges[-1] = -torch.inf, torch.inf
    return (edges - torch.arange(side)[:, None]).to(device)


def _luma(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.split(1, dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
