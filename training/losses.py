"""The two losses of one level: directions apart (angle loss) and lengths apart (norm loss).

Both compute in float32 with autocast off, whatever they are given. Neither makes the host wait for the device: labels
come from masks and so normally lie on the CPU, where rows are looked up, and only their indices are sent to the device.
Labels that lie on a GPU are accepted, at the price of waiting for them.

Under P processes a loss is that of the patches of all. Each gives its own N patches and the labels of all P N, and
computes a P-th of the similarities. The value is that of the whole; the processes' gradients add up to the whole's.
DistributedDataParallel takes their mean, so the loss has to be multiplied by P before the backward pass.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adpretrain_hf.images import to_device
from adpretrain_hf.matching import to_rows
from training.run.distributed import exchange_rows, gather_rows, rank, sum_of_all, world_size

_MIN_LENGTH = 1e-6  # a shorter vector has no direction, only rounding errors
_BLOCK = 2**24  # similarities at a time: 64 MB in float32
_MAX_EXPONENT = 20.0


def angle_loss(views: Tensor, rows: "Rows", center: Tensor | None, temperature: float = 0.15) -> Tensor:
    """Contrasts the directions of normal and anomalous patches (paper, section 3.4; released ``angle loss``).

    With ``z = normalize(e - c)``, the mean over all rows i of both views of
    ``logsumexp_k(z_i . z_k / t) - z_i . z_i' / t``, where k runs over the rows of the opposite label in both views and
    i' is the same patch in the other view. The positive pair is not in the denominator, as in the released code, so the
    loss can be negative.

    Only similarities between A anomalous and M normal rows are ever computed: 4 A M numbers rather than (2 N)^2. Above
    64 MB they are computed in blocks, and again in the backward pass, so that memory stays at a few blocks and O(N C).

    A batch without an anomalous or without a normal patch gives 0, with gradients of 0. (The released code replaces its
    -inf by 0 there, and passes such a batch over; here the norm loss has its step all the same.) A patch at the centre
    itself has no direction: it counts with similarity 0 and gets no gradient.

    Args:
        views: (2, N, C), projected patches of one view, and the same patches in the other.
        rows: which of them are compared.
        center: (C,), the level's normal centre c, or None for the origin.
        temperature: t.

    Returns:
        A float32 scalar.
    """
    with torch.autocast(views.device.type, enabled=False):
        unit = _directions(views, center)
        if not len(rows.anomalous) or not len(rows.normal):
            return 0 * unit.sum()
        of_all = exchange_rows(unit.transpose(0, 1))  # (P N, 2, C)
        anomalous, normal = (of_all.index_select(0, index).flatten(0, 1) for index in (rows.anomalous, rows.normal))
        own = anomalous.tensor_split(world_size())[rank()]
        to_normal, to_anomalous = _log_sums(own, normal, temperature)
        positive = ((unit[0] * unit[1]).sum(dim=1) * rows.counted).sum() / temperature
        return sum_of_all(to_normal / 2 - positive) / rows.number + to_anomalous / (2 * rows.number)


def norm_loss(lengths: Tensor, labels: Tensor, r_max: float = 0.4, margin: float = 0.75) -> Tensor:
    """Pulls lengths of normal patches to a radius r, and anomalous ones beyond it (paper, section 3.4; released code).

    With ``A = sqrt(||e|| + 1) - 1`` (the paper writes ``||e||^2``) and ``r = min(0.9 min(A of anomalous), r_max)``,
    each term the mean over the patches that it applies to, of ``softplus(d) * exp(d)``, the exponential detached:
    normal with A > r (d = A - r), normal with A < 0.99 r (d = 0.99 r - A), anomalous with A < r + margin
    (d = r + margin - A).

    A term that no patch falls under is 0; without an anomalous patch r is r_max. The weight exp(d) is capped at
    exp(20), which the released code is not: they are equal up to a feature length of about 450, and beyond it the
    released weight overflows float32 in the end.

    Args:
        lengths: (M, N), ``||e||`` of the patches of M views or levels, each of which has a loss of its own.
        labels: (P N,), uint8, of their patches: 0 normal, 1 anomalous, 2 ignored; on the same device.
        r_max: largest radius.
        margin: between normal and anomalous patches, in A.

    Returns:
        The sum of the M losses, a float32 scalar.
    """
    anomalous, normal = labels == 1, labels == 0
    length = gather_rows(((lengths + 1).sqrt() - 1).T).T  # (M, P N)
    # Infinity, the minimum of none, leaves r_max.
    nearest = length.detach().masked_fill(~anomalous, torch.inf).amin(dim=1, keepdim=True)
    radius = 0.9 * nearest.clamp(max=r_max / 0.9)
    distance = torch.stack([length - radius, 0.99 * radius - length, radius + margin - length])
    applies = (distance > 0) & torch.stack([normal, normal, anomalous])[:, None]
    weight = distance.detach().clamp(max=_MAX_EXPONENT).exp()
    total = torch.where(applies, F.softplus(distance) * weight, 0).sum(dim=2)
    return (total / applies.sum(dim=2).clamp_min(1)).sum()


def level_losses(
    features: Sequence[Tensor], labels: Tensor, centers: Tensor, *, temperature: float = 0.15, margin: float = 0.75
) -> tuple[Tensor, Tensor]:
    """Both losses, each summed over the levels, the norm loss over both views as well.

    Args:
        features: L maps (2 B, C, h, w), the first views before the second.
        labels: (2, B, h, w), uint8, of the patches for the angle and for the norm loss: 0 normal, 1 anomalous, 2
            ignored; on the CPU.
        centers: (L, C).
        temperature: of the angle loss.
        margin: of the norm loss.

    Returns:
        The angle loss and the norm loss, float32 scalars.
    """
    of_angle, of_norm = gather_rows(labels.flatten(1).T.contiguous()).unbind(1)  # (P N,) each
    device = features[0].device
    rows = Rows.of(of_angle, device)
    with torch.autocast(device.type, enabled=False):
        lengths = torch.cat([level.float().norm(dim=1).view(2, -1) for level in features])  # (2 L, N)
        norm = norm_loss(lengths, to_device(of_norm, device, torch.uint8), margin=margin)
    angle = torch.zeros((), device=device)
    for level, center in zip(features, centers, strict=True):
        angle = angle + angle_loss(to_rows(level).unflatten(0, (2, -1)), rows, center, temperature)
    return angle, norm


class Rows(NamedTuple):
    """Which patches the angle loss compares, looked up on the CPU, so that no GPU is waited for.

    Attributes:
        anomalous, normal: indices among the patches of all processes.
        counted: (N,), 1 for patches of this process that are one of both, else 0.
        number: of these, of all processes.
    """

    anomalous: Tensor
    normal: Tensor
    counted: Tensor
    number: int

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> "Rows":
        """Looks labels (P N,) up: uint8, 0 normal, 1 anomalous, 2 ignored; best on the CPU."""
        anomalous, normal = (to_device((labels == one).nonzero()[:, 0], device, torch.int64) for one in (1, 0))
        own = (labels < 2).view(world_size(), -1)[rank()]
        return cls(anomalous, normal, to_device(own, device, torch.float32), len(anomalous) + len(normal))


def _directions(features: Tensor, center: Tensor | None) -> Tensor:
    """Unit vectors from the centre; 0 where there is none, as dividing by next to nothing would blow up gradients."""
    shifted = features.float() if center is None else features.float() - center.float()
    length = shifted.norm(dim=-1, keepdim=True)
    return torch.where(length > _MIN_LENGTH, shifted, 0) / length.clamp_min(_MIN_LENGTH)


def _log_sums(anomalous: Tensor, normal: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums of the logsumexps of this process's anomalous rows (A, C) against all normal rows (M, C), and the reverse.

    The second sum is over the normal rows, against the anomalous rows of all processes.
    """
    blocks, compare = anomalous.split(max(1, _BLOCK // len(normal))), _similarity_log_sums
    if len(blocks) > 1:
        compare = partial(checkpoint, compare, use_reentrant=False, preserve_rng_state=False)
    to_normal, to_anomalous = zip(*(compare(block, normal, temperature) for block in blocks), strict=True)
    of_all = gather_rows(torch.stack(to_anomalous).logsumexp(dim=0, keepdim=True))
    return torch.cat(to_normal).sum(), of_all.logsumexp(dim=0).sum()


def _similarity_log_sums(anomalous: Tensor, normal: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    similarity = (anomalous / temperature) @ normal.T  # not the product, which is far larger
    return similarity.logsumexp(dim=1), similarity.logsumexp(dim=0)
