"""UniAD on our features: one model for all categories."""

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
from torch.nn import functional as F

from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, check_references, load_features
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.preparation import prepared_by
from adpretrain_hf.integrations.anomalib.uniad_model import UniadModel


class UniadDetector(nn.Module):
    """Features, the network that reconstructs them, and maps of what it could not.

    Args:
        features: of prepared images.
        reconstruct: the network.
    """

    def __init__(self, features: DetectorFeatures, reconstruct: UniadModel) -> None:
        super().__init__()
        self.feature_extractor = features
        self.reconstruct = reconstruct

    def joined(self, images: Tensor) -> Tensor:
        """Features of all levels, one after the other: (B, 3, H, W) to (B, L * C, h, w)."""
        return torch.cat(list(self.feature_extractor(images).values()), dim=1)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (B, 3, H, W) to maps (B, 1, H, W), up-sampled bilinearly, and their maxima (B,)."""
        distances = self.reconstruct.distances(self.joined(images))
        maps = F.interpolate(distances[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
        return InferenceBatch(pred_score=maps.amax(dim=(1, 2, 3)), anomaly_map=maps)


class ADPretrainUniad(ADPretrainDetector):
    """UniAD (You et al. 2022) on the features of a bundle, all levels joined, as published.

    An image's score is the maximum of its map, where UniAD's own code pools the map over 16 x 16 pixels first. How long
    is trained is the trainer's ``max_epochs`` (published: 1000); for some hundred steps, ``lr=3e-4`` learns faster.

    Where several categories are in the training data, take the references from all of them: a folder with images of
    each, or a number large enough. A patch then finds its nearest one among the references of all categories; the
    released code compares it with those of its own category only.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        variant: of the projectors.
        levels: block numbers, some of the bundle's; all by default.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, see ``DetectorFeatures``.
        references: how many normal training images to take, a folder of images, or a saved bank (``.safetensors``).
        hidden_dim, num_layers, jitter_scale: see ``UniadModel``.
        lr: learning rate of AdamW.
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
        hidden_dim: int = 256,
        num_layers: int = 4,
        jitter_scale: float = 20.0,
        lr: float = 0.0001,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_references(references)
        loaded = load_features(bundle, variant, features, levels)
        config = loaded.extractor.config
        super().__init__(
            pre_processor=prepared_by(pre_processor, config),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        side = config.image_size // config.patch_size
        network = UniadModel(
            sum(loaded.out_dims), (side, side), hidden_dim=hidden_dim, num_layers=num_layers, jitter_scale=jitter_scale
        )
        self.model = UniadDetector(loaded, network)
        self._lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the network that reconstructs."""
        return torch.optim.AdamW(self.model.reconstruct.parameters(), lr=self._lr, weight_decay=1e-4)

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Reconstructs normal features from jittered ones."""
        del args, kwargs
        loss = self.model.reconstruct.loss(self.model.joined(batch.image))
        self.log("train_loss", loss, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Adds maps and scores to the batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Gradients are clipped as published."""
        return {"gradient_clip_val": 0.1, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """It needs normal images only."""
        return LearningType.ONE_CLASS
