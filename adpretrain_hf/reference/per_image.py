"""Residuals of a batch whose images have banks of their own."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import to_device
from adpretrain_hf.reference.bank import ReferenceBank


def residuals_per_image(
    features: Sequence[Tensor],
    banks: Sequence[ReferenceBank],
    levels: Sequence[int] | None = None,
    own: Sequence[int | None] = (),
    windows: Sequence[int] = (),
) -> list[Tensor]:
    """Residuals of a batch in which every image has its own bank, as where categories are mixed.

    Args:
        features: L maps (B, C, h, w).
        banks: B banks; one that several images share is matched once for all of them.
        levels, own, windows: see ``ReferenceBank.residuals``.

    Returns:
        L maps (B, C, h, w).

    Raises:
        InputError: not one bank for each image.
    """
    if len(banks) != len(features[0]):
        raise InputError(f"got {len(banks)} reference banks for {len(features[0])} images, expected one for each")
    different = list({id(bank): bank for bank in banks}.values())
    if len(different) == 1:
        return banks[0].residuals(features, own, levels, windows)
    places = [[place for place, one in enumerate(banks) if one is bank] for bank in different]
    order = to_device(torch.tensor([*chain(*places)]), features[0].device, torch.long)  # once, and not waited for
    residuals = [torch.empty_like(level) for level in features]
    for bank, which, rows in zip(different, places, order.split([len(one) for one in places]), strict=True):
        hidden = [own[place] for place in which if own]
        parts = bank.residuals(
            [level[rows] for level in features], hidden, levels, [windows[place] for place in which if windows]
        )
        for level, part in zip(residuals, parts, strict=True):
            level[rows] = part
    return residuals
