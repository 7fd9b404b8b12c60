"""ADPretrainFeatureExtractor: the public class. The method is ``encode``, ``residuals`` and ``forward``."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adpretrain_hf.backbones import Backbone
from adpretrain_hf.bundle import BundleMixin
from adpretrain_hf.cache import ParameterCache
from adpretrain_hf.config import ADPretrainConfig, check_variant_name
from adpretrain_hf.errors import InputError
from adpretrain_hf.feature_info import FeatureInfo
from adpretrain_hf.images import Preprocessor, check_prepared, is_prepared, to_device
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, residuals_per_image
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
        reference: the bank that images are compared with whose category is not told, or None.
        references: all banks that are set, by category.
        layers: the levels' names, the keys of the features: ``("layer3", ...)``.
        whole: the bundle's configuration, where only some of its levels are loaded.
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
        references: Optional[Mapping[str, ReferenceBank]] = None,
        whole: Optional[ADPretrainConfig] = None,
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
        self.reference, self.whole = None, whole
        self.is_quantized = False
        self._identity: ParameterCache[str] = ParameterCache()
        self.layers, levels = config.layer_names, len(config.layers)
        self.out_dims, self.reductions = [config.hidden_size] * levels, [config.patch_size] * levels
        self.feature_info = FeatureInfo(config)
        self.image_size, self.mean, self.std = config.image_size, config.mean, config.std
        self.eval()
        if references:
            self.set_references(references)

    def encode(self, images: Tensor, *, layers: Layers = None) -> list[Tensor]:
        """Backbone tokens of prepared images (B, 3, H, W), as residuals are made of: L maps (B, C, h, w).

        They have unit length if the configuration says ``normalize_tokens``.

        Args:
            images: on any device.
            layers: see ``forward``.
        """
        numbers = None if layers is None else [self.config.layers[place] for place in self.config.places(layers)]
        return self.comparable(self.backbone(to_device(images, self.device, self.dtype), numbers))

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
        windows: Sequence[int] = (),
    ) -> list[Tensor]:
        """Scaled residuals of encoded images against their references: L maps (B, C, h, w) to the same.

        Args:
            features: what ``encode`` returned.
            references: None for the reference that is set, a bank, one bank for each image, or what ``make_reference``
                takes.
            own: for each image which of the reference's images it is, from 0, or None: it is compared with the others.
            layers: see ``forward``.
            windows: see ``ReferenceBank.residuals``.

        Raises:
            InputError: no reference is set or given, or one that does not fit.
        """
        places = self.config.places(layers)
        found = self._resolve(references)
        if isinstance(found, list):
            residuals = residuals_per_image(features, found, places, own, windows)
        else:
            residuals = found.residuals(features, own, places, windows)
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
            layers: names of the levels that are wanted, e.g. ``("layer9",)``, in their order; nothing is
                computed for the others alone. All by default.

        Returns:
            ``{"layer<n>": (B, C, h, w)}`` with h = H / patch size and w = W / patch size.

        Raises:
            InputError: images of a wrong shape or with NaN, no reference, one with tiles, or a level that there is not.
        """
        if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
            raise InputError(
                "torch.jit.trace would fix all shapes: use torch.export.export(extractor, (images,)) instead"
            )
        if not is_prepared(images):
            references = self._resolve(references)
            if any(bank.tiles for bank in (references if isinstance(references, list) else [references])):
                raise InputError(
                    "the reference has tiles, and this method takes whole images, or windows that are prepared: call "
                    "score, extract or stream, which cut images into windows"
                )
            images = self.preprocess(images)
        check_prepared(images, self.config)
        residuals = self.residuals(self.encode(images, layers=layers), references, layers=layers)
        features = self.projectors(residuals, self.config.places(layers))
        return dict(zip(self.layers if layers is None else layers, features, strict=True))

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
        self.references = {category: bank.to(self.device) for category, bank in self.references.items()}
        return self

    def _resolve(self, references: Optional[References]) -> Union[ReferenceBank, list[ReferenceBank]]:
        """The bank that all images are compared with, or one for each image; they fit the extractor."""
        if isinstance(references, (list, tuple)) and all(isinstance(bank, ReferenceBank) for bank in references):
            checked = {id(bank): self._check_bank(bank) for bank in references}  # one that is shared is moved once
            return [checked[id(bank)] for bank in references]
        return self._require_reference() if references is None else self._as_bank(references)
