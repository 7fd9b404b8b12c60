"""What a long run computes of every image, as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.scoring import ScoredImage

Result = dict[str, Tensor]
ResultStream = Generator[tuple[str, Result], None, None]


class Failure(TypedDict):
    """An image that could not be used: its name, and the message of the error."""

    image: str
    error: str


@dataclass(frozen=True)
class ResultKind:
    """One kind of results.

    Attributes:
        command: that makes them.
        stream: called with an extractor, images and the options of ``extractor.stream``, it yields the name and the
            result of every image.
    """

    command: str
    stream: Callable[..., ResultStream]


def _features(extractor: ADPretrainFeatureExtractor, images: Any, **options: Any) -> ResultStream:
    stream = extractor.stream(images, **options)
    return (
        (image.name, {layer: level.contiguous() for layer, level in features.items()}) for image, features in stream
    )


def _scores(extractor: ADPretrainFeatureExtractor, images: Any, **options: Any) -> ResultStream:
    return ((scored.image.name, _as_tensors(scored)) for scored in extractor.score_stream(images, **options))


def _as_tensors(scored: ScoredImage) -> Result:
    return {
        "map": scored.anomaly,
        "score": torch.tensor(scored.score, dtype=torch.float64),
        "size": torch.tensor(scored.image.size),
        "box": torch.tensor(scored.image.box),
    }


FEATURES = ResultKind("extract", _features)
"""Of every level ``layer<n>``, (C, h, w)."""

SCORES = ResultKind("score", _scores)
"""``map`` (H', W') at the size of the network's input; ``score``, its maximum; ``size``, H and W of the image; ``box``:
top, left, height and width of the part of the image that the map shows."""
