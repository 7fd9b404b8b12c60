"""CFLOW on our features."""

from __future__ import annotations

from collections.abc import Sequence

from anomalib.metrics import Evaluator
from anomalib.models import Cflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.cflow.utils import cflow_head
from anomalib.visualization import Visualizer
from torch import nn

from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, check_references, load_features
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.preparation import prepared_by


class ADPretrainCflow(ADPretrainDetector, Cflow):
    """anomalib's CFLOW (Gudovskiy et al. 2022) on the features of a bundle: one conditional flow for each level.

    Defaults are the published protocol: the last 3 levels, 8 coupling blocks, learning rate 1e-4; how long is trained
    is the trainer's ``max_epochs``. anomalib normalises a batch's likelihoods by its largest, so that scores depend on
    what else is in the batch: compare those of one batch size, or of single images.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        variant: of the projectors.
        levels: block numbers, some of the bundle's; its last 3 by default.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, see ``DetectorFeatures``.
        references: how many normal training images to take, a folder of images, or a saved bank (``.safetensors``).
        fiber_batch_size: patches of a training step.
        condition_vector: length of the position's encoding, a multiple of 4.
        coupling_blocks, clamp_alpha, permute_soft, lr: see anomalib.
        pre_processor, post_processor, evaluator, visualizer: see anomalib; the pre-processor is the bundle's.

    Raises:
        InputError, BundleError: an argument is not as described, or the bundle cannot be loaded.
    """

    _features_at = "model.encoder"

    def __init__(
        self,
        bundle: str,
        *,
        variant: str | None = "norm",
        levels: Sequence[int] | None = None,
        features: str = "pretrained",
        references: int | str = 8,
        fiber_batch_size: int = 64,
        condition_vector: int = 128,
        coupling_blocks: int = 8,
        clamp_alpha: float = 1.9,
        permute_soft: bool = False,
        lr: float = 0.0001,
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
            fiber_batch_size=fiber_batch_size,
            condition_vector=condition_vector,
            coupling_blocks=1,
            lr=lr,
            pre_processor=prepared_by(pre_processor, loaded.extractor.config),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self._install_flows(self.model, loaded, coupling_blocks, clamp_alpha, permute_soft)

    def _install_flows(
        self, model: CflowModel, loaded: DetectorFeatures, coupling_blocks: int, clamp_alpha: float, permute_soft: bool
    ) -> None:
        """Puts our features and the flows that fit them where anomalib has those of its own backbone."""
        model.pool_layers, model.pool_dims = loaded.layers, loaded.out_dims
        model.anomaly_map_generator.pool_layers = loaded.layers
        model.decoders = nn.ModuleList(
            cflow_head(model.condition_vector, coupling_blocks, clamp_alpha, channels, permute_soft)
            for channels in loaded.out_dims
        )
        self.install_features(loaded)
