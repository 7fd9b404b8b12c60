"""Any number of images through an extractor, in bounded memory: ``extract`` and ``score``, and both as streams."""

import copy
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any, Optional

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from adpretrain_hf.cache import ParameterCache
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.files import combined_digest, tensor_digest
from adpretrain_hf.images import OnError, PreparedBatches, PreparedImage, Preprocessor, stack, to_host
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, RunNotice
from adpretrain_hf.scoring import AnomalyScores, Calibration, Judgement, ScoredImage, anomaly_map, score_batch

_LOG = logging.getLogger(__name__)
Batches = Iterator[tuple[list[PreparedImage], list[Tensor]]]


class StreamsMixin:
    """The part of ``ADPretrainFeatureExtractor`` that works through images batch by batch; the method is not here."""

    config: ADPretrainConfig
    preprocess: Preprocessor
    projectors: Projectors
    reference: Optional[ReferenceBank]
    layers: tuple[str, ...]
    encode: Callable[..., list[Tensor]]
    residuals: Callable[..., list[Tensor]]
    is_quantized: bool
    _identity: ParameterCache[str]
    _check_bank: Callable[[ReferenceBank], ReferenceBank]
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

    def score(self, images: Any, *, batch_size: int = 16, progress: bool = False) -> AnomalyScores:
        """Scores images by the norm of their features (FeatureNorm; paper, section 4).

        Args:
            images, batch_size, progress: see ``extract``.

        Returns:
            Anomaly maps at the images' own sizes, (B, H, W) or a list of (H, W) where sizes differ, and scores (B,),
            both on the CPU. What a centre crop cuts off has the value 0. Decisions, if the reference has a calibration.

        Raises:
            InputError: no images, no reference is set, or NaN or infinite values in a prepared tensor.
            ImageError: an image cannot be used.
        """
        maps: list[Tensor] = []
        scores: list[float] = []
        calibrations: list[Calibration | None] = []
        for scored in self.score_stream(images, batch_size=batch_size, progress=progress):
            maps.append(scored.full_size_map())
            scores.append(scored.score)
            calibrations.append(scored.judgement.calibration)
        if not maps:
            raise InputError("no images were given: expected at least one")
        same_size = len({anomaly.shape for anomaly in maps}) == 1
        return AnomalyScores(torch.stack(maps) if same_size else maps, torch.tensor(scores), calibrations)

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
        judgement = self._judgement_of(self._require_reference())
        return (
            scored
            for batch, (own,) in to_host(maps, self.device, batch_size)
            for scored in score_batch(batch, own, judgement)
        )

    def calibrate(
        self,
        bank: ReferenceBank,
        normals: Any,
        *,
        false_alarms: Optional[float] = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> ReferenceBank:
        """The bank with what normal images score, so that a decision travels with it; see ``Calibration``.

        Args:
            bank: of the product.
            normals: other images of it without defects than the bank is made of, as ``extract`` takes them; n of them
                allow false-alarm rates from 1 / (n + 1) on. Images that are the bank's own are compared with its others
                (leave-one-out), and the calibration is approximate.
            false_alarms: the rate of decisions where none is given; the smallest that n images allow, but at least
                0.01, by default.
            batch_size, progress: see ``extract``.

        Raises:
            InputError: no images, a rate that they do not allow, or images that a compacted bank, or one of a single
                image, is made of.
            ImageError: an image cannot be used.
        """
        scorer = copy.copy(self)
        scorer.reference = bank = self._check_bank(bank.judged(bank.judgement.calibrated(None)))
        scores, peaks, typical, own = dict[str, float](), list[float](), list[float](), False
        for number, scored in enumerate(scorer.score_stream(normals, batch_size=batch_size, progress=progress)):
            scores[f"{scored.image.name} ({number})"] = scored.score
            peaks.append(float(scored.anomaly.max()))
            typical.append(float(scored.anomaly.median()))
            own |= scored.image.digest in bank.images and scored.image.digest != ""
        if not scores:
            raise InputError("no calibration images were given: expected normal images of the product")
        if own and not bank.leaves_out:
            raise InputError(
                "the calibration images are the reference's own, and it cannot leave one out: calibrate it with other "
                "normal images (a compacted bank and one of a single image have nothing else to compare them with)"
            )
        calibration = Calibration(
            tuple(scores.values()),
            () if bank.judgement.image_score == "max" else tuple(peaks),
            typical=float(torch.tensor(typical).median()),
            made_by=self.scoring_identity,
            approximate=own,
            false_alarms=false_alarms,
        )
        if far := calibration.outliers:
            highest = max(scores, key=scores.__getitem__)
            text = "%d of %d calibration images score far above the others, the highest is %s: has it no defect?"
            _LOG.warning(text, far, len(scores), highest)
        return bank.judged(bank.judgement.calibrated(calibration))

    @property
    def _fingerprint(self) -> str:
        """What reference patches are stamped with: those of 8-bit layers are far from the others, at any size."""
        return self.config.fingerprint + ("-int8" if self.is_quantized else "")

    @property
    def scoring_identity(self) -> str:
        """16 hex digits for all that a score depends on beside the image and the bank's patches.

        That is what the patches depend on, the precision, the projectors and the factors of the residuals.
        """

        def identity() -> str:
            # Weights that are packed in 8 bits are no tensors; the fingerprint tells of them.
            weights = (value for value in self.projectors.state_dict().values() if isinstance(value, Tensor))
            precision = next(self.projectors.parameters()).dtype
            settings = f"{self._fingerprint} {precision} {self.config.residual_scale}".encode()
            return combined_digest([settings, *map(tensor_digest, weights)])

        return self._identity.get(list(self.projectors.parameters()), identity)

    @property
    def judgement(self) -> Judgement:
        """How the product of the reference that is set is judged: what decisions are made by, if there are any."""
        return self._judgement_of(self._require_reference())

    def _judgement_of(self, bank: ReferenceBank) -> Judgement:
        """How the bank's product is judged; without its calibration where another extractor made that."""
        calibration = bank.judgement.calibration
        if calibration is None or calibration.made_by == self.scoring_identity:
            return bank.judgement
        RunNotice(bank).say(
            "the reference's calibration was made by another extractor (projectors, precision and image size count): "
            "there are scores, and no decisions; calibrate it again"
        )
        return bank.judgement.calibrated(None)

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
