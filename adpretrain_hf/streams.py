"""Any number of images through an extractor, in bounded memory: ``extract`` and ``score``, and both as streams."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, Optional

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import OnError, PreparedBatches, PreparedImage, Preprocessor, by_image, stack, to_host
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, RunNotice
from adpretrain_hf.scoring import AnomalyScores, ScoredImage, anomaly_map, score_images

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
            batch_size: images at a time; where the reference has tiles, windows.
            progress: show a bar.

        Returns:
            An iterator with one ``{"layer<n>": (C, h, w)}`` for each image, in order, on the CPU. Where the reference
            has tiles, (T, C, h, w): those of the image's T windows, row by row.

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

        With tiles, ``image.windows.boxes`` tells where the windows lie, and there are no pixels.

        Args:
            images, batch_size, progress: see ``extract``.
            on_error: called with the name and the error of an image that cannot be used, which is then left out; by
                default the error is raised.
        """
        batches = self.stream_batches(images, batch_size=batch_size, progress=progress, on_error=on_error)

        images_alone = by_image(to_host(batches, self.device, batch_size))
        return ((image, dict(zip(self.layers, levels, strict=True))) for image, levels in images_alone)

    def score(self, images: Any, *, batch_size: int = 16, progress: bool = False) -> AnomalyScores:
        """Scores images by the norm of their features (FeatureNorm; paper, section 4).

        Args:
            images, batch_size, progress: see ``extract``.

        Returns:
            Anomaly maps at the images' own sizes, (B, H, W) or a list of (H, W) where sizes differ, and scores (B,),
            both on the CPU. What a centre crop cuts off has the value 0.

        Raises:
            InputError: no images, no reference is set, or NaN or infinite values in a prepared tensor.
            ImageError: an image cannot be used.
        """
        maps: list[Tensor] = []
        scores: list[float] = []
        for scored in self.score_stream(images, batch_size=batch_size, progress=progress):
            maps.append(scored.full_size_map())
            scores.append(scored.score)
        if not maps:
            raise InputError("no images were given: expected at least one")
        same_size = len({anomaly.shape for anomaly in maps}) == 1
        return AnomalyScores(torch.stack(maps) if same_size else maps, torch.tensor(scores))

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
        return (scored for scored, _ in score_images(to_host(maps, self.device, batch_size)))

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

        With tiles, the batches are of windows.

        Args:
            images, batch_size, progress, on_error: see ``stream``.
            label: of the bar.
        """
        reference = self._require_reference()  # now, not at the first image
        notice = RunNotice(reference)

        def project(batch: list[PreparedImage], features: list[Tensor]) -> list[Tensor]:
            windows = [image.place for image in batch]
            return self.projectors(self.residuals(features, reference, own=notice.own(batch), windows=windows))

        batches = PreparedBatches(images, self.preprocess, batch_size, on_error, reference.tiles, reference.grid)
        return self._encode_batches(batches, progress, label, project)

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
                bar.update(sum(image.is_last for image in batch))
