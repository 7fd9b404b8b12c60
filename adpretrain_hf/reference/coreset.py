"""Choosing a few rows that stand for many: patches of a bank (a core-set, half of it at random), or whole images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_CANDIDATES = 256
_BLOCK = 4096  # at most as many similarities, squared, are in memory at a time: 64 MB


def choose_core(rows: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Chooses rows to which all others are near, by the angle between them.

    Greedy k-centre (Sener and Savarese, arXiv 1708.00489; the core-set of PatchCore) from a random half instead of one
    row. The random half follows the density of the rows and keeps the mean distance small, the greedy half takes what
    is rare and keeps the largest distance small.

    Args:
        rows: (N, C).
        count: how many, at most N.
        seed: of the random half.

    Returns:
        (count,), indices of different rows.
    """
    unit = F.normalize(rows.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    return _spread(unit, torch.randperm(len(unit), generator=generator)[: (count + 1) // 2].to(unit.device), count)


def describe_images(features: Sequence[Tensor]) -> Tensor:
    """What images are chosen by, their mean tokens: L maps (B, C, h, w) to (B, L * C), of each level of unit length."""
    means = [F.normalize(level.float(), dim=1).mean(dim=(2, 3)) for level in features]
    return torch.cat([F.normalize(mean, dim=1) for mean in means], dim=1)


def choose_images(descriptors: Tensor, count: int) -> Tensor:
    """Chooses images to which all others are near: greedy k-centre from the medoid, the one that is most like all.

    Args:
        descriptors: (N, C), one for each image, compared by their angles.
        count: how many; all where there are no more.

    Returns:
        (min(count, N),), indices of different images.
    """
    unit = F.normalize(descriptors.float(), dim=1)
    return _spread(unit, (unit @ unit.sum(dim=0)).argmax()[None], min(count, len(unit)))


def _spread(unit: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Adds to the chosen rows, one by one, the one that is farthest from all of them."""
    parts, closest = [chosen], unit.new_full((len(unit),), -torch.inf)
    while missing := count - sum(map(len, parts)):
        _note_chosen(closest, unit, parts[-1])
        parts.append(_farthest(unit, closest, missing))
    return torch.cat(parts)


def _note_chosen(closest: Tensor, unit: Tensor, chosen: Tensor) -> None:
    """Updates the largest similarity of every row to a chosen one; those of chosen rows are infinite."""
    for centers in unit[chosen].split(_BLOCK):
        for similar, rows in zip(closest.split(_BLOCK), unit.split(_BLOCK), strict=True):
            torch.maximum(similar, (rows @ centers.T).amax(dim=1), out=similar)
    closest[chosen] = torch.inf


def _farthest(unit: Tensor, closest: Tensor, limit: int) -> Tensor:
    """The next rows that the greedy rule takes, found among the farthest ones without a pass over all for each.

    Choosing a row only brings others nearer. A candidate that is still farther than the farthest of all others was
    before is therefore the farthest of all.
    """
    values, rows = closest.topk(min(_CANDIDATES + 1, len(closest)), largest=False)
    others = values[_CANDIDATES:].tolist() or [torch.inf]
    candidates = rows[:_CANDIDATES]
    similarities = unit[candidates] @ unit[candidates].T
    return candidates[_pick(similarities.cpu(), values[:_CANDIDATES].cpu(), others[0], limit)]


def _pick(similarities: Tensor, closest: Tensor, bound: float, limit: int) -> list[int]:
    """Picks the farthest of M rows, one after the other, as long as none elsewhere can be farther.

    Args:
        similarities: (M, M).
        closest: (M,), similarity to the nearest chosen row; infinite for rows that are chosen already.
        bound: the least of those of all other rows.
        limit: how many at most.
    """
    picked: list[int] = []
    while len(picked) < limit:
        row = int(closest.argmin())
        if picked and not closest[row] <= bound:
            break
        picked.append(row)
        closest = torch.maximum(closest, similarities[row])
        closest[row] = torch.inf
    return picked
