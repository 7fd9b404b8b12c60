"""PaDiM on our features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from anomalib.metrics import Evaluator
from anomalib.models import Padim
from anomalib.visualization import Visualizer
from torch import nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, check_references, load_features
from adpretrain_hf.integrations.anomalib.preparation import prepared_by

_CHANNELS = 256  # of the default


class ADPretrainPadim(ADPretrainDetector, Padim):
    """anomalib's PaDiM (Defard et al. 2021) on the features of a bundle.

    All levels, as published. The released code takes the full covariance of each level's channels and averages the
    levels' distances; anomalib joins the levels and takes one covariance of ``n_features`` channels drawn at random.
    That takes 4 bytes x h x w x n_features^2, and while fitting three times as much: at 16 x 16 patches 67 MB for the
    256 channels of the default, 9.7 GB for all 3,072 of a ViT-B's four levels.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        variant: of the projectors.
        levels: block numbers, some of the bundle's; all by default.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, see ``DetectorFeatures``.
        references: how many normal training images to take, a folder of images, or a saved bank (``.safetensors``).
        n_features: channels that are drawn of those of all levels together; 256 by default, or all of fewer.
        pre_processor, post_processor, evaluator, visualizer: see anomalib; the pre-processor is the bundle's.

    Raises:
        InputError, BundleError: an argument is not as described, or the bundle cannot be loaded.
    """

    def __init__(
        self,
        bundle: str,
        *,
        variant: str | None = "angle",
        levels: Sequence[int] | None = None,
        features: str = "pretrained",
        references: int | str = 8,
        n_features: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_references(references)
        loaded = load_features(bundle, variant, features, levels)
        super().__init__(
            backbone="resnet18",  # stands in until ours is in its place: anomalib builds one by name
            layers=["layer1"],
            pre_trained=False,
            n_features=1,
            pre_processor=prepared_by(pre_processor, loaded.extractor.config),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model.layers = loaded.layers
        self.install_features(loaded)
        self._draw_channels(n_features, sum(loaded.out_dims))

    def _draw_channels(self, number: int | None, channels: int) -> None:
        number = min(_CHANNELS, channels) if number is None else number
        if not 0 < number <= channels:
            raise InputError(f"n_features is {number}, expected a number from 1 to the levels' {channels} channels")
        self.model.n_features_original, self.model.n_features = channels, number
        self.model.register_buffer("idx", torch.randperm(channels)[:number])

    def fit(self) -> None:
        """Fits the Gaussians.

        Raises:
            InputError: a single training image, which has no covariance.
        """
        images = sum(len(embeddings) for embeddings in self.model.memory_bank)
        if images < 2:
            raise InputError(f"got {images} training image, expected at least 2: a covariance needs them")
        super().fit()
        # In the order of memory that a checkpoint has, or its products would round otherwise.
        self.model.gaussian.inv_covariance = self.model.gaussian.inv_covariance.contiguous()
