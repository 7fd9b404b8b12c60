"""The two losses of one level: directions apart (angle loss) and lengths apart (norm loss).

Both compute in float32 with autocast off, whatever they are given. Neither makes the host wait for the device: labels
come from masks and so normally lie on the CPU, where rows are looked up, and only their indices are sent to the device.
Labels that lie on a GPU are accepted, at the price of waiting for them.

Under P processes a loss is that of the patches of all. Each gives its own N patches and the labels of all P N, and
computes a P-th of the similarities. The value is that of the whole; the processes' gradients add up to the whole's.
DistributedDataParallel takes their mean, so the loss has to be multiplied by P before the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adpretrain_hf.errors import InputError
from training.distributed import exchange_rows, gather_rows, own_part, sum_of_all, world_size

_MIN_LENGTH = 1e-6  # a shorter vector has no direction, only rounding errors
_BLOCK = 2**24  # similarities at a time: 64 MB in float32
_MAX_EXPONENT = 20.0


def angle_loss(
    first: Tensor, second: Tensor, is_anomalous: Tensor, *, center: Tensor | None, temperature: float = 0.15
) -> Tensor:
    """Contrasts the directions of normal and anomalous patches (paper, section 3.4; released ``angle loss``).

    With ``z = normalize(e - c)``, the mean over all rows i of both views of
    ``logsumexp_k(z_i . z_k / t) - z_i . z_i' / t``, where k runs over the rows of the opposite label in both views and
    i' is the same patch in the other view. The positive pair is not in the denominator, as in the released code, so the
    loss can be negative.

    Only similarities between A anomalous and M normal rows are ever computed: 4 A M numbers rather than (2 N)^2. Above
    64 MB they are computed in blocks, and again in the backward pass, so that memory stays at a few blocks and O(N C).

    A batch without an anomalous or without a normal patch gives 0, with gradients of 0 (the released code replaces its
    -inf by 0 there). A patch at the centre itself has no direction: it counts with similarity 0 and gets no gradient.

    Args:
        first: (N, C), projected patches of one view.
        second: (N, C), the same patches in the other view.
        is_anomalous: (P N,), bool, best on the CPU.
        center: (C,), the level's normal centre c, or None for the origin.
        temperature: t.

    Returns:
        A float32 scalar.

    Raises:
        InputError: shapes that do not belong together, or labels that are not bool.
    """
    _check(first, is_anomalous)
    if second.shape != first.shape:
        raise InputError(f"got views of shapes {tuple(first.shape)} and {tuple(second.shape)}, expected equal ones")
    with torch.autocast(first.device.type, enabled=False):
        unit = [_directions(view, center) for view in (first, second)]
        if is_anomalous.all() or not is_anomalous.any():
            return 0 * torch.cat(unit).sum()
        views = exchange_rows(torch.stack(unit, dim=1)).unbind(1)
        anomalous, normal = (_rows(views, labels) for labels in (is_anomalous, ~is_anomalous))
        to_normal, to_anomalous = _log_sums(own_part(anomalous), normal, temperature)
        positive = (unit[0] * unit[1]).sum() / temperature
        return sum_of_all(to_normal / 2 - positive) / len(is_anomalous) + to_anomalous / (2 * len(is_anomalous))


def norm_loss(features: Tensor, is_anomalous: Tensor, *, r_max: float = 0.4, margin: float = 0.75) -> Tensor:
    """Pulls lengths of normal patches to a radius r, and anomalous ones beyond it (paper, section 3.4; released code).

    With ``A = sqrt(||e|| + 1) - 1`` (the paper writes ``||e||^2``) and ``r = min(0.9 min(A of anomalous), r_max)``,
    each term the mean over the patches that it applies to, of ``softplus(d) * exp(d)``, the exponential detached:
    normal with A > r (d = A - r), normal with A < 0.99 r (d = 0.99 r - A), anomalous with A < r + margin
    (d = r + margin - A).

    A term that no patch falls under is 0; without an anomalous patch r is r_max. The weight exp(d) is capped at
    exp(20), which the released code is not: they are equal up to a feature length of about 450, and beyond it the
    released weight overflows float32 in the end.

    Args:
        features: (N, C), projected patches.
        is_anomalous: (P N,), bool, on any device.
        r_max: largest radius.
        margin: between normal and anomalous patches, in A.

    Returns:
        A float32 scalar.

    Raises:
        InputError: shapes that do not belong together, or labels that are not bool.
    """
    _check(features, is_anomalous)
    anomalous = is_anomalous.to(features.device, non_blocking=True)
    with torch.autocast(features.device.type, enabled=False):
        length = gather_rows((features.float().norm(dim=1) + 1).sqrt() - 1)
        # Infinity, the minimum of none, leaves r_max.
        radius = 0.9 * length.detach().masked_fill(~anomalous, torch.inf).amin().clamp(max=r_max / 0.9)
        return (
            _weighted_mean(length - radius, ~anomalous & (length > radius))
            + _weighted_mean(0.99 * radius - length, ~anomalous & (length < 0.99 * radius))
            + _weighted_mean(radius + margin - length, anomalous & (length < radius + margin))
        )


def _check(features: Tensor, is_anomalous: Tensor) -> None:
    if features.ndim != 2 or is_anomalous.shape != (world_size() * len(features),) or not len(features):
        raise InputError(
            f"got features of shape {tuple(features.shape)} and labels of shape {tuple(is_anomalous.shape)}, expected "
            f"(N, C) and (P N,), N >= 1, from each of P = {world_size()} processes"
        )
    if is_anomalous.dtype != torch.bool:
        raise InputError(f"got labels of {is_anomalous.dtype}, expected torch.bool: compare the mask with 0 first")


def _directions(features: Tensor, center: Tensor | None) -> Tensor:
    """Unit vectors from the centre; 0 where there is none, as dividing by next to nothing would blow up gradients."""
    shifted = features.float() if center is None else features.float() - center.float()
    length = shifted.norm(dim=1, keepdim=True)
    return torch.where(length > _MIN_LENGTH, shifted, 0) / length.clamp_min(_MIN_LENGTH)


def _rows(views: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The rows of both views whose label is True, below each other."""
    index = labels.nonzero()[:, 0].to(views[0].device, non_blocking=True)
    return torch.cat([view.index_select(0, index) for view in views])


