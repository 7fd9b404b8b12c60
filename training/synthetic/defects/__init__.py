"""Defects painted on any photograph, with the mask of the pixels that they changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from adpretrain_hf.errors import InputError
from training.synthetic.defects.bodies import damage, foreign, misplaced, missing
from training.synthetic.defects.films import abrasion, dent, fade, smear, stain
from training.synthetic.defects.job import Job, Layer
from training.synthetic.defects.lines import crack, pits, scratch, thread
from training.synthetic.noise import log_uniform

_PAINTERS: dict[str, Callable[[Job], Layer]] = {
    painter.__name__: painter
    for painter in (
        scratch, stain, foreign, missing, dent, abrasion, pits, damage, crack, thread, misplaced, fade, smear
    )
}  # fmt: skip

# Names of the families, and the folder that each has in RealIAD's layout: RealIAD's own codes where it has the kind.
_CODES = ("HS", "ZW", "YW", "QS", "BX", "CH", "AK", "PS", "LW", "MF", "CW", "TS", "YM")
FAMILIES: dict[str, str] = dict(zip(_PAINTERS, _CODES, strict=True))

MIN_SIDE = 64  # px: below, the smallest defects are a fraction of a pixel
AREAS = (0.001, 0.08)  # share of the image: a drop of 6 px to a palm of 40 px radius in 256 px
CONTRASTS = (0.06, 0.9)
GRACE = 3  # px around the mask within which the feathered edge of a defect may still change the image

_ALPHA_IN_MASK = 0.15  # below, the eye sees the surface and not the defect
_LEAST_CHANGE = 2.0  # grey levels: what the noise of a camera hides
_MEAN_CHANGE = 8.0  # grey levels, mean over the mask: a defect is at least this plain
_SMALLEST = 6  # px in a mask


def paint_defect(
    image: np.ndarray,
    family: str,
    rng: np.random.Generator,
    *,
    other: np.ndarray | None = None,
    where: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Paints one defect of random place, size (0.1 % to 8 % of the image) and contrast (subtle to plain).

    The same image, family and state of ``rng`` give the same pixels.

    Args:
        image: a photograph (H, W, 3) uint8, both sides at least 64 px; it is not changed.
        family: a name out of ``FAMILIES``.
        rng: all that is random comes from it.
        other: another photograph (h, w, 3) uint8 that foreign bodies may take their texture from.
        where: (H, W) bool, the pixels that may be the middle of the defect, e.g. the part; default is everywhere.

    Returns:
        The image with the defect (H, W, 3) uint8, and its mask (H, W) bool with at least one pixel. Farther than
        ``GRACE`` px from the mask the image is what it was.

    Raises:
        InputError: unknown family, or an array of another shape or type.
    """
    if family not in _PAINTERS:
        raise InputError(f"unknown defect family {family!r}: expected one of {', '.join(FAMILIES)}")
    _check_photograph(image, "image", MIN_SIDE)
    _check_photograph(image if other is None else other, "other", 1)
    if where is not None and (where.shape != image.shape[:2] or where.dtype != bool):
        raise InputError(f"where: expected {image.shape[:2]} bool, got {where.shape} {where.dtype}")
    while True:  # a shape that happens to fall out of the image or on pixels of its own colour is drawn anew
        painted, mask = _compose(image, _PAINTERS[family](_job(image, other, where, rng)))
        if mask.sum() >= _SMALLEST:
            return painted, mask


def _check_photograph(image: np.ndarray, name: str, least: int) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < least:
        expected = f"(H, W, 3) uint8 with both sides at least {least} px"
        raise InputError(f"{name}: expected {expected}, got {image.shape} {image.dtype}")


def _job(image: np.ndarray, other: np.ndarray | None, where: np.ndarray | None, rng: np.random.Generator) -> Job:
    height, width = image.shape[:2]
    radius = float(np.sqrt(log_uniform(rng, *AREAS) * height * width / np.pi))
    allowed = np.flatnonzero(where) if where is not None else np.empty(0)
    if allowed.size:
        row, column = divmod(int(rng.choice(allowed)), width)
    else:
        row, column = (int(rng.integers(side // 16, side - side // 16)) for side in (height, width))
    contrast = log_uniform(rng, *CONTRASTS)
    return Job(image, image if other is None else other, (row, column), radius, contrast, rng)


def _compose(image: np.ndarray, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    shape = layer.shape
    before = shape.cut(image)
    inside = shape.alpha > _ALPHA_IN_MASK
    after = np.clip(before + (layer.content - before) * shape.alpha[..., None], 0, 255)
    after = _at_least_visible(before, after, inside, shape.alpha).astype(np.uint8)
    # A mask has no holes where the new pixels happen to equal the old ones, so the change is judged over 5 px.
    differs = np.abs(after - before).max(-1)
    inside &= ndimage.uniform_filter(differs, 5) >= _LEAST_CHANGE
    near = ndimage.maximum_filter(inside, 2 * GRACE - 1)
    height, width = inside.shape
    window = np.s_[shape.top : shape.top + height, shape.left : shape.left + width]
    painted, mask = image.copy(), np.zeros(image.shape[:2], bool)
    painted[window][near] = after[near]
    mask[window] = inside
    return painted, mask


def _at_least_visible(before: np.ndarray, after: np.ndarray, inside: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Adds an even shade where the defect would hardly be seen; a smear on a white wall is a change of nothing."""
    reached = float(np.abs(after - before).max(-1)[inside].mean()) if inside.any() else _MEAN_CHANGE
    if reached >= _MEAN_CHANGE:
        return after
    sign = -1.0 if float(before[inside].mean()) > 100 else 1.0
    drift = float((after - before)[inside].mean())  # may go the other way: then it is made up for
    return np.clip(after + np.float32(2 * _MEAN_CHANGE * sign - drift) * alpha[..., None], 0, 255)
