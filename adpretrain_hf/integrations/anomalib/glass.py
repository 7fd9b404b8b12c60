"""GLASS on our features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models import Glass
from anomalib.models.image.glass.components import Preprocessing
from anomalib.visualization import Visualizer
from torch import nn

from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, check_references, load_features
from adpretrain_hf.integrations.anomalib.preparation import prepared_by


class ADPretrainGlass(ADPretrainDetector, Glass):
    """anomalib's GLASS (Chen et al. 2024) on the features of a bundle.

    The last 2 levels, as published. A patch's embedding has as many channels as a level of ours, where the released
    code has 1536 for those of a WideResNet-50; how long is trained is the trainer's ``max_epochs`` (released: 640).
    anomalib computes the centre of the normal embeddings from images that are not normalised; here they are.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        variant: of the projectors.
        levels: block numbers, some of the bundle's; its last 2 by default.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, see ``DetectorFeatures``.
        references: how many normal training images to take, a folder of images, or a saved bank (``.safetensors``).
        anomaly_source_path: folder of textures (released: DTD) for synthetic anomalies, which anomalib downloads if it
            is missing; without one they are Perlin noise.
        discriminator_hidden: units of the discriminator's hidden layers.
        learning_rate: of the projection; the discriminator's is twice as large.
        step: gradient ascent steps of the global anomalies.
        svd: 1 for the hypersphere hypothesis, 0 for the manifold one.
        pre_processor, post_processor, evaluator, visualizer: see anomalib; the pre-processor is the bundle's.

    Raises:
        InputError, BundleError: an argument is not as described, or the bundle cannot be loaded.
    """

    _features_at = "model.forward_modules.feature_aggregator"

    def __init__(
        self,
        bundle: str,
        *,
        variant: str | None = "norm",
        levels: Sequence[int] | None = None,
        features: str = "pretrained",
        references: int | str = 8,
        anomaly_source_path: str | None = None,
        discriminator_hidden: int = 1024,
        learning_rate: float = 0.0001,
        step: int = 20,
        svd: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_references(references)
        loaded = load_features(bundle, variant, features, levels, last=2)
        config, width = loaded.extractor.config, loaded.out_dims[0]
        super().__init__(
            input_shape=(config.image_size, config.image_size),
            anomaly_source_path=anomaly_source_path,
            backbone="resnet18",  # stands in until ours is in its place: anomalib builds one by name
            layers=["layer1"],
            pre_trained=False,
            pretrain_embed_dim=width,
            target_embed_dim=width,
            discriminator_hidden=discriminator_hidden,
            learning_rate=learning_rate,
            step=step,
            svd=svd,
            pre_processor=prepared_by(pre_processor, config),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self._freeze_backbone()
        aggregators = self.model.forward_modules
        aggregators["preprocessing"] = Preprocessing(loaded.out_dims, width, patchsize=3)
        self.model.layers = loaded.layers
        self.install_features(loaded)
        self.model.register_buffer("_img_mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.model.register_buffer("_img_std", torch.tensor(config.std).view(1, 3, 1, 1))

    def _freeze_backbone(self) -> None:
        # "Not pre-trained" kept anomalib from a download; to it, that means one that is trained.
        self.pre_trained = self.model.pre_trained = True

    def on_train_epoch_start(self) -> None:
        """Computes the centre of the normal embeddings, of images prepared as in training."""
        self.model.calculate_center(self._prepared_batches(), self.device)
        self.features.note_own([])

    def _prepared_batches(self) -> Iterator[Batch]:
        for batch in self.trainer.train_dataloader:
            batch.image = self._prepare(batch.image)
            self.features.note_own(batch.image_path or [])
            yield batch
