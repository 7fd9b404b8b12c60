"""ADPretrainDetector: what all detectors with our features have in common."""

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataset, Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from adpretrain_hf.bundle import describe_bundle, variants_among
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.pre_processor import ADPretrainPreProcessor

_LOG = logging.getLogger(__name__)


class DetectorArguments(TypedDict):
    """What every detector takes beside its bundle and its own arguments, by keyword.

    Attributes:
        variant: of the projectors; by default the one that is published for the detector.
        levels: block numbers, some of the bundle's; by default those that are published for the detector.
        features: ``"raw"``, ``"residual"`` or ``"pretrained"``, the default; see ``DetectorFeatures``.
        references: how many normal training images to take (8), a folder of images, or a saved bank (``.safetensors``).
        image_size: side in pixels that images are prepared to; the bundle's by default.
        resize_mode: ``"resize"``, whole images, which then have one shape, and for GLASS and UniAD are square; or
            ``"crop"``, their centre squares; the bundle's by default.
        pre_processor, post_processor, evaluator, visualizer: see anomalib; the pre-processor is the bundle's.
    """

    # Spelled out and not as strings, for anomalib's configuration files: their parser reads these.
    variant: NotRequired[str | None]
    levels: NotRequired[Sequence[int] | None]
    features: NotRequired[str]
    references: NotRequired[int | str]
    image_size: NotRequired[int | None]
    resize_mode: NotRequired[str | None]
    pre_processor: NotRequired[nn.Module | bool]
    post_processor: NotRequired[nn.Module | bool]
    evaluator: NotRequired[Evaluator | bool]
    visualizer: NotRequired[Visualizer | bool]


