"""The detectors: anomalib's own with our features in the place of their backbone's, and two that it does not have."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.models import Cflow, Glass, Padim, Patchcore
from anomalib.models.image.cflow.utils import cflow_head
from anomalib.models.image.glass.components import Preprocessing
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn
from typing_extensions import Unpack

from adpretrain_hf.errors import InputError, check_count, check_positive, whole_number
from adpretrain_hf.integrations.anomalib.core_set import CoreSet
from adpretrain_hf.integrations.anomalib.detector import ADPretrainDetector, DetectorArguments
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.uniad import UniadModel
from adpretrain_hf.reference import is_bank
from adpretrain_hf.scoring import Calibration, anomaly_map

# Stands in until ours is in its place: anomalib builds one by name.
_BACKBONE: dict[str, Any] = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False}


def _check(counts: dict[str, Any], positive: dict[str, Any]) -> None:
    for name, value in counts.items():
        check_count(name, value)
    for name, value in positive.items():
        check_positive(name, value)


class ADPretrainPatchcore(ADPretrainDetector, Patchcore):
    """anomalib's PatchCore (Roth et al. 2022) on the features of a bundle.

    Defaults are the published protocol: the variant ``"angle"``, the last 3 levels, 10 % of the patches, the nearest
    neighbour's distance, the maximum of the map as the image's score. Where anomalib differs, it stays as anomalib has
    it: the 3 x 3 neighbours of a patch are averaged for every channel and the levels are joined, where the released
    code pools the neighbours' values to 1024 dimensions per level and over levels; distances are not squared.

    Args:
        bundle, common: see ``ADPretrainDetector``.
        coreset_sampling_ratio: share of the patches that are kept, in (0, 1].
        num_neighbors: more than 1 weighs an image's score by its neighbours, as the original paper does.
    """

    _variant, _last_levels = "angle", 3

    def __init__(
        self,
        bundle: str,
        *,
        coreset_sampling_ratio: float = 0.1,
        num_neighbors: int = 1,
        **common: Unpack[DetectorArguments],
    ) -> None:
        check_positive("coreset_sampling_ratio", coreset_sampling_ratio, most=1)
        check_count("num_neighbors", num_neighbors)
        features, arguments = self.load(bundle, common)
        super().__init__(
            **_BACKBONE, coreset_sampling_ratio=coreset_sampling_ratio, num_neighbors=num_neighbors, **arguments
        )
        self.model.layers = features.layers
        self.install_features(features)

    def fit(self) -> None:
        """Chooses the core-set of the patches that training has collected."""
        patches = torch.vstack(self.model.embedding_store)
        self.model.embedding_store.clear()
        self.model.memory_bank = CoreSet(patches, self.coreset_sampling_ratio).sample_coreset()


class ADPretrainPadim(ADPretrainDetector, Padim):
    """anomalib's PaDiM (Defard et al. 2021) on the features of a bundle.

    The variant ``"angle"`` and all levels, as published. The released code takes the full covariance of each level's
    channels and averages the levels' distances; anomalib joins the levels and takes one covariance of ``n_features``
    channels drawn at random. That takes 4 bytes x h x w x n_features^2, and while fitting three times as much: at
    16 x 16 patches 67 MB for the 256 channels of the default, 9.7 GB for all 3,072 of a ViT-B's four levels.

    Args:
        bundle, common: see ``ADPretrainDetector``.
        n_features: channels that are drawn of those of all levels together; 256 by default, or all of fewer.
    """

    _variant = "angle"

    def __init__(self, bundle: str, *, n_features: int | None = None, **common: Unpack[DetectorArguments]) -> None:
        features, arguments = self.load(bundle, common)
        channels = sum(features.out_dims)
        number = min(256, channels) if n_features is None else n_features
        if not 0 < whole_number(number) <= channels:
            raise InputError(f"n_features is {number!r}, expected a number from 1 to the levels' {channels} channels")
        super().__init__(**_BACKBONE, n_features=1, **arguments)
        self.model.layers = features.layers
        self.install_features(features)
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


class ADPretrainCflow(ADPretrainDetector, Cflow):
    """anomalib's CFLOW (Gudovskiy et al. 2022) on the features of a bundle: one conditional flow for each level.

    Defaults are the published protocol: the variant ``"norm"``, the last 3 levels, 8 coupling blocks, learning rate
    1e-4; how long is trained is the trainer's ``max_epochs``. anomalib normalises a batch's likelihoods by its largest,
    so that scores depend on what else is in the batch: compare those of one batch size, or of single images.

    Args:
        bundle, common: see ``ADPretrainDetector``.
        fiber_batch_size: patches of a training step.
        condition_vector: length of the position's encoding, a multiple of 4.
        coupling_blocks, clamp_alpha, permute_soft, lr: see anomalib.
    """

    _last_levels, _features_at = 3, "model.encoder"

    def __init__(
        self,
        bundle: str,
        *,
        fiber_batch_size: int = 64,
        condition_vector: int = 128,
        coupling_blocks: int = 8,
        clamp_alpha: float = 1.9,
        permute_soft: bool = False,
        lr: float = 0.0001,
        **common: Unpack[DetectorArguments],
    ) -> None:
        own = {"fiber_batch_size": fiber_batch_size, "condition_vector": condition_vector}
        _check({**own, "coupling_blocks": coupling_blocks}, {"clamp_alpha": clamp_alpha, "lr": lr})
        if condition_vector % 4:
            raise InputError(f"condition_vector is {condition_vector}, expected a multiple of 4")
        features, arguments = self.load(bundle, common)
        super().__init__(**_BACKBONE, coupling_blocks=1, lr=lr, **own, **arguments)
        self.model.pool_layers, self.model.pool_dims = features.layers, features.out_dims
        self.model.anomaly_map_generator.pool_layers = features.layers
        flow = (condition_vector, coupling_blocks, clamp_alpha)
        self.model.decoders = nn.ModuleList(cflow_head(*flow, channels, permute_soft) for channels in features.out_dims)
        self.install_features(features)


class _UnitScale(nn.Module):
    """Brings embeddings (N, C) to a root mean square of 1, by a factor that is learnt from normal ones."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings * self.factor


