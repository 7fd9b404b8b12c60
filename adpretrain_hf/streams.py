"""Any number of images through an extractor, in bounded memory: ``extract`` and ``score``, and both as streams."""

import operator
from collections.abc import Callable, Generator, Iterator
from typing import Any, Optional, Union

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import OnError, PreparedBatches, PreparedImage, Preprocessor, stack, to_host
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, RunNotice
from adpretrain_hf.scoring import AnomalyScores, ScoredImage, anomaly_map, maps_of, score_batch

Batches = Iterator[tuple[list[PreparedImage], list[Tensor]]]


class StreamsMixin:
    """The part of ``ADPretrainFeatureExtractor`` that works through images batch by batch; the method is not here."""

    preprocess: Preprocessor
    projectors: Projectors
    layers: tuple[str, ...]
    encode: Callable[..., list[Tensor]]
    residuals: Callable[..., list[Tensor]]
    _require_reference: Callable[[], ReferenceBank]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.projectors.parameters()).device

    def extract(
        self, images: Any, *, batch_size: int = 16, progress: bool = True
    ) -> Generator[dict[str, Tensor], None, None]:
        """Extracts the features of any number of images, one after the other, in bounded memory.

        Args:
            images: a folder, paths, PIL images, arrays, an iterator of such, or a prepared float tensor (B, 3, H, W).
            batch_size: images at a time.
            progress: show a bar.

        Returns:
            An iterator with one ``{"layer<n>": (C, h, w)}`` for each image, in order, on the CPU.

        Raises:
            InputError: no reference is set, or a batch size that is not positive.
            ImageError: an image cannot be used.
        """
        stream = self.stream(images, batch_size=batch_size, progress=progress)
        return (features for _, features in stream)

    def stream(
        self, images: Any, *, batch_size: int = 16, progress: bool = True, on_error: Optional[OnError] = None
    ) -> Generator[tuple[PreparedImage, dict[str, Tensor]], None, None]:
        """Like ``extract``, with each image as it was prepared: its name, its size, and the part of it that was seen.

        Args:
            images, batch_size, progress: see ``extract``.
            on_error: called with the name and the error of an image that cannot be used, which is then left out; by
                default the error is raised.
        """
        batches = self.stream_batches(images, batch_size=batch_size, progress=progress, on_error=on_error)

        def own(level: Tensor) -> Tensor:
            # A view would keep the whole batch in memory, and in what is saved of it.
            return level.clone(memory_format=torch.contiguous_format)

        return (
            (image, {name: own(level[row]) for name, level in zip(self.layers, features, strict=True)})
            for batch, features in to_host(batches, self.device, batch_size)
            for row, image in enumerate(batch)
        )

    def score(
        self,
        images: Any,
        *,
        maps: bool = True,
        map_size: Optional[Union[int, tuple[int, int]]] = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> AnomalyScores:
        """Scores images by the norm of their features (FeatureNorm; paper, section 4).

        Args:
            images, batch_size, progress: see ``extract``.
            maps: False returns scores alone, in memory that does not grow with the images.
            map_size: H and W of all maps in pixels, or one number for both; the images' own by default. A map takes 4
                bytes a pixel: that of an image of 12 megapixels 48 MB, 100 of them 4.8 GB.

        Returns:
            Anomaly maps, (B, H, W) or a list of (H, W) where sizes differ, or None, and scores (B,), all on the CPU.
            What a centre crop cuts off has the value 0.

        Raises:
            InputError: no images, no reference is set, a ``map_size`` that is none, or NaN or infinite values in a
                prepared tensor.
            ImageError: an image cannot be used.
        """
        size = None if map_size is None else _size(map_size)
        results: list[ScoredImage] = []
        scores: list[float] = []
        for scored in self.score_stream(images, batch_size=batch_size, progress=progress):
            scores.append(scored.score)
            results += [scored] if maps else []
        if not scores:
            raise InputError("no images were given: expected at least one")
        return AnomalyScores(maps_of(results, size) if maps else None, torch.tensor(scores))

    def score_stream(
        self, images: Any, *, batch_size: int = 16, progress: bool = True, on_error: Optional[OnError] = None
    ) -> Generator[ScoredImage, None, None]:
        """Like ``score`` for any number of images, one after the other, in bounded memory.

        Args:
            images, batch_size, progress, on_error: see ``stream``.
        """
        batches = self.stream_batches(
            images, batch_size=batch_size, progress=progress, on_error=on_error, label="score"
        )
        maps = ((batch, [anomaly_map(features, batch[0].network_size)]) for batch, features in batches)
        return (
            scored for batch, (own,) in to_host(maps, self.device, batch_size) for scored in score_batch(batch, own)
        )

    def stream_batches(
        self,
        images: Any,
        *,
        batch_size: int = 16,
        progress: bool = True,
        on_error: Optional[OnError] = None,
        label: str = "extract",
    ) -> Batches:
        """Like ``stream``, batch by batch: the images and L maps (B, C, h, w), left on the extractor's device.

        Args:
            images, batch_size, progress, on_error: see ``stream``.
            label: of the bar.
        """
        reference = self._require_reference()  # now, not at the first image
        notice = RunNotice(reference)

        def project(batch: list[PreparedImage], features: list[Tensor]) -> list[Tensor]:
            return self.projectors(self.residuals(features, reference, own=notice.own(batch)))

        return self._encode_batches(
            PreparedBatches(images, self.preprocess, batch_size, on_error), progress, label, project
        )

    @torch.no_grad()
    def _encode_batches(
        self,
        batches: PreparedBatches,
        progress: bool,
        label: str,
        then: Callable[[list[PreparedImage], list[Tensor]], list[Tensor]] = lambda batch, features: features,
    ) -> Batches:
        with tqdm(total=batches.total, unit="image", desc=label, disable=not progress) as bar:
            for batch in batches:
                yield batch, then(batch, self.encode(stack(batch, self.device)))
                bar.update(len(batch))


def _size(map_size: Union[int, tuple[int, int]]) -> tuple[int, int]:
    sides = map_size if isinstance(map_size, (tuple, list)) else (map_size, map_size)
    try:
        height, width = map(operator.index, sides)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise InputError(f"map_size is {map_size!r}, expected an integer >= 1, or two: the height and the width")
    return height, width
