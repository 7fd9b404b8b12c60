"""Callables for an actor pool of Ray Data: batches with images in, scores or features out (needs the extra ``ray``).

ray.data.read_binary_files("images", include_paths=True).map_batches(
    ADPretrainScores,
    fn_constructor_kwargs={"bundle": "org/adpretrain-dinov2-large", "references": "screw.safetensors"},
    compute=ray.data.ActorPoolStrategy(size=8),
    num_gpus=1,
    batch_size=64,
).write_parquet("scores")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import ImageSource, decode_image
from adpretrain_hf.launch import default_device
from adpretrain_hf.named_images import reading_from
from adpretrain_hf.preprocessing import PreparedImage
from adpretrain_hf.scoring import anomaly_map, score_batch


class ADPretrainScores:
    """Adds to every batch the columns ``score`` and ``error``.

    An image that cannot be used has the score NaN, and the message as its error; for all others that is empty.

    Args:
        bundle: id of a repository, or a folder that every node sees.
        references: normal images (a folder or files) or the path of a saved bank.
        column: of the images: encoded bytes, paths, or arrays (H, W, 3) of uint8.
        batch_size: images at a time in the network, however many a batch of Ray holds.
        **from_pretrained: what ``ADPretrainFeatureExtractor.from_pretrained`` takes, such as ``variant`` and
            ``device``; by default the actor's GPU if it has one.
    """

    def __init__(
        self,
        bundle: str | Path,
        references: str | Path | Sequence[str | Path],
        *,
        column: str = "bytes",
        batch_size: int = 16,
        **from_pretrained: Any,
    ) -> None:
        from_pretrained.setdefault("device", default_device())
        extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, **from_pretrained)
        self.extractor = extractor.set_reference(references, batch_size=batch_size)
        self.column, self.batch_size = column, batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with its new columns.

        Raises:
            InputError: it has no column of that name.
        """
        if self.column not in batch:
            raise InputError(f"the batch has no column {self.column!r}, only {list(batch)}: give its name as `column`")
        named = [(_name(image, number), image) for number, image in enumerate(batch[self.column])]
        images = dict(named)
        errors: dict[str, str] = {}

        def note(name: str, error: ImageError) -> None:
            errors[name] = str(error)

        reader = reading_from(self.extractor, lambda name: _source(images[name], name))
        stream = reader.stream([name for name, _ in named], batch_size=self.batch_size, progress=False, on_error=note)
        rows = {image.name: self._row(image, features) for image, features in stream}
        found = [rows.get(name) or self._no_row() for name, _ in named]
        columns = {key: _column([row[key] for row in found]) for key in found[0]}
        return {**batch, **columns, "error": np.array([errors.get(name, "") for name, _ in named], dtype=object)}

    def _row(self, image: PreparedImage, features: dict[str, Tensor]) -> dict[str, np.ndarray]:
        maps = anomaly_map([level[None] for level in features.values()], image.network_size)
        (scored,) = score_batch([image], maps)
        return {"score": np.array(scored.score)}

    def _no_row(self) -> dict[str, np.ndarray]:
        return {"score": np.array(np.nan)}


class ADPretrainFeatures(ADPretrainScores):
    """Adds a column ``layer<n>`` (C, h, w) of float32 for every level as well; NaN where an image cannot be used."""

    def _row(self, image: PreparedImage, features: dict[str, Tensor]) -> dict[str, np.ndarray]:
        levels = {layer: level.float().numpy() for layer, level in features.items()}
        return super()._row(image, features) | levels

    def _no_row(self) -> dict[str, np.ndarray]:
        extractor = self.extractor
        shapes = ((c, extractor.image_size // r) for c, r in zip(extractor.out_dims, extractor.reductions, strict=True))
        levels = (np.full((c, side, side), np.nan, dtype=np.float32) for c, side in shapes)
        return super()._no_row() | dict(zip(extractor.layers, levels, strict=True))


def _name(image: Any, number: int) -> str:
    return str(image) if isinstance(image, str) else f"image {number} of the batch"


def _source(image: Any, name: str) -> ImageSource:
    return decode_image(image, name) if isinstance(image, bytes) else image


def _column(values: list[np.ndarray]) -> np.ndarray:
    """The values of a column as one array, of objects where their shapes differ."""
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