class ADPretrainGlass(ADPretrainDetector, Glass):
    """anomalib's GLASS (Chen et al. 2024) on the features of a bundle.

    The variant ``"norm"`` and the last 2 levels, as published. A patch's embedding has as many channels as a level of
    ours, where the released code has 1536 for those of a WideResNet-50; how long is trained is the trainer's
    ``max_epochs`` (released: 640). anomalib computes the centre of the normal embeddings from images that are not
    normalised; here they are. GLASS adds noise of 0.015 to embeddings and moves them by distances up to 1, whatever
    their scale: here they are scaled to a root mean square of 1 over the training images. Pretrained features of the
    embedded bundle are a thirtieth of that long as they are, and the noise would be half of them.

    Args:
        bundle, common: see ``ADPretrainDetector``.
        anomaly_source_path: folder of textures (released: DTD) for synthetic anomalies, which anomalib downloads if it
            is missing; without one they are Perlin noise.
        discriminator_hidden: units of the discriminator's hidden layers.
        learning_rate: of the projection; the discriminator's is twice as large.
        step: gradient ascent steps of the global anomalies.
        svd: 1 for the hypersphere hypothesis, 0 for the manifold one.
    """

    _last_levels, _features_at, _square = 2, "model.forward_modules.feature_aggregator", True

    def __init__(
        self,
        bundle: str,
        *,
        anomaly_source_path: str | None = None,
        discriminator_hidden: int = 1024,
        learning_rate: float = 0.0001,
        step: int = 20,
        svd: int = 0,
        **common: Unpack[DetectorArguments],
    ) -> None:
        _check({"discriminator_hidden": discriminator_hidden, "step": step}, {"learning_rate": learning_rate})
        if svd not in (0, 1):
            raise InputError(f"svd is {svd!r}, expected 0 or 1")
        features, arguments = self.load(bundle, common)
        config, width = features.extractor.config, features.out_dims[0]
        arguments |= {"pretrain_embed_dim": width, "target_embed_dim": width} | _BACKBONE
        arguments |= {"anomaly_source_path": anomaly_source_path, "discriminator_hidden": discriminator_hidden}
        size = (config.image_size, config.image_size)
        super().__init__(input_shape=size, learning_rate=learning_rate, step=step, svd=svd, **arguments)
        # "Not pre-trained" kept anomalib from a download; to it, that means one that is trained.
        self.pre_trained = self.model.pre_trained = True
        self.model.forward_modules["preprocessing"] = Preprocessing(features.out_dims, width, patchsize=3)
        parts = self.model.forward_modules
        parts["preadapt_aggregator"] = nn.Sequential(parts["preadapt_aggregator"], _UnitScale())
        self.model.layers = features.layers
        self.install_features(features)
        self.model.register_buffer("_img_mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.model.register_buffer("_img_std", torch.tensor(config.std).view(1, 3, 1, 1))

    def on_train_epoch_start(self) -> None:
        """Computes the scale, once, and the centre of the normal embeddings, of images prepared as in training."""
        if self.current_epoch == 0:
            self._learn_scale()
        self.model.calculate_center(self._prepared_batches(), self.device)
        self.features.note_own([])

    @torch.no_grad()
    def _learn_scale(self) -> None:
        scale = self.model.forward_modules["preadapt_aggregator"][1]
        scale.factor.fill_(1)
        squares = [
            self.model.generate_embeddings(batch.image.to(self.device), evaluation=True)[0].square().mean(dim=1)
            for batch in self._prepared_batches()
        ]
        scale.factor.copy_(torch.cat(squares).mean().rsqrt())

    def _prepared_batches(self) -> Iterator[Batch]:
        for batch in self.trainer.train_dataloader:
            batch.image = self._prepare(batch.image, batch.image_path)
            self.features.note_own(batch.image_path or [""] * len(batch.image))
            yield batch


class MapModel(nn.Module):
    """Features, and what makes anomaly maps of them.

    Args:
        features: of prepared images.
        to_maps: features (B, C, h, w) of the levels and the images' size (H, W) to maps (B, H, W).
    """

    def __init__(self, features: DetectorFeatures, to_maps: Callable[[list[Tensor], tuple[int, int]], Tensor]) -> None:
        super().__init__()
        self.feature_extractor = features
        self.to_maps: Any = to_maps

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (B, 3, H, W) to maps (B, 1, H, W) and their scores (B,), as the reference says: by default maxima."""
        maps = self.to_maps(list(self.feature_extractor(images).values()), (images.shape[-2], images.shape[-1]))
        scores = self.feature_extractor.judgement.image_scores(maps)
        return InferenceBatch(pred_score=scores, anomaly_map=maps[:, None])


class ADPretrainFeatureNorm(ADPretrainDetector):
    """FeatureNorm (ADPretrain, section 4) on the features of a bundle: variant ``"norm"``, all levels, as published.

    ``Engine.fit`` takes the references from the training data and, as for every model, score ranges and thresholds from
    the validation data. With references from files, ``Engine.predict`` works without it.

    Where there are no anomalies to choose thresholds by, those of the reference's calibration hold; a score is 0.5
    at the threshold then, and 1 at twice as much. For images without a calibration, the thresholds come of comparing
    each with the others, unless there are normal images to validate on: anomalib takes the highest score of these.

    Args:
        bundle, common: see ``ADPretrainDetector``.
    """

    def __init__(self, bundle: str, **common: Unpack[DetectorArguments]) -> None:
        features, arguments = self.load(bundle, common)
        super().__init__(**arguments)
        self.model = MapModel(features, anomaly_map)

    def set_reference(self, references: Any, names: Sequence[str] = ()) -> None:
        """Sets the reference bank, see ``DetectorFeatures``, and by its calibration the thresholds."""
        super().set_reference(references, names)
        extractor, bank = self.features.extractor, self.features.extractor.reference
        is_images = isinstance(references, Tensor) or (isinstance(references, str) and not is_bank(references))
        if self.features.calibration is None and is_images and bank and bank.leaves_out and all(bank.images):
            extractor.reference = extractor.calibrate(bank, references)
        self._pass_thresholds(self.features.calibration)

    def on_validation_epoch_end(self) -> None:
        """Puts back the thresholds of a bank's calibration if there was no anomaly that better ones were chosen by."""
        known = self.features.calibration
        images = getattr(self.trainer.val_dataloaders, "dataset", None)
        if known and not known.approximate and not getattr(images, "has_anomalous", True):
            self._pass_thresholds(known)

    def _pass_thresholds(self, calibration: Calibration | None) -> None:
        if calibration is None or not isinstance(self.post_processor, PostProcessor):
            return
        values = {"_image_threshold": calibration.threshold(), "_pixel_threshold": calibration.pixel_threshold()}
        for kind in ("image", "pixel"):
            values |= {f"{kind}_min": 0.0, f"{kind}_max": 2 * values[f"_{kind}_threshold"]}
        state = {name: torch.tensor(value) for name, value in values.items()}
        self.post_processor.load_state_dict(state, strict=False)

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised."""

    def training_step(self, *_: Any) -> Tensor:
        """A loss that changes nothing, which Lightning asks for."""
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass, in which nothing happens."""
        return {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0, "devices": 1}


class ADPretrainUniad(ADPretrainDetector):
    """UniAD (You et al. 2022) on the features of a bundle: the variant ``"norm"``, all levels joined, as published.

    An image's score is the maximum of its map, where UniAD's own code pools the map over 16 x 16 pixels first. How long
    is trained is the trainer's ``max_epochs`` (published: 1000); for some hundred steps, ``lr=3e-4`` learns faster.

    Where several categories are in the training data, take the references from all of them: a folder with images of
    each, or a number large enough. A patch then finds its nearest one among the references of all categories; the
    released code compares it with those of its own category only.

    Args:
        bundle, common: see ``ADPretrainDetector``.
        hidden_dim, num_layers, jitter_scale: see ``UniadModel``.
        lr: learning rate of AdamW.
    """

    _square = True

    def __init__(
        self,
        bundle: str,
        *,
        hidden_dim: int = 256,
        num_layers: int = 4,
        jitter_scale: float = 20.0,
        lr: float = 0.0001,
        **common: Unpack[DetectorArguments],
    ) -> None:
        _check({"hidden_dim": hidden_dim, "num_layers": num_layers}, {"lr": lr})
        features, arguments = self.load(bundle, common)
        super().__init__(**arguments)
        config, channels = features.extractor.config, sum(features.out_dims)
        grid = (config.image_size // config.patch_size,) * 2
        network = UniadModel(channels, grid, hidden_dim=hidden_dim, num_layers=num_layers, jitter_scale=jitter_scale)
        self.model = MapModel(features, network)
        self._lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the network that reconstructs."""
        return torch.optim.AdamW(self.model.to_maps.parameters(), lr=self._lr, weight_decay=1e-4)

    def training_step(self, batch: Batch, *_: Any) -> Tensor:
        """Reconstructs normal features from jittered ones."""
        loss = self.model.to_maps.loss(list(self.features(batch.image).values()))
        self.log("train_loss", loss, on_epoch=True, prog_bar=True)
        return loss

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Gradients are clipped as published."""
        return {"gradient_clip_val": 0.1, "num_sanity_val_steps": 0}
