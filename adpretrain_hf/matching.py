"""The nearest reference patch of every token, and the residual against it (paper, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor

# One block of similarities is at most 2,048 x 4,096 floats, 32 MB, however many queries and references there are.
_QUERY_CHUNK, _REFERENCE_CHUNK = 2048, 4096
_GPU_BLOCK, _GPU_REFERENCES = 2**27, 32768  # 512 MB: a GPU is told of few, large products
_WINDOW_REFERENCES = 2**15  # of all windows of a batch together

_Nearest = tuple[Tensor, ...]  # the largest similarity and where it is, or nothing yet


def nearest_reference(
    queries: Tensor, references: Tensor, inverse_norms: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """Finds for every query the reference with the largest cosine similarity, the first one of equals.

    Memory is bounded: similarities are computed block by block, in float32. Of half precision a GPU's tensor cores
    multiply the values as they are, and add up in float32: products of two such values are exact there.

    Args:
        queries: (Q, C).
        references: (K, C).
        inverse_norms: (K,), one over the references' lengths, if known.
        hidden: (Q, 2), for each query the first of the references that it must not find, and the one after the last.

    Returns:
        (Q,), indices into the references.
    """
    if inverse_norms is None:
        inverse_norms = 1 / references.float().norm(dim=1).clamp_min(1e-12)
    height, width = _QUERY_CHUNK, _REFERENCE_CHUNK
    if queries.is_cuda:
        height, width = _GPU_BLOCK // min(len(references), _GPU_REFERENCES), _GPU_REFERENCES
    blocks = [slice(None)]  # in a graph, how many there are would fix the size of the batch
    if not torch.compiler.is_compiling():
        blocks = [slice(start, start + height) for start in range(0, max(1, len(queries)), height)]
    nearest: list[_Nearest] = [()] * len(blocks)
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(references), width):
            part, lengths = references[start : start + width], inverse_norms[start : start + width]
            similarities_of = _similarities(part, lengths, queries)
            for block, rows in enumerate(blocks):
                similarities = _hide(similarities_of(queries[rows]), start, None if hidden is None else hidden[rows])
                nearest[block] = _nearer(similarities, start, nearest[block])
    return torch.cat([index for _, index in nearest])


def nearest_of_window(
    queries: Tensor, references: Tensor, inverse_norms: Tensor, windows: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """Like ``nearest_reference`` for images of which each is a window, and is compared with that window's references.

    Args:
        queries: (B, Q, C).
        references: (T, K, C), those of T windows.
        inverse_norms: (T, K), one over their lengths.
        windows: (B,), which of the windows each image is.
        hidden: (B, 2), for each image the first of its window's references that it must not find, and the one after the
            last.

    Returns:
        (B, Q), indices into the references of all windows, one after the other.
    """
    nearest: _Nearest = ()
    number, width = references.shape[1], max(1, _WINDOW_REFERENCES // len(queries))
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, number, width):
            part = slice(start, start + width)
            unit = references[windows, part].float() * inverse_norms[windows, part, None]
            similarities = _hide(queries.float() @ unit.mT, start, None if hidden is None else hidden[:, None])
            nearest = _nearer(similarities, start, nearest)
    return nearest[1] + number * windows[:, None]


def _hide(similarities: Tensor, start: int, hidden: Tensor | None) -> Tensor:
    """Similarities (..., k) to references from the one at ``start`` on, without those that are hidden, (..., 2)."""
    if hidden is None:
        return similarities
    places = torch.arange(start, start + similarities.shape[-1], device=hidden.device)
    return similarities.masked_fill_((places >= hidden[..., :1]) & (places < hidden[..., 1:]), -torch.inf)


def _nearer(similarities: Tensor, start: int, before: _Nearest) -> _Nearest:
    """The nearest of some references from the one at ``start`` on, by their similarities (..., k), and of those before.

    The length of a query is in none of them, for it does not change which reference is nearest to it.
    """
    similarity, index = similarities.max(dim=-1)
    if not before:
        return similarity, index
    better = similarity > before[0]
    return torch.where(better, similarity, before[0]), torch.where(better, index + start, before[1])


def _similarities(references: Tensor, inverse_norms: Tensor, queries: Tensor) -> Callable[[Tensor], Tensor]:
    """What compares queries (q, C) with references (k, C), in float32: (q, k)."""
    if queries.is_cuda and queries.dtype == references.dtype and queries.dtype.itemsize == 2:
        return lambda rows: torch.mm(rows, references.T, out_dtype=torch.float32).mul_(inverse_norms)
    unit = (references.float() * inverse_norms[:, None]).T
    return lambda rows: rows.float() @ unit


def nearest_residual(
    features: Tensor,
    references: Tensor,
    inverse_norms: Tensor | None = None,
    hidden: Tensor | None = None,
    windows: Tensor | None = None,
    number: int = 1,
) -> Tensor:
    """Subtracts from every token of one level its nearest reference (see ``ReferenceBank.residuals``); checks nothing.

    Args:
        features: (B, C, h, w).
        references: (K, C).
        inverse_norms: (K,), one over the references' lengths, if known.
        hidden: (B, 2), see ``nearest_reference``, for all patches of an image.
        windows: (B,), which window each image is, of those whose references lie one after the other; then the
            references' lengths must be known.
        number: how many windows there are.

    Returns:
        (B, C, h, w).
    """
    b, _, h, w = features.shape
    queries = to_rows(features)
    with torch.no_grad():
        if windows is not None and inverse_norms is not None:
            part, norms = references.unflatten(0, (number, -1)), inverse_norms.unflatten(0, (number, -1))
            index = nearest_of_window(queries.unflatten(0, (b, -1)), part, norms, windows, hidden).flatten()
        else:
            rows = None if hidden is None else hidden.repeat_interleave(h * w, dim=0)
            index = nearest_reference(queries, references, inverse_norms, rows)
    residual = queries - references[index].to(queries.dtype)
    return residual.view(b, h * w, -1).transpose(1, 2).unflatten(2, (h, w))


def to_rows(features: Tensor) -> Tensor:
    """The tokens of all images below each other: (B, C, h, w) -> (B*h*w, C)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)