def _log_sums(anomalous: Tensor, normal: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums of the rows' logsumexps of their similarities to the rows of the other label.

    Args:
        anomalous: (A, C), this process's part of them.
        normal: (M, C), all.
        temperature: divides the similarities.

    Returns:
        The sum over these anomalous rows, and the sum over all normal rows, to the anomalous rows of all processes.
    """
    blocks = anomalous.split(max(1, _BLOCK // len(normal)))
    if len(blocks) == 1:
        parts = [_similarity_log_sums(anomalous, normal, temperature)]
    else:
        parts = [
            checkpoint(_similarity_log_sums, block, normal, temperature, use_reentrant=False, preserve_rng_state=False)
            for block in blocks
        ]
    to_normal, to_anomalous = zip(*parts, strict=True)
    of_all = gather_rows(torch.stack(to_anomalous).logsumexp(dim=0, keepdim=True))
    return torch.cat(to_normal).sum(), of_all.logsumexp(dim=0).sum()


def _similarity_log_sums(anomalous: Tensor, normal: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    similarity = anomalous @ normal.T / temperature
    return similarity.logsumexp(dim=1), similarity.logsumexp(dim=0)


def _weighted_mean(distance: Tensor, applies: Tensor) -> Tensor:
    weight = distance.detach().clamp(max=_MAX_EXPONENT).exp()
    return torch.where(applies, F.softplus(distance) * weight, 0).sum() / applies.sum().clamp_min(1)
