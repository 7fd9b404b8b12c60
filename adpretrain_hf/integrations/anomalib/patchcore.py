"""PatchCore on our features."""

from __future__ import annotations

from collections.abc import Sequence

from anomalib.metrics import Evaluator
from anomalib.models import Patchcore
from anomalib.visualization import Visualizer
from torch import nn

from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, check_references, load_features
from adpretrain_hf.integrations.anomalib.preparation import prepared_by


class ADPretrainPatchcore(ADPretrainDetector, Patchcore):
    """anomalib's PatchCore (Roth et al. 2022) on the features of a bundle.

    Defaults are the published protocol: the last 3 levels, 10 % of the patches, the nearest neighbour's distance, the
    maximum of the map as the image's score. Where anomalib differs, it stays as anomalib has it: the 3 x 3 neighbours
    of a patch are averaged for every channel and the levels are joined, where the released code pools the neighbours'
    values to 1024 dimensions per level and over levels; distances are not squared.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        variant: of the projectors.
        levels: block numbers, some of the bundle's; its last 3 by default.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, see ``DetectorFeatures``.
        references: how many normal training images to take, a folder of images, or a saved bank (``.safetensors``).
        coreset_sampling_ratio: share of the patches that are kept.
        num_neighbors: more than 1 weighs an image's score by its neighbours, as the original paper does.
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
        coreset_sampling_ratio: float = 0.1,
        num_neighbors: int = 1,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_references(references)
        loaded = load_features(bundle, variant, features, levels, last=3)
        super().__init__(
            backbone="resnet18",  # stands in until ours is in its place: anomalib builds one by name
            layers=["layer1"],
            pre_trained=False,
            coreset_sampling_ratio=coreset_sampling_ratio,
            num_neighbors=num_neighbors,
            pre_processor=prepared_by(pre_processor, loaded.extractor.config),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model.layers = loaded.layers
        self.install_features(loaded)
