"""The two augmented views of training images, drawn image by image and made on the device for a batch at once.

The augmentation is the published one (paper, appendix; MoCo v2's without its geometric part, so that patches at the
same position of both views show the same thing): ColorJitter(.4, .4, .4, .1) with probability .8, grey .2, Gaussian
blur of sigma .1 to 2 px .5. What torchvision and kornia have takes one order of the jitter's operations for a whole
batch, and torchvision one strength; here every view has its own, without a loop over images.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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

    No shape depends on what was drawn, so that a CUDA graph can make any batch: the hues of all views are turned at
    once, between the mixes that were drawn before and after them; where these are fewer than three, the rest keep all.

    Args:
        images: (B, 3, S, S), uint8, on any device.
        drawn: (B, 2, 10), of ``draw_augmentation``, on the same device.

    Returns:
        (2 B, 3, S, S), float32 from 0 to 255: the first views before the second.
    """
    drawn = drawn.transpose(0, 1).flatten(0, 1)  # (2 B, 10)
    order, strengths = drawn[:, :4].long(), drawn[:, _STRENGTHS]
    turns = torch.arange(4, device=drawn.device)
    turn_of_hue = torch.where(order == _HUE, turns, 0).sum(dim=1, keepdim=True)  # (2 B, 1)
    strength = strengths.gather(1, order)  # of every turn
    pixels = images.float().repeat(2, 1, 1, 1)
    for turn in (0, 1, 2):
        pixels = _mix(pixels, order[:, turn], torch.where(turn < turn_of_hue[:, 0], strength[:, turn], 1))
    pixels = _shift_hues(pixels, strengths[:, _HUE])
    for turn in (1, 2, 3):
        pixels = _mix(pixels, order[:, turn], torch.where(turn > turn_of_hue[:, 0], strength[:, turn], 1))
    pixels = torch.lerp(pixels, _luma(pixels), _of_views(drawn[:, _GREY]))
    return _blur(pixels, _of_views(drawn[:, _SIGMA])[:, 0])


def _mix(pixels: Tensor, kind: Tensor, kept: Tensor) -> Tensor:
    """Mixes views with black (brightness), their mean grey (contrast) or each pixel's (saturation); 1 keeps all."""
    luma = _luma(pixels)
    base = _of_views(kind == _CONTRAST) * luma.mean(dim=(2, 3), keepdim=True)
    base = torch.addcmul(base, _of_views(kind == _SATURATION), luma)
    return torch.lerp(base, pixels, _of_views(kept)).clamp_(0, 255)


def _of_views(numbers: Tensor) -> Tensor:
    """(2 B,) -> (2 B, 1, 1, 1)."""
    return numbers[:, None, None, None].float()


def _shift_hues(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Turns the hues of views (V, 3, S, S) by shares of the circle (V,), in HSV; 0 leaves a view as it is."""
    value, least = pixels.amax(dim=1), pixels.amin(dim=1)
    red, green, blue = pixels.unbind(1)
    chroma = value - least
    divisor = chroma.clamp_min(1e-12)  # grey has no hue, and none to turn
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    hue = hue + 6 * shifts[:, None, None]
    places = torch.stack([(start + hue) % 6 for start in (5, 3, 1)], dim=1)  # of red, green and blue on the circle
    colours = value[:, None] - chroma[:, None] * torch.minimum(places, 4 - places).clamp_(0, 1)
    return torch.where(_of_views(shifts) == 0, pixels, colours)


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur as two products with a matrix of each view; what lies outside is as the pixel at the edge."""
    wide = (sigma.square() - _PIXEL_VARIANCE).clamp_min(1e-12).sqrt()  # (2 B, 1, 1)
    steps = _distances(pixels.shape[-1], pixels.device) / wide  # (2 B, S, S + 1)
    rows = torch.special.ndtr(steps).diff(dim=2)[:, None]
    with torch.autocast(pixels.device.type, enabled=False):
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
