"""ADPretrainFeatureExtractor: the public class. The method is ``encode``, ``residuals`` and ``forward``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adpretrain_hf.backbones import Backbone
from adpretrain_hf.bundle import BundleMixin
from adpretrain_hf.config import ADPretrainConfig, check_variant_name
from adpretrain_hf.errors import InputError
from adpretrain_hf.feature_info import FeatureInfo
from adpretrain_hf.images import PreparedBatches, Preprocessor, check_prepared, is_prepared, to_device
from adpretrain_hf.matching import to_rows
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, is_bank, residuals_per_image
from adpretrain_hf.streams import StreamsMixin

References = Union[ReferenceBank, Sequence[ReferenceBank], Any]
Layers = Optional[Sequence[str]]


class ADPretrainFeatureExtractor(nn.Module, StreamsMixin, BundleMixin):
    """A frozen backbone, a reference set, and projectors: images to features that are pretrained for anomaly detection.

    Made by ``from_pretrained`` (a bundle) or ``from_backbone`` (a new one, whose projectors are the identity). All
    parameters are frozen; ``extractor.projectors.requires_grad_()`` opens the projectors to training. Methods may be
    called from several threads at once.

    Attributes:
        config: the configuration.
        backbone: the frozen network.
        projectors: one per level.
        variant: name of the projectors that are loaded, e.g. ``"angle"`` or ``"norm"``.
        reference: the bank that ``set_reference`` made, or None.
        layers: the levels' names, the keys of the features: ``("layer3", ...)``.
        out_dims: C of every level.
        reductions: input pixels per patch, of every level.
        feature_info: the same as timm's models tell it, with the names of the modules that give the features.
        image_size, mean, std: how images are prepared.
        is_quantized: whether ``quantize`` has made its layers 8-bit ones.
    """

    def __init__(
        self,
        config: ADPretrainConfig,
        backbone: Backbone,
        projectors: Optional[Projectors] = None,
        variant: Optional[str] = None,
    ) -> None:
        super().__init__()
        got = (backbone.hidden_size, backbone.patch_size, backbone.layers)
        if got != (config.hidden_size, config.patch_size, config.layers):
            raise InputError(
                f"the backbone's width, patch size and levels are {got}, the configuration's are "
                f"{(config.hidden_size, config.patch_size, config.layers)}"
            )
        if projectors is not None:
            projectors.check_fits(config)
        self.config, self.backbone = config, backbone
        self.projectors = Projectors(config).requires_grad_(False) if projectors is None else projectors
        self.variant = check_variant_name(variant or config.default_variant)
        self.preprocess = Preprocessor(config)
        self.reference: Optional[ReferenceBank] = None
        self.is_quantized = False
        self.layers, levels = config.layer_names, len(config.layers)
        self.out_dims, self.reductions = [config.hidden_size] * levels, [config.patch_size] * levels
        self.feature_info = FeatureInfo(config)
        self.image_size, self.mean, self.std = config.image_size, config.mean, config.std
        self.eval()

    def encode(self, images: Tensor, *, layers: Layers = None) -> list[Tensor]:
        """Backbone tokens of prepared images (B, 3, H, W), as residuals are made of: L maps (B, C, h, w).

        They have unit length if the configuration says ``normalize_tokens``.

        Args:
            images: on any device.
            layers: see ``forward``.
        """
        maps = self.backbone(to_device(images, self.device, self.dtype))
        return self.comparable([maps[place] for place in self._places(layers)])

    def comparable(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """What the backbone gives, L maps (B, C, h, w), as residuals are made of: see ``encode``, which returns it."""
        if not self.config.normalize_tokens:
            return list(tokens)
        return [F.normalize(level.float(), dim=1).to(level.dtype) for level in tokens]

    def residuals(
        self,
        features: Sequence[Tensor],
        references: Optional[References] = None,
        *,
        own: Sequence[Optional[int]] = (),
        layers: Layers = None,
    ) -> list[Tensor]:
        """Scaled residuals of encoded images against their references: L maps (B, C, h, w) to the same.

        Args:
            features: what ``encode`` returned.
            references: None for the reference that is set, a bank, one bank for each image, or what ``make_reference``
                takes.
            own: for each image which of the reference's images it is, from 0, or None: it is compared with the others.
            layers: see ``forward``.

        Raises:
            InputError: no reference is set or given, or one that does not fit.
        """
        places = self._places(layers)
        residuals = self._match(features, references, own, places)
        scales = [self.config.residual_scale[place] for place in places]
        return [r if s == 1 else r * s for r, s in zip(residuals, scales, strict=True)]

    def forward(
        self, images: Any, references: Optional[References] = None, *, layers: Layers = None
    ) -> dict[str, Tensor]:
        """Extracts pretrained features.

        Args:
            images: a float tensor (B, 3, H, W), prepared, H and W multiples of the patch size; everything else goes
                through ``preprocess``.
            references: see ``residuals``.
            layers: names of the levels that are wanted, e.g. ``("layer9",)``, in their order; the others are neither
                matched nor projected. All by default.

        Returns:
            ``{"layer<n>": (B, C, h, w)}`` with h = H / patch size and w = W / patch size.

        Raises:
            InputError: images of a wrong shape or with NaN, no reference, or a level that there is not.
        """
        if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
            raise InputError(
                "torch.jit.trace would fix all shapes: use torch.export.export(extractor, (images,)) instead"
            )
        if not is_prepared(images):
            images = self.preprocess(images)
        check_prepared(images, self.config)
        residuals = self.residuals(self.encode(images, layers=layers), references, layers=layers)
        features = self.projectors(residuals, self._places(layers))
        return dict(zip(self.layers if layers is None else layers, features, strict=True))

    @property
    def _fingerprint(self) -> str:
        """What reference patches are stamped with: those of 8-bit layers are far from the others, at any size."""
        return self.config.fingerprint + ("-int8" if self.is_quantized else "")

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype

    def requires_grad_(self, requires_grad: bool = True) -> "ADPretrainFeatureExtractor":
        """Opens the projectors to training, or closes them; the backbone stays frozen."""
        self.projectors.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "ADPretrainFeatureExtractor":
        """Takes the reference along when the module is moved, or every batch would copy it again."""
        super()._apply(fn, recurse)
        if self.reference is not None:
            self.reference = self.reference.to(self.device)
        return self

    def make_reference(
        self, images: Any, *, category: str = "", batch_size: int = 16, progress: bool = False
    ) -> ReferenceBank:
        """Encodes normal images of one category as a bank.

        Args:
            images: a few defect-free images: a folder, paths, PIL images, arrays, or a prepared float tensor
                (K, 3, H, W). The published protocol takes 8.
            category: name of the product, kept with the bank.
            batch_size: images at a time.
            progress: show a bar.

        Raises:
            InputError: no images.
            ImageError: an image cannot be used.
        """
        batches = PreparedBatches(images, self.preprocess, batch_size)
        encoded, digests, counts = [], list[str](), list[int]()
        for batch, features in self._encode_batches(batches, progress, "reference"):
            encoded.append(features)
            digests += [image.digest for image in batch]
            counts += [features[0][0, 0].numel()] * len(batch)
        if not encoded:
            raise InputError("no reference images were given: expected at least one normal image")
        patches = [torch.cat([to_rows(maps) for maps in level]) for level in zip(*encoded, strict=True)]
        about: dict[str, Any] = {"fingerprint": self._fingerprint, "category": category, "num_images": len(digests)}
        return ReferenceBank(patches, images=digests, image_patches=counts if len(set(counts)) > 1 else (), **about)

    def set_reference(self, images: Any, *, category: str = "", batch_size: int = 16) -> "ADPretrainFeatureExtractor":
        """Sets the normal images that later calls compare with, and returns self.

        Args:
            images: what ``make_reference`` takes, a ``ReferenceBank``, or the path of a saved one
                (``.safetensors``).
            category: name of the product, kept with the bank that is made.
            batch_size: images at a time.

        Raises:
            InputError: no images, or a bank that another extractor made.
            ImageError: an image cannot be used.
        """
        self.reference = self._as_bank(images, category, batch_size)
        return self

    def _places(self, layers: Layers) -> list[int]:
        """Which levels these are, from 0."""
        wanted = self.layers if layers is None else tuple(layers)
        places = [place for place, name in enumerate(self.layers) if name in wanted]
        if not wanted or wanted != tuple(self.layers[place] for place in places):
            raise InputError(f"layers are {wanted}, expected some of {self.layers}, in their order")
        return places

    def _match(
        self,
        features: Sequence[Tensor],
        references: Optional[References],
        own: Sequence[Optional[int]],
        places: Sequence[int],
    ) -> list[Tensor]:
        if isinstance(references, (list, tuple)) and all(isinstance(bank, ReferenceBank) for bank in references):
            checked = {id(bank): self._check_bank(bank) for bank in references}  # one that is shared is moved once
            return residuals_per_image(features, [checked[id(bank)] for bank in references], places)
        bank = self._require_reference() if references is None else self._as_bank(references)
        return bank.residuals(features, own, places)

    def _as_bank(self, images: Any, category: str = "", batch_size: int = 16) -> ReferenceBank:
        if isinstance(images, (str, Path)) and is_bank(images):
            images = ReferenceBank.load(images)
        if isinstance(images, ReferenceBank):
            return self._check_bank(images)
        return self.make_reference(images, category=category, batch_size=batch_size)

    def _check_bank(self, bank: ReferenceBank) -> ReferenceBank:
        """Returns a bank, on this extractor's device, if this extractor made it or it carries no stamp."""
        if bank.fingerprint not in ("", self._fingerprint):
            raise InputError(
                f"the reference bank was made by another extractor: its fingerprint is {bank.fingerprint}, this "
                f"extractor's is {self._fingerprint} (backbone, levels, image size, preparation and 8-bit layers "
                f"count; here image_size={self.image_size}, resize_mode={self.config.resize_mode!r}). Make it again "
                "from the images: adpretrain reference, or set_reference; or load the extractor with the image_size "
                "and the resize_mode that it was made with"
            )
        shape = (len(bank.patches), bank.patches[0].shape[1])
        if shape != (len(self.layers), self.config.hidden_size):
            raise InputError(
                f"the reference bank has {shape[0]} levels of {shape[1]} channels, this extractor "
                f"{len(self.layers)} of {self.config.hidden_size}"
            )
        return bank.to(self.device)

    def _require_reference(self) -> ReferenceBank:
        if self.reference is None:
            raise InputError(
                "no reference is set: call set_reference(images) with a few normal images of the product, or with a "
                "saved bank, before asking for features or scores"
            )
        return self.reference
