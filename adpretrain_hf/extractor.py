"""ADPretrainFeatureExtractor: the public class. The method is ``encode``, ``residuals`` and ``forward``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adpretrain_hf.backbones import Backbone
from adpretrain_hf.bundle import BundleMixin, read_references
from adpretrain_hf.cache import ParameterCache
from adpretrain_hf.config import ADPretrainConfig, check_variant_name
from adpretrain_hf.errors import InputError
from adpretrain_hf.feature_info import FeatureInfo
from adpretrain_hf.images import (
    TILE_REFERENCES,
    PreparedBatches,
    Preprocessor,
    Tiles,
    check_augmentation,
    check_prepared,
    is_prepared,
    to_device,
    with_copies,
)
from adpretrain_hf.matching import to_rows
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference import ReferenceBank, ReferenceImage, is_bank, residuals_per_image
from adpretrain_hf.scoring import Judgement, encode_region
from adpretrain_hf.streams import StreamsMixin, check_category

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
        residuals = self._match(features, references, own, places, windows)
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
            if getattr(self.reference if references is None else references, "tiles", None):
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
    def _fingerprint(self) -> str:
        """What reference patches are stamped with: those of 8-bit layers are far from the others, at any size."""
        return self._stamp_of(self.config)

    def _stamp_of(self, config: ADPretrainConfig) -> str:
        return config.fingerprint + ("-int8" if self.is_quantized else "")

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

    @property
    def reference(self) -> Optional[ReferenceBank]:
        """The bank that images are compared with whose category is not told: the only one, or the one chosen."""
        return None if self._chosen is None else self.references[self._chosen]

    @reference.setter
    def reference(self, bank: Optional[ReferenceBank]) -> None:
        self.references: dict[str, ReferenceBank] = {} if bank is None else {bank.category: bank}
        self._chosen = None if bank is None else bank.category

    def make_reference(
        self,
        images: Any,
        *,
        category: str = "",
        tiles: Any = None,
        tile_reference: Optional[str] = None,
        augment_references: str = "none",
        select: Optional[int] = None,
        calibrate: Any = None,
        image_score: str = "max",
        top: float = 0.005,
        region: Any = None,
        ignore: Any = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> ReferenceBank:
        """Encodes normal images of one category as a bank, which says how images are looked at.

        Args:
            images: a few defect-free images: a folder, paths, PIL images, arrays, or a prepared float tensor
                (K, 3, H, W). The published protocol takes 8.
            category: name of the product, kept with the bank.
            augment_references: copies of the images whose patches stand in the bank, too: ``"flips"``, ``"jitter"``
                (small turns, a zoom, half a patch aside), ``"both"``, or ``"auto"``: what ``choose_augmentation`` of
                ``images/augmented.py`` takes by leaving out one image after the other.
            select: take so many of the images, or all if there are no more: those that are spread over all of them,
                see ``coreset.choose_images``.
            calibrate: more normal images, by whose scores decisions are made, see ``calibrate``; True for the
                references themselves, each compared with the others.
            image_score: ``"max"``, an image's score is the maximum of its map; ``"top"``, the mean of its highest
                pixels, which small noise touches less.
            top: their share.
            region: the region of interest, which alone counts in maps and scores: a mask of the images' size (a path, a
                PIL image or an array, 0 outside) or the corners ((x, y), ...) of a polygon. Reference patches of all of
                the image stay, or what lies at the region's edge would look strange.
            ignore: the same of what does not count.
            batch_size: images at a time.
            progress: show a bar.
            tiles: (rows, columns) or ``Tiles``: images are cut into windows, here and wherever the bank is used.
            tile_reference: what a window is then compared with: the references' windows at its place, ``"window"``,
                where all images show the product in one pose (the default); or ``"all"`` of their windows.

        Raises:
            InputError: no images, tiles, an augmentation or an image score that there cannot be, a selection of none,
                fewer than 3 images for ``"auto"``, or a region of another size than the images or without a pixel.
            ImageError: an image cannot be used, or has other windows than the first one.
        """
        check_augmentation(augment_references)
        judgement, tiles = Judgement(image_score, top), Tiles.of(tiles)
        if tile_reference not in (None, *TILE_REFERENCES):
            raise InputError(f"tile_reference is {tile_reference!r}, expected one of {TILE_REFERENCES}")
        if tiles and (select is not None or augment_references == "auto"):
            raise InputError("select and augment_references='auto' look at whole images: expected no tiles with them")
        if calibrate is True and images is iter(images if hasattr(images, "__iter__") else ()):
            raise InputError("calibrate=True reads the images twice: give a list, a folder or paths, not an iterator")
        if select is not None:
            images = self._select(images, select, batch_size, progress)
        if augment_references == "auto":
            images = [image for batch in PreparedBatches(images, self.preprocess, batch_size) for image in batch]
            augment_references = self._best_augmentation(images, batch_size)

        def encode(images: Tensor) -> list[Tensor]:
            # Copies lie below their image, so that its patches are followed by theirs.
            sets = [self.encode(copies) for copies in with_copies(images, augment_references)]
            return [torch.cat(level, dim=2) for level in zip(*sets, strict=True)]

        batches = PreparedBatches(images, self.preprocess, batch_size, tiles={"": (tiles, ())} if tiles else {})
        encoded, known, counts, places = [], list[ReferenceImage](), list[int](), list[int]()
        grid: tuple[int, ...] = ()
        sizes = set[tuple[int, int]]()
        for batch, features in self._encode_batches(batches, progress, "reference", encode=encode):
            each = features[0][0, 0].numel()
            encoded.append([to_rows(maps).split(each) for maps in features])
            for image in batch:
                if image.place == 0:
                    known.append(ReferenceImage.of(image))
                    sizes.add(image.size)
                    counts.append(0)
                counts[-1] += each
                if image.windows and tile_reference != "all":
                    grid = grid or image.windows.grid
                    image.windows.check_grid(image.name, grid)
                places.append(image.place if grid else 0)
        if not encoded:
            raise InputError("no reference images were given: expected at least one normal image")
        if (region is not None or ignore is not None) and len(sizes) > 1:
            raise InputError(f"a region of interest needs images of one size, got {sorted(sizes)} (H, W)")
        judgement = replace(judgement, region=encode_region(region, ignore, next(iter(sizes))))
        order = sorted(range(len(places)), key=places.__getitem__)
        levels = (list(chain.from_iterable(level)) for level in zip(*encoded, strict=True))
        patches = [torch.cat([rows[number] for number in order]) for rows in levels]
        about: dict[str, Any] = {"fingerprint": self._fingerprint, "category": category, "num_images": len(known)}
        about |= {"judgement": judgement, "image_patches": counts if len(set(counts)) > 1 else ()}
        about |= {"tiles": tiles, "grid": grid}
        about["augmentation"] = "" if augment_references == "none" else augment_references
        bank = ReferenceBank(patches, images=known, **about)
        if calibrate is None or calibrate is False:
            return bank
        normals = images if calibrate is True else calibrate
        return self.calibrate(bank, normals, batch_size=batch_size, progress=progress)

    def set_reference(self, images: Any = None, *, category: str = "", **options: Any) -> "ADPretrainFeatureExtractor":
        """Sets the normal images that later calls compare with, and returns self.

        Args:
            images: what ``make_reference`` takes, a ``ReferenceBank``, or the path of a saved one
                (``.safetensors``); without, one of the references that are set is chosen by its category.
            category: name of the product, by which the reference is known, kept with a bank that is made.
            options: of ``make_reference``, for a bank that is made; of a bank, ``calibrate`` and ``batch_size`` alone.

        Raises:
            InputError: no images, an option that cannot be used, a bank that another extractor made, or no reference of
                the category.
            ImageError: an image cannot be used.
        """
        if images is None:
            self._chosen = check_category(category, self.references)
            return self
        bank = self._as_bank(images, category=category, **options)
        return self.set_references({category or bank.category: bank})

    def set_references(self, references: Any, *, batch_size: int = 16) -> "ADPretrainFeatureExtractor":
        """Sets the normal images of several products, and returns self; images are then told by their categories.

        Args:
            references: ``{category: what set_reference takes}``, or a folder of banks, ``<category>.safetensors``.
            batch_size: images at a time.
            tiles, tile_reference: see ``make_reference``; a bank that is given brings its own.

        Raises:
            InputError: no references, or see ``set_reference``.
            ImageError: an image cannot be used.
        """
        self.references = self._as_banks(references, batch_size)
        self._chosen = next(iter(self.references)) if len(self.references) == 1 else None
        return self

    def add_reference(
        self, images: Any, *, category: Optional[str] = None, batch_size: int = 16
    ) -> "ADPretrainFeatureExtractor":
        """Adds normal images to those that are set, which are not encoded again, and returns self.

        Args:
            images: what ``set_reference`` takes.
            category: of the reference that they are added to; that of ``reference`` by default.
            batch_size: images at a time.

        Raises:
            InputError: no such reference, or see ``set_reference`` and ``ReferenceBank.__add__``.
            ImageError: an image cannot be used.
        """
        if category is None:
            self._require_reference()
            category = str(self._chosen)
        bank = self.references[check_category(category, self.references)]
        more = self._as_bank(images, category=bank.category, batch_size=batch_size)
        self.references = self.references | {category: bank + more}
        return self

    def _match(
        self,
        features: Sequence[Tensor],
        references: Optional[References],
        own: Sequence[Optional[int]],
        places: Sequence[int],
        windows: Sequence[int],
    ) -> list[Tensor]:
        if isinstance(references, (list, tuple)) and all(isinstance(bank, ReferenceBank) for bank in references):
            checked = {id(bank): self._check_bank(bank) for bank in references}  # one that is shared is moved once
            return residuals_per_image(features, [checked[id(bank)] for bank in references], places, own, windows)
        bank = self._require_reference() if references is None else self._as_bank(references)
        return bank.residuals(features, own, places, windows)

    def _as_bank(self, images: Any, **options: Any) -> ReferenceBank:
        if isinstance(images, (str, Path)) and is_bank(images):
            images = ReferenceBank.load(images)
        if not isinstance(images, ReferenceBank):
            return self.make_reference(images, **options)
        own = {"tiles": images.tiles, "tile_reference": images.tile_reference}
        same = {
            name
            for name in own
            if (Tiles.of(options[name]) if name == "tiles" and name in options else options.get(name))
            in (None, own[name])
        }
        if making := sorted(options.keys() - {"category", "batch_size", "calibrate"} - same):
            raise InputError(
                f"{', '.join(making)}: a bank is as it was made ({images}): leave it out, or make the bank again from "
                "the images"
            )
        bank, normals = self._check_bank(images), options.get("calibrate")
        return bank if normals is None else self.calibrate(bank, normals, batch_size=options.get("batch_size", 16))

    def _as_banks(self, references: Any, batch_size: int = 16) -> dict[str, ReferenceBank]:
        if isinstance(references, (str, Path)):
            references = read_references(Path(references))
        if not isinstance(references, Mapping) or not references:
            expected = "{category: bank or images}, or a folder of banks, <category>.safetensors"
            raise InputError(f"got {type(references).__name__} as references of several products, expected {expected}")
        return {
            category: self._as_bank(one, category=category, batch_size=batch_size)
            for category, one in references.items()
        }

    def _check_bank(self, bank: ReferenceBank) -> ReferenceBank:
        """Returns a bank, on this extractor's device, if this extractor made it or it carries no stamp.

        Of a bank of all the bundle's levels it takes those that are loaded.
        """
        if self.whole is not None and bank.fingerprint == self._stamp_of(self.whole):
            bank = bank.of_levels(self.whole.places(self.layers), self._fingerprint)
        if bank.fingerprint not in ("", self._fingerprint):
            raise InputError(
                f"the reference bank was made by another extractor: its fingerprint is {bank.fingerprint}, this "
                f"extractor's is {self._fingerprint} (backbone, levels, image size, preparation and 8-bit layers "
                "count). Make it again from the images: adpretrain reference, or set_reference"
            )
        shape = (len(bank.patches), bank.patches[0].shape[1])
        if shape != (len(self.layers), self.config.hidden_size):
            raise InputError(
                f"the reference bank has {shape[0]} levels of {shape[1]} channels, this extractor "
                f"{len(self.layers)} of {self.config.hidden_size}"
            )
        return bank.to(self.device)

    def _require_reference(self) -> ReferenceBank:
        if self.reference is None and self.references:
            raise InputError(
                f"references of several products are set ({', '.join(self.references)}): give categories, one for each "
                "image, or choose one by set_reference(category=...)"
            )
        if self.reference is None:
            raise InputError(
                "no reference is set: call set_reference(images) with a few normal images of the product, or with a "
                "saved bank, before asking for features or scores"
            )
        return self.reference
