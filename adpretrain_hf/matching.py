"""The nearest reference patch of every token, and the residual against it (paper, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor

# One block of similarities is at most 2,048 x 4,096 floats, 32 MB, however many queries and references there are.
_QUERY_CHUNK, _REFERENCE_CHUNK = 2048, 4096
_GPU_BLOCK, _GPU_REFERENCES = 2**27, 32768  # 512 MB: a GPU is told of few, large products


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
    # The length of a query does not change which reference is nearest to it.
    best = queries.new_full(queries.shape[:1], -torch.inf, dtype=torch.float32)
    index = torch.zeros(queries.shape[:1], dtype=torch.long, device=queries.device)
    height, width = _QUERY_CHUNK, _REFERENCE_CHUNK
    if queries.is_cuda:
        height, width = _GPU_BLOCK // min(len(references), _GPU_REFERENCES), _GPU_REFERENCES
    blocks = [slice(None)]  # in a graph, how many there are would fix the size of the batch
    if not torch.compiler.is_compiling():
        blocks = [slice(start, start + height) for start in range(0, len(queries), height)]
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(references), width):
            part, lengths = references[start : start + width], inverse_norms[start : start + width]
            similarities_of = _similarities(part, lengths, queries)
            for rows in blocks:
                similarities = similarities_of(queries[rows])
                if hidden is not None:
                    first, end = hidden[rows, :1], hidden[rows, 1:]
                    places = torch.arange(start, start + len(part), device=hidden.device)
                    similarities.masked_fill_((places >= first) & (places < end), -torch.inf)
                similarity, where = similarities.max(dim=1)
                better = similarity > best[rows]
                best[rows] = torch.where(better, similarity, best[rows])
                index[rows] = torch.where(better, where + start, index[rows])
    return index


def _similarities(references: Tensor, inverse_norms: Tensor, queries: Tensor) -> Callable[[Tensor], Tensor]:
    """What compares queries (q, C) with references (k, C), in float32: (q, k)."""
    if queries.is_cuda and queries.dtype == references.dtype and queries.dtype.itemsize == 2:
        return lambda rows: torch.mm(rows, references.T, out_dtype=torch.float32).mul_(inverse_norms)
    unit = (references.float() * inverse_norms[:, None]).T
    return lambda rows: rows.float() @ unit


def nearest_residual(
    features: Tensor, references: Tensor, inverse_norms: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """Subtracts from every token of one level its nearest reference (see ``ReferenceBank.residuals``); checks nothing.

    Args:
        features: (B, C, h, w).
        references: (K, C).
        inverse_norms: (K,), one over the references' lengths, if known.
        hidden: (B, 2), see ``nearest_reference``, for all patches of an image.

    Returns:
        (B, C, h, w).
    """
    b, _, h, w = features.shape
    queries = to_rows(features)
    with torch.no_grad():
        rows = None if hidden is None else hidden.repeat_interleave(h * w, dim=0)
        index = nearest_reference(queries, references, inverse_norms, rows)
    residual = queries - references[index].to(queries.dtype)
    return residual.view(b, h * w, -1).transpose(1, 2).unflatten(2, (h, w))


def to_rows(features: Tensor) -> Tensor:
    """The tokens of all images below each other: (B, C, h, w) -> (B*h*w, C)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)
