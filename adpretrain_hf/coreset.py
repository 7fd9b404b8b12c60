"""Choosing a few rows that stand for many: a core-set, half of it drawn at random, half as far from it as can be."""

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
    chosen = torch.randperm(len(unit), generator=generator)[: (count + 1) // 2].to(unit.device)
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