class ADPretrainDetector(AnomalibModule):
    """A mixin for anomalib's models, first of the bases: loads the features and sets the reference bank.

    Where ``references`` is a number, so many normal images of the training data, spread evenly over it, become the
    references when training starts, others in another training. A training image that is one of them is compared with
    the others.

    Args:
        bundle: the id of a repository on the Hub, or a folder.
        common: see ``DetectorArguments``.

    Raises:
        TypeError: an argument of an unknown name.
        InputError, BundleError: an argument is not as described, or the bundle cannot be loaded.
    """

    _variant: ClassVar[str] = "norm"  # that is published for the detector
    _last_levels: ClassVar[int] = 0  # how many of the last ones are published for it; 0 for all
    _features_at: ClassVar[str] = "model.feature_extractor"  # where in the model the features are
    _square: ClassVar[bool] = False  # whether it is built for one square grid of patches

    @classmethod
    def load(cls, bundle: str, common: DetectorArguments) -> tuple[DetectorFeatures, dict[str, Any]]:
        """Checks a constructor's arguments and loads: the features, and what anomalib's constructor takes of the rest.

        The defaults of those that were not given are added to ``common``: Lightning saves what a constructor holds.
        """
        components = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), True)
        defaults = {"variant": cls._variant, "levels": None, "features": "pretrained", "references": 8} | components
        defaults |= {"image_size": None, "resize_mode": None}
        for name in common:
            if name not in defaults:
                raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}")
        given = common.get("variant")
        common.update(cast(DetectorArguments, defaults | common))
        _check_references(common["references"])
        if not isinstance(bundle, str):
            # Checkpoints hold the arguments of a model as plain data.
            raise InputError(f"bundle is {bundle!r}, expected the id of a repository or a folder, as a string")
        prepared = {"image_size": common["image_size"], "resize_mode": common["resize_mode"]}
        extractor = cls._load_variant(bundle, common["variant"] if given else None, **prepared)
        # As they are, for a checkpoint is loaded as what it was, whatever becomes of the bundle's defaults.
        common["variant"] = extractor.variant
        common["image_size"], common["resize_mode"] = extractor.config.image_size, extractor.config.resize_mode
        levels = extractor.config.layers[-cls._last_levels :] if common["levels"] is None else common["levels"]
        arguments = {name: value for name, value in common.items() if name in components}
        if arguments["pre_processor"] is True:
            arguments["pre_processor"] = ADPretrainPreProcessor(extractor.config, square=cls._square)
        return DetectorFeatures(extractor, common["features"], levels), arguments

    @classmethod
    def _load_variant(cls, bundle: str, asked: str | None, **prepared: Any) -> ADPretrainFeatureExtractor:
        """A bundle with the variant that is asked for, else that for this detector, else its default."""
        if asked is None:
            config, files = describe_bundle(bundle)
            asked = cls._variant if cls._variant in variants_among(files, config) else None
        # Lightning moves it to where it trains.
        extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, variant=asked, device="cpu", **prepared)
        if asked is None:
            said = "%s has no variant %r, which is published for %s: taking %r"
            _LOG.warning(said, bundle, cls._variant, cls.__name__, extractor.variant)
        return extractor

    def save_hyperparameters(self, *args: Any, ignore: Sequence[str] | str = (), **kwargs: Any) -> None:
        """Saves the arguments that our constructors were given, from which a checkpoint makes the detector again.

        Lightning collects those of anomalib's constructors too, such as the backbone that stands in for ours.
        """
        ours, theirs = set(DetectorArguments.__annotations__), set[str]()
        for kind in type(self).__mro__:
            (ours if issubclass(kind, ADPretrainDetector) else theirs).update(inspect.signature(kind).parameters)
        ignored = {ignore} if isinstance(ignore, str) else {*ignore}
        super().save_hyperparameters(*args, ignore=[*ignored | (theirs - ours)], **kwargs)
        bundle = self.hparams.get("bundle")
        if bundle and Path(bundle).is_dir():  # elsewhere a relative path would be taken for an id on the Hub
            self.hparams["bundle"] = str(Path(bundle).resolve())

    @property
    def features(self) -> DetectorFeatures:
        """The features that the detector works on."""
        return cast(DetectorFeatures, self.get_submodule(self._features_at))

    def install_features(self, features: nn.Module) -> None:
        """Puts other features in place, such as ones that remember what they computed, with the same attributes."""
        self.set_submodule(self._features_at, features)

    def set_reference(self, references: Any, names: Sequence[str] = ()) -> None:
        """Sets the reference bank and, if they are known, the paths of its images; see ``DetectorFeatures``."""
        self.features.set_reference(references, names)

    @property
    def learning_type(self) -> LearningType:
        """Normal images only are learned from."""
        return LearningType.ONE_CLASS

    def validation_step(self, batch: Batch, *args: Any) -> Batch:
        """Adds maps and scores to the batch, as in a test."""
        return self.test_step(batch, *args)

    def on_validation_start(self) -> None:
        """Sets the references before anomalib fits, if it has not yet, what it stored."""
        self._ensure_reference()
        super().on_validation_start()

    def on_train_batch_start(self, batch: Batch, *_: Any) -> None:
        """Says which images of the batch are references."""
        self.features.note_own(batch.image_path or [""] * len(batch.image))

    def on_train_batch_end(self, *_: Any) -> None:
        """Images that are tested are compared with all references."""
        self.features.note_own([])

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Exports as anomalib does, for images of the shape that were seen, or else of the bundle's square."""
        side = self.features.extractor.config.image_size
        seen = self.pre_processor.shape if isinstance(self.pre_processor, ADPretrainPreProcessor) else None
        kwargs.setdefault("opset_version", 18)  # anomalib asks for 14, which today's exporter cannot write
        return super().to_onnx(export_root, model_file_name, input_size or seen or (side, side), **kwargs)

    def _ensure_reference(self) -> None:
        """Sets the references, if none are: from files or, in training, to some of its images."""
        if not self.features.needs_reference or self.features.extractor.reference is not None:
            return
        source = self.hparams["references"]
        if isinstance(source, str):
            self.set_reference(source)
        elif self.trainer.training:
            self.set_reference(*self._draw_references(self.trainer.train_dataloader.dataset, source))
            self.features.drawn = True

    on_test_start = on_predict_start = _ensure_reference

    def on_train_start(self) -> None:
        """Sets the references; what an earlier training drew and fitted does not stay, unless this one goes on."""
        if self.trainer.ckpt_path is None:
            if self.features.drawn:
                self.features.extractor.reference = None
            if isinstance(self, MemoryBankMixin):  # which anomalib fits once only
                self._is_fitted = torch.zeros_like(self._is_fitted)
        self._ensure_reference()

    @torch.no_grad()
    def _draw_references(self, dataset: AnomalibDataset, number: int) -> tuple[Tensor, list[str]]:
        normal = [place for place, label in enumerate(dataset.samples.label_index) if label == 0]
        if not normal:
            raise InputError("the training data have no normal image to take as a reference")
        if len(normal) < number:
            _LOG.warning("%d references were asked for, the training data have %d normal images", number, len(normal))
        step = max(len(normal) / number, 1)
        items = [dataset[normal[int(place * step)]] for place in range(min(number, len(normal)))]
        images = torch.stack([self._prepare(item.image[None], [item.image_path])[0] for item in items])
        return images, [str(item.image_path) for item in items]

    def _prepare(self, images: Tensor, paths: Sequence[str | None] | None) -> Tensor:
        # anomalib does this in a hook of its batches, which these images do not pass through.
        if isinstance(self.pre_processor, ADPretrainPreProcessor):
            return self.pre_processor.read_again(self.pre_processor.transform(images), paths)
        return self.pre_processor.transform(images) if self.pre_processor else images


def _check_references(references: int | str) -> None:
    if isinstance(references, bool) or not isinstance(references, (int, str)) or references in (0, ""):
        raise InputError(
            f"references is {references!r}, expected how many normal training images to take, a folder of images, or "
            "a saved bank (.safetensors), as a number or string"
        )
    if isinstance(references, int) and references < 1:
        raise InputError(f"references is {references}, expected a number >= 1")
