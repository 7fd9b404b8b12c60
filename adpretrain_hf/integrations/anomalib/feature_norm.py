"""FeatureNorm as an anomalib model: the length of a pretrained feature is the score; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, check_references, load_features
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.preparation import prepared_by
from adpretrain_hf.scoring import anomaly_map


class FeatureNormModel(nn.Module):
    """Features to anomaly maps and scores, as ``ADPretrainFeatureExtractor.score`` computes them.

    Args:
        features: of prepared images.
    """

    def __init__(self, features: DetectorFeatures) -> None:
        super().__init__()
        self.feature_extractor = features

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (B, 3, H, W) to maps (B, 1, H, W) and their maxima (B,)."""
        maps = anomaly_map(list(self.feature_extractor(images).values()), (images.shape[-2], images.shape[-1]))
        return InferenceBatch(pred_score=maps.amax(dim=(1, 2)), anomaly_map=maps[:, None])


class ADPretrainFeatureNorm(ADPretrainDetector):
    """FeatureNorm (ADPretrain, section 4) on the features of a bundle, all levels, as published.

    ``Engine.fit`` takes the references from the training data and, as for every model, score ranges and thresholds from
    the validation data. With references from files, ``Engine.predict`` works without it.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        variant: of the projectors.
        levels: block numbers, some of the bundle's; all by default.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, see ``DetectorFeatures``.
        references: how many normal training images to take, a folder of images, or a saved bank (``.safetensors``).
        pre_processor, post_processor, evaluator, visualizer: see anomalib; the pre-processor is the bundle's.

    Raises:
        InputError, BundleError: an argument is not as described, or the bundle cannot be loaded.
    """

    def __init__(
        self,
        bundle: str,
        *,
        variant: str | None = "norm",
        levels: Sequence[int] | None = None,
        features: str = "pretrained",
        references: int | str = 8,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_references(references)
        loaded = load_features(bundle, variant, features, levels)
        super().__init__(
            pre_processor=prepared_by(pre_processor, loaded.extractor.config),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = FeatureNormModel(loaded)

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised."""

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """A loss that changes nothing, which Lightning asks for."""
        del batch, args, kwargs
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Adds maps and scores to the batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass, in which nothing happens."""
        return {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """It needs normal images only."""
        return LearningType.ONE_CLASS
