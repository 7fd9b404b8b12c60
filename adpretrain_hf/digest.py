"""Short identities of tensors and modules, equal whatever precision they are loaded in without loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

_SAMPLE = 4096


def tensor_digest(tensor: Tensor) -> bytes:
    """The identity of one tensor: of its shape and of up to 4,096 of its values, evenly spread.

    float16 and its float32 copy have the same one. It tells trainings apart and costs next to nothing; it is no
    checksum against damage.
    """
    values = tensor.detach().flatten()
    sample = values[:: max(1, values.numel() // _SAMPLE)]
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(sample.float().cpu().contiguous().numpy().data)
    return digest.digest()


def combined_digest(digests: Iterable[bytes]) -> str:
    """16 hex digits for several identities in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]
