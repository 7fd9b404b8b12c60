"""ADPretrainDetector: what all detectors with our features have in common."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataset, Batch
from anomalib.models.components import AnomalibModule
from torch import Tensor, nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures

_LOG = logging.getLogger(__name__)


def load_features(
    bundle: str, variant: str | None, features: str, levels: Sequence[int] | None, last: int | None = None
) -> DetectorFeatures:
    """Loads a bundle as features for a detector.

    Args:
        bundle, variant: see ``ADPretrainFeatureExtractor.from_pretrained``.
        features, levels: see ``DetectorFeatures``.
        last: how many of the last levels to take where ``levels`` is None; all by default.

    Raises:
        InputError: ``bundle`` is not a string, or see there.
    """
    if not isinstance(bundle, str):
        # Checkpoints hold the arguments of a model as plain data.
        raise InputError(f"bundle is {bundle!r}, expected the id of a repository or a folder, as a string")
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, variant=variant)
    if levels is None and last is not None:
        levels = extractor.config.layers[-last:]
    return DetectorFeatures(extractor, features, levels)


class ADPretrainDetector(AnomalibModule):
    """A mixin for anomalib's models, first of the bases: sets the reference bank, before training if need be.

    Where the constructor's ``references`` is a number, so many normal images of the training data, spread evenly over
    it, become the references when training starts. A training image that is one of them is compared with the others.
    """

    _features_at = "model.feature_extractor"  # where in the model the features are

    @property
    def features(self) -> DetectorFeatures:
        """The features that the detector works on."""
        return cast(DetectorFeatures, self.get_submodule(self._features_at))

    def install_features(self, features: nn.Module) -> None:
        """Puts other features in place, such as ones that remember what they computed, with the same attributes."""
        self.set_submodule(self._features_at, features)

    def set_reference(self, references: Any, names: Sequence[str] = ()) -> None:
        """Sets the reference bank.

        Args:
            references: what ``ADPretrainFeatureExtractor.set_reference`` takes: a bank, its file, a folder, images.
            names: paths of the bank's images, in its order, by which training images that are among them are known.
        """
        self.features.set_reference(references, names)

    def on_train_start(self) -> None:
        """Sets the references, if none are."""
        super().on_train_start()
        self._ensure_reference()

    def on_validation_start(self) -> None:
        """Sets the references, if none are and they are files."""
        self._ensure_reference()
        super().on_validation_start()

    def on_test_start(self) -> None:
        """As before a validation."""
        self._ensure_reference()
        super().on_test_start()

    def on_predict_start(self) -> None:
        """As before a validation."""
        self._ensure_reference()
        super().on_predict_start()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Says which images of the batch are references."""
        del batch_idx
        self.features.note_own(batch.image_path or [])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Images that are tested are compared with all references."""
        del outputs, batch, batch_idx
        self.features.note_own([])

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Exports as anomalib does, for images of the bundle's size unless another one is given."""
        side = self.features.extractor.config.image_size
        # anomalib asks for opset 14, which today's exporter cannot write.
        return super().to_onnx(
            export_root, model_file_name, input_size or (side, side), **{"opset_version": 18} | kwargs
        )

    def _ensure_reference(self) -> None:
        if not self.features.needs_reference or self.features.extractor.reference is not None:
            return
        source = self.hparams["references"]
        if isinstance(source, str):
            self.set_reference(source)
        elif self.trainer.training:
            self.set_reference(*self._draw_references(self.trainer.train_dataloader.dataset, source))

    @torch.no_grad()
    def _draw_references(self, dataset: AnomalibDataset, number: int) -> tuple[Tensor, list[str]]:
        normal = [place for place, label in enumerate(dataset.samples.label_index) if label == 0]
        if not normal:
            raise InputError("the training data have no normal image to take as a reference")
        if len(normal) < number:
            _LOG.warning("%d references were asked for, the training data have %d normal images", number, len(normal))
        step = max(len(normal) / number, 1)
        items = [dataset[normal[int(place * step)]] for place in range(min(number, len(normal)))]
        images = torch.stack([self._prepare(item.image[None])[0] for item in items])
        return images.to(self.device), [str(item.image_path) for item in items]

    def _prepare(self, images: Tensor) -> Tensor:
        # anomalib does this in a hook of its batches, which these images do not pass through.
        return self.pre_processor.transform(images) if self.pre_processor else images


def check_references(references: int | str) -> int | str:
    """Returns the argument ``references`` of a detector.

    Raises:
        InputError: neither a positive number nor a string.
    """
    if isinstance(references, bool) or not isinstance(references, (int, str)) or references in (0, ""):
        raise InputError(
            f"references is {references!r}, expected how many normal training images to take, a folder of images, or "
            "a saved bank (.safetensors), as a number or string"
        )
    if isinstance(references, int) and references < 1:
        raise InputError(f"references is {references}, expected a number >= 1")
    return references
