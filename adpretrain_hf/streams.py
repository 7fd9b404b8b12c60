"""Any number of images through an extractor, in bounded memory: ``extract``, ``score``, ``calibrate``, and streams."""

import logging
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from functools import partial
from typing import Any, Optional, Union

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from adpretrain_hf.cache import ParameterCache
from adpretrain_hf.errors import InputError, check_sides
from adpretrain_hf.files import combined_digest
from adpretrain_hf.images import OnError, PreparedBatches, PreparedImage, by_image, named_sources, stack, to_host
from adpretrain_hf.reference import (
    Banks,
    Batches,
    ReferenceBank,
    ReferenceImage,
    ReferencesMixin,
    RunNotice,
    check_category,
    copies_among,
    say,
)
from adpretrain_hf.scoring import (
    AnomalyScores,
    Calibration,
    Judgement,
    MapStack,
    ScoredImage,
    anomaly_map,
    rank_of_threshold,
    score_images,
)

_LOG = logging.getLogger(__name__)
Categories = Optional[Iterable[str]]


class StreamsMixin(ReferencesMixin):
    """The part of ``ADPretrainFeatureExtractor`` that works through images batch by batch; the method is not here."""

    _identity: ParameterCache[str]

    def extract(
        self,
        images: Any,
        *,
        references: Any = None,
        categories: Categories = None,
        layers: Optional[Sequence[str]] = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Generator[dict[str, Tensor], None, None]:
        """Extracts the features of any number of images, one after the other, in bounded memory.

        Args:
            images: a folder, paths, PIL images, arrays, an iterator of such, or a prepared float tensor (B, 3, H, W).
            references: what ``set_references`` takes, for this run; by default those that are set.
            categories: of the images, one for each in any iterable, or one text for all: which of several references
                each is compared with.
            layers: names of the levels that are wanted, in their order; see ``forward``.
            batch_size: images at a time; where the reference has tiles, windows.
            progress: show a bar.

        Returns:
            An iterator with one ``{"layer<n>": (C, h, w)}`` for each image, in order, on the CPU. Where the reference
            has tiles, (T, C, h, w): those of the image's T windows, row by row.

        Raises:
            InputError: no reference is set, none of an image's category, not one category for each image, or a batch
                size that is not positive.
            ImageError: an image cannot be used.
        """
        run: dict[str, Any] = {"references": references, "categories": categories, "layers": layers}
        stream = self.stream(images, **run, batch_size=batch_size, progress=progress)
        return (features for _, features in stream)

    def stream(
        self,
        images: Any,
        *,
        references: Any = None,
        categories: Categories = None,
        layers: Optional[Sequence[str]] = None,
        batch_size: int = 16,
        progress: bool = True,
        on_error: Optional[OnError] = None,
    ) -> Generator[tuple[PreparedImage, dict[str, Tensor]], None, None]:
        """Like ``extract``, with each image as it was prepared: its name, its size, and the part of it that was seen.

        With tiles, ``image.windows.boxes`` tells where the windows lie, and there are no pixels.

        Args:
            images, references, categories, layers, batch_size, progress: see ``extract``.
            on_error: called with the name and the error of an image that cannot be used, which is then left out; by
                default the error is raised.
        """
        run: dict[str, Any] = {"references": references, "categories": categories, "batch_size": batch_size}
        batches = self.stream_batches(images, **run, layers=layers, progress=progress, on_error=on_error)
        names = self.layers if layers is None else layers
        images_alone = by_image(to_host(batches, self.device, batch_size))
        return ((image, dict(zip(names, levels, strict=True))) for image, levels in images_alone)

    def score(
        self,
        images: Any,
        *,
        references: Any = None,
        categories: Categories = None,
        maps: bool = True,
        map_size: Optional[Union[int, tuple[int, int]]] = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> AnomalyScores:
        """Scores images by the norm of their features of all levels (FeatureNorm; paper, section 4).

        Args:
            images, references, categories, batch_size, progress: see ``extract``.
            maps: False returns scores alone, in memory that does not grow with the images.
            map_size: H and W of all maps in pixels, or one number for both; the images' own by default. A map takes 4
                bytes a pixel: that of an image of 12 megapixels 48 MB, 100 of them 4.8 GB.

        Returns:
            Anomaly maps, (B, H, W) or a list of (H, W) where sizes differ, or None, and scores (B,), all on the CPU.
            What a centre crop cuts off has the value 0. Decisions, where the reference has a calibration.

        Raises:
            InputError: no images, a ``map_size`` that is none, NaN or infinite values in a prepared tensor, or see
                ``extract``.
            ImageError: an image cannot be used.
        """
        if map_size is not None and not maps:
            raise InputError(f"map_size is {map_size!r}, and maps=False: expected one or the other")
        size = None if map_size is None else check_sides("map_size", map_size)
        found = MapStack()
        scores: list[float] = []
        calibrations: list[Calibration | None] = []
        products: list[str] = []
        run: dict[str, Any] = {"references": references, "categories": categories}
        for scored in self.score_stream(images, **run, batch_size=batch_size, progress=progress):
            scores.append(scored.score)
            calibrations.append(scored.judgement.calibration)
            products.append(scored.category)
            if maps:
                found.add(scored.map_at(size or scored.image.size))
        if not scores:
            raise InputError("no images were given: expected at least one")
        as_tensor = torch.tensor(scores, dtype=torch.float32)  # whatever torch's default is
        return AnomalyScores(found.maps() if maps else None, as_tensor, calibrations, products)

    def score_stream(
        self,
        images: Any,
        *,
        references: Any = None,
        categories: Categories = None,
        batch_size: int = 16,
        progress: bool = True,
        on_error: Optional[OnError] = None,
        label: str = "score",
    ) -> Generator[ScoredImage, None, None]:
        """Like ``score`` for any number of images, one after the other, in bounded memory.

        Args:
            images, references, categories, batch_size, progress, on_error, label: see ``stream_batches``.
        """
        banks, categories = self._matched(references, categories)
        judgements = {category: self._judgement_of(bank) for category, bank in banks.items()}
        run: dict[str, Any] = {"references": banks, "categories": categories, "batch_size": batch_size}
        batches = self.stream_batches(images, **run, progress=progress, on_error=on_error, label=label)
        maps = ((batch, [anomaly_map(features, batch[0].network_size)]) for batch, features in batches)
        return (scored for scored, _ in score_images(to_host(maps, self.device, batch_size), judgements, on_error))

    def stream_batches(
        self,
        images: Any,
        *,
        references: Any = None,
        categories: Categories = None,
        layers: Optional[Sequence[str]] = None,
        batch_size: int = 16,
        progress: bool = True,
        on_error: Optional[OnError] = None,
        label: str = "extract",
    ) -> Batches:
        """Like ``stream``, batch by batch: the images and L maps (B, C, h, w), left on the extractor's device.

        With tiles, the batches are of windows.

        Args:
            images, references, categories, layers, batch_size, progress, on_error: see ``stream``.
            label: of the bar.
        """
        banks, categories = self._matched(references, categories)  # now, not at the first image
        notice = RunNotice(banks)

        def project(batch: list[PreparedImage], features: list[Tensor]) -> list[Tensor]:
            windows = [image.place for image in batch]
            per_image = [banks[image.category] for image in batch]
            residuals = self.residuals(features, per_image, own=notice.own(batch), layers=layers, windows=windows)
            return self.projectors(residuals, places)

        places = self.config.places(layers)
        tiles = {category: (bank.tiles, bank.grid) for category, bank in banks.items() if bank.tiles}
        batches = PreparedBatches(images, self.preprocess, batch_size, on_error, categories, tiles)
        return self._encode_batches(batches, progress, label, project, partial(self.encode, layers=layers))

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
                (leave-one-out), and the calibration is approximate. Copies of one image count once, with a warning.
            false_alarms: the rate of decisions where none is given; the smallest that n images allow, but at least
                0.01, by default.
            batch_size, progress: see ``extract``.

        Raises:
            InputError: no images, a rate that they do not allow, or images that a compacted bank, or one of a single
                image, is made of.
            ImageError: an image cannot be used.
        """
        bank = self._check_bank(bank.judged(bank.judgement.calibrated(None)))
        if false_alarms is not None and (number := named_sources(normals)[1]) is not None:
            rank_of_threshold(false_alarms, number)  # before any is encoded
        images, scores, peaks, typical = list[ReferenceImage](), list[float](), list[float](), list[float]()
        run: dict[str, Any] = {"references": {bank.category: bank}, "batch_size": batch_size, "progress": progress}
        for scored in self.score_stream(normals, **run, label="calibrate"):
            images.append(ReferenceImage(scored.image.name, scored.image.digest))
            scores.append(scored.score)
            peaks.append(float(scored.anomaly.max()))
            inside = scored.anomaly[scored.anomaly > 0]  # it is 0 outside the region of interest
            typical.append(float(inside.median()) if len(inside) else 0.0)
        if not scores:
            raise InputError("no calibration images were given: expected normal images of the product")
        references = {image.digest for image in bank.images} - {""}
        for copy in reversed(copies_among(images, told=references)):
            for values in (images, scores, peaks, typical):
                del values[copy]
        own = any(image.digest in references for image in images)
        if own and not bank.leaves_out:
            raise InputError(
                "the calibration images are the reference's own, and it cannot leave one out: calibrate it with other "
                "normal images (a compacted bank and one of a single image have nothing else to compare them with)"
            )
        calibration = Calibration(
            tuple(scores),
            () if bank.judgement.image_score == "max" else tuple(peaks),
            typical=float(torch.tensor(typical).median()),
            made_by=self.scoring_identity,
            approximate=own,
            false_alarms=false_alarms,
        )
        if far := calibration.outliers:
            highest = images[scores.index(max(scores))].name
            text = "%d of %d calibration images score far above the others, the highest is %s: has it no defect?"
            _LOG.warning(text, far, len(scores), highest)
        return bank.judged(bank.judgement.calibrated(calibration))

    @property
    def scoring_identity(self) -> str:
        """16 hex digits for all that a score depends on beside the image and the bank's patches.

        That is what the patches depend on, the precision, the projectors and the factors of the residuals.
        """

        def identity() -> str:
            precision = next(self.projectors.parameters()).dtype
            settings = f"{self._stamp_of(self.config)} {precision} {self.config.residual_scale}".encode()
            return combined_digest([settings, *self.projectors.digests()])  # of 8-bit weights the stamp tells

        return self._identity.get(list(self.projectors.parameters()), identity)

    @property
    def judgements(self) -> dict[str, Judgement]:
        """How the products whose references are set are judged, by category."""
        return {category: self._judgement_of(bank) for category, bank in self.references.items()}

    def _judgement_of(self, bank: ReferenceBank) -> Judgement:
        """How a bank's product is judged; without its calibration where another extractor made that."""
        judgement = bank.judgement
        if judgement.calibration is None or judgement.calibration.made_by == self.scoring_identity:
            return judgement
        say(
            bank,
            "the reference's calibration was made by another extractor (projectors, precision and image size count): "
            "there are scores, and no decisions; calibrate it again",
        )
        return judgement.calibrated(None)

    def _matched(self, references: Any, categories: Categories) -> tuple[Banks, Iterable[str]]:
        """The banks of a run by category, and the categories of its images, each of which has a bank."""
        if references is None and categories is None:
            chosen, bank = self._require_chosen()
            return {chosen: bank}, chosen
        banks = self.references if references is None else self._as_banks(references)
        if categories is None:
            if len(banks) > 1:
                raise InputError(f"no categories were given: expected one for each image, of {', '.join(banks)}")
            categories = next(iter(banks))
        if isinstance(categories, str):
            return banks, check_category(categories, banks)
        each = (check_category(category, banks) for category in categories)
        return banks, list(each) if isinstance(categories, Sized) else each  # of a list before any image is read

    @torch.no_grad()
    def _encode_batches(
        self,
        batches: PreparedBatches,
        progress: bool,
        label: str,
        then: Callable[[list[PreparedImage], list[Tensor]], list[Tensor]] = lambda batch, features: features,
        encode: Optional[Callable[[Tensor], list[Tensor]]] = None,
    ) -> Batches:
        with tqdm(total=batches.total, unit="image", desc=label, disable=not progress) as bar:
            for batch in batches:
                yield batch, then(batch, (encode or self.encode)(stack(batch, self.device)))
                bar.update(sum(image.is_last for image in batch))
