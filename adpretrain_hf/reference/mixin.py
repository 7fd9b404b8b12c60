"""How an extractor makes and keeps its references."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import InputError, check_count
from adpretrain_hf.images import (
    AUGMENTATIONS,
    TILE_REFERENCES,
    PreparedBatches,
    PreparedImage,
    Preprocessor,
    Tiles,
    choose_augmentation,
    with_copies,
)
from adpretrain_hf.projector import Projectors
from adpretrain_hf.reference.bank import ReferenceBank, is_bank
from adpretrain_hf.reference.coreset import choose_images, describe_images
from adpretrain_hf.reference.folder import read_references
from adpretrain_hf.reference.gathered import Batches, gather
from adpretrain_hf.reference.notice import check_category, copies_among
from adpretrain_hf.scoring import Area, Judgement, anomaly_map

Banks = Mapping[str, ReferenceBank]
T = TypeVar("T", bound="ReferencesMixin")


class _References(NamedTuple):
    """The banks that are set, by category, and which is chosen; replaced as one, for other threads may be scoring."""

    banks: dict[str, ReferenceBank]
    chosen: Optional[str]


class ReferencesMixin:
    """The part of ``ADPretrainFeatureExtractor`` that deals with references."""

    config: ADPretrainConfig
    preprocess: Preprocessor
    projectors: Projectors
    layers: tuple[str, ...]
    whole: Optional[ADPretrainConfig]
    is_quantized: bool
    encode: Callable[..., list[Tensor]]
    residuals: Callable[..., list[Tensor]]
    calibrate: Callable[..., ReferenceBank]
    _references: _References
    _encode_batches: Callable[..., Batches]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.projectors.parameters()).device

    @property
    def reference(self) -> Optional[ReferenceBank]:
        """The bank that images are compared with whose category is not told: the only one, or the one chosen."""
        banks, chosen = self._references
        return None if chosen is None else banks[chosen]

    @reference.setter
    def reference(self, bank: Optional[ReferenceBank]) -> None:
        self._references = _References({}, None) if bank is None else _References({bank.category: bank}, bank.category)

    @property
    def references(self) -> dict[str, ReferenceBank]:
        """All banks that are set, by category."""
        return self._references.banks

    @references.setter
    def references(self, banks: dict[str, ReferenceBank]) -> None:
        self._references = self._references._replace(banks=banks)

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
        top: Optional[float] = None,
        region: Any = None,
        ignore: Any = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> ReferenceBank:
        """Encodes normal images of one category as a bank, which says how images are looked at.

        Args:
            images: a few defect-free images: a folder, paths, PIL images, arrays, or a prepared float tensor
                (K, 3, H, W). The published protocol takes 8. Copies of one image are left out, with a warning.
            category: name of the product, kept with the bank.
            augment_references: copies of the images whose patches stand in the bank, too: ``"flips"``, ``"jitter"``
                (small turns, a zoom, half a patch aside), ``"both"``, or ``"auto"``: what ``choose_augmentation`` of
                ``images/augmented.py`` takes by leaving out one image after the other.
            select: take so many of the images, or all if there are no more: those that are spread over all of them,
                see ``coreset.choose_images``.
            calibrate: more normal images, by whose scores decisions are made, see ``calibrate``; True for these, of
                which a reference is compared with the others.
            image_score: ``"max"``, an image's score is the maximum of its map; ``"top"``, the mean of its highest
                pixels, which small noise touches less.
            top: their share, 0.005 by default.
            region: the region of interest, which alone counts in maps and scores: a mask of the images' size (a path, a
                PIL image or an array, 0 or transparent outside) or the corners ((x, y), ...) of a polygon. Reference
                patches of all of the image stay, or what lies at the region's edge would look strange.
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
        if augment_references not in (known := (*AUGMENTATIONS, "auto")):
            raise InputError(f"augment_references is {augment_references!r}, expected one of {', '.join(known)}")
        if top is not None and image_score == "max":
            raise InputError(f"top is {top!r}, and the score is the maximum: expected image_score='top' with it")
        judgement, tiles = Judgement(image_score, Judgement.top if top is None else top), Tiles.of(tiles)
        if tile_reference not in (None, *TILE_REFERENCES):
            raise InputError(f"tile_reference is {tile_reference!r}, expected one of {TILE_REFERENCES}")
        if tile_reference is not None and not tiles:
            raise InputError(f"tile_reference is {tile_reference!r} without tiles: expected both, or neither")
        if tiles and (select is not None or augment_references == "auto"):
            raise InputError("select and augment_references='auto' look at whole images: expected no tiles with them")
        if calibrate is True and images is iter(images if hasattr(images, "__iter__") else ()):
            raise InputError("calibrate=True reads the images twice: give a list, a folder or paths, not an iterator")
        areas = Area.read(region, "region of interest"), Area.read(ignore, "area to ignore")
        normals = images if calibrate is True else calibrate
        if select is not None:
            images = self._select(images, check_count("select", select), batch_size, progress)
        if augment_references == "auto":
            images = [image for batch in PreparedBatches(images, self.preprocess, batch_size) for image in batch]
            for copy in reversed(copies_among(images)):
                del images[copy]
            augment_references = self._best_augmentation(images, batch_size)

        def encode(images: Tensor) -> list[Tensor]:
            # Copies lie below their image, so that its patches are followed by theirs.
            sets = [self.encode(copies) for copies in with_copies(images, augment_references)]
            return [torch.cat(level, dim=2) for level in zip(*sets, strict=True)]

        batches = PreparedBatches(images, self.preprocess, batch_size, tiles={"": (tiles, ())} if tiles else {})
        encoded = self._encode_batches(batches, progress, "reference", encode=encode)
        found = gather(encoded, areas, by_window=tile_reference != "all")
        if calibrate is True and not all(image.digest for image in found.images):
            raise InputError("calibrate=True recognises the references by their pixels: give tensors on the CPU")
        bank = ReferenceBank(
            found.patches,
            fingerprint=self._fingerprint,
            category=category,
            num_images=len(found.images),
            images=found.images,
            image_patches=found.counts if len(set(found.counts)) > 1 else (),
            augmentation="" if augment_references == "none" else augment_references,
            tiles=tiles,
            grid=found.grid,
            judgement=replace(judgement, region=found.region),
        )
        for copy in reversed(copies_among(bank.images)):
            bank = bank.remove(copy)
        if calibrate is None or calibrate is False:
            return bank
        return self.calibrate(bank, normals, batch_size=batch_size, progress=progress)

    def set_reference(self: T, images: Any = None, *, category: str = "", **options: Any) -> T:
        """Sets the normal images that later calls compare with, and returns self.

        Args:
            images: what ``make_reference`` takes, a ``ReferenceBank``, or the path of a saved one
                (``.safetensors``); without, one of the references that are set is chosen by its category.
            category: name of the product, by which the reference is known, kept with a bank that is made.
            options: of ``make_reference``, for a bank that is made; of a bank, ``calibrate``, ``batch_size`` and
                ``progress``, and what it was made by.

        Raises:
            InputError: no images, an option that cannot be used, a bank that another extractor made, or no reference of
                the category.
            ImageError: an image cannot be used.
        """
        if images is None:
            banks = self.references
            self._references = _References(banks, check_category(category, banks))
            return self
        bank = self._as_bank(images, category=category, **options)
        return self.set_references({category or bank.category: bank})

    def set_references(self: T, references: Any, **options: Any) -> T:
        """Sets the normal images of several products, and returns self; images are then told by their categories.

        Args:
            references: ``{category: what set_reference takes}``, or a folder of banks, ``<category>.safetensors``.
            options: see ``set_reference``.

        Raises:
            InputError: no references, or see ``set_reference``.
            ImageError: an image cannot be used.
        """
        banks = self._as_banks(references, **options)
        self._references = _References(banks, next(iter(banks)) if len(banks) == 1 else None)
        return self

    def add_reference(self: T, images: Any, *, category: Optional[str] = None, **options: Any) -> T:
        """Adds normal images to those that are set, which are not encoded again, and returns self.

        Args:
            images: what ``set_reference`` takes.
            category: of the reference that they are added to; that of ``reference`` by default.
            options: see ``extend_reference``.

        Raises:
            InputError: no such reference, or see ``set_reference`` and ``ReferenceBank.__add__``.
            ImageError: an image cannot be used.
        """
        if category is None:
            category, _ = self._require_chosen()
        bank = self.references[check_category(category, self.references)]
        more = self.extend_reference(bank, images, category=bank.category, **options)
        self.references = self.references | {category: more}
        return self

    def extend_reference(self, bank: ReferenceBank, images: Any, **options: Any) -> ReferenceBank:
        """A bank with more normal images, whose patches are made as its own are, with its tiles and augmentation.

        Args:
            bank: of the product.
            images: what ``set_reference`` takes.
            options: of ``make_reference``, where they are to be others than the bank's.

        Raises:
            InputError: see ``make_reference`` and ``ReferenceBank.__add__``.
            ImageError: an image cannot be used.
        """
        if isinstance(images := _loaded(images), ReferenceBank):
            return bank + self._as_bank(images, **options)
        options = {name: value for name, value in options.items() if value is not None}
        more = self.make_reference(images, **bank.options | options)
        if not options.keys() & {"image_score", "top", "region", "ignore"}:
            more = more.judged(bank.judgement.calibrated(None))  # to the bit, whoever encoded its region
        return bank + more

    def _as_bank(self, images: Any, **options: Any) -> ReferenceBank:
        images = _loaded(images)
        if not isinstance(images, ReferenceBank):
            return self.make_reference(images, **options)
        own = {"tiles": images.tiles, "tile_reference": images.tile_reference} | images.options
        del own["region"]  # which may be told in many ways
        asked = {name: value for name, value in options.items() if value is not None and name != "category"}
        asked |= {"tiles": Tiles.of(asked["tiles"])} if "tiles" in asked else {}
        run = {name: asked.pop(name) for name in ("batch_size", "progress") if name in asked}
        normals = asked.pop("calibrate", False)
        if asked.get("augment_references") == "none":  # as if nothing was said
            del asked["augment_references"]
        if making := sorted(name for name, value in asked.items() if name not in own or value != own[name]):
            raise InputError(
                f"{', '.join(making)}: a bank is as it was made ({images}): leave it out, or make the bank again from "
                "the images"
            )
        if normals is True:
            raise InputError("calibrate=True compares the references, and a bank has no images: give normal images")
        bank = self._check_bank(images)
        return bank if normals is False else self.calibrate(bank, normals, **run)

    def _as_banks(self, references: Any, **options: Any) -> dict[str, ReferenceBank]:
        if isinstance(references, (str, Path)):
            references = read_references(Path(references))
        if not isinstance(references, Mapping) or not references:
            expected = "{category: bank or images}, or a folder of banks, <category>.safetensors"
            raise InputError(f"got {type(references).__name__} as references of several products, expected {expected}")
        return {category: self._as_bank(one, category=category, **options) for category, one in references.items()}

    def _check_bank(self, bank: ReferenceBank) -> ReferenceBank:
        """Returns a bank, on this extractor's device, if this extractor made it or it carries no stamp.

        Of a bank of all the bundle's levels it takes those that are loaded.
        """
        if self.whole is not None and bank.fingerprint == self._stamp_of(self.whole):
            bank = bank.of_levels(self.whole.places(self.layers), self._fingerprint)
        if bank.fingerprint not in ("", self._fingerprint):
            of = f" of {bank.category!r}" if bank.category else ""
            own = (f"{name}={getattr(self.config, name)!r}" for name in ("image_size", "resize_mode", "decode"))
            raise InputError(
                f"the reference bank{of} was made by another extractor: its fingerprint is "
                f"{bank.fingerprint}, this extractor's is {self._fingerprint} (backbone, levels, image size, "
                f"preparation and 8-bit layers count; here {', '.join(own)}). Make it again from the images: "
                "adpretrain reference, or set_reference; or load the extractor as the one that made it: with its "
                "image_size, resize_mode and decode"
            )
        shape = (len(bank.patches), bank.patches[0].shape[1])
        if shape != (len(self.layers), self.config.hidden_size):
            raise InputError(
                f"the reference bank has {shape[0]} levels of {shape[1]} channels, this extractor "
                f"{len(self.layers)} of {self.config.hidden_size}"
            )
        return bank.to(self.device)

    def _require_reference(self) -> ReferenceBank:
        return self._require_chosen()[1]

    def _require_chosen(self) -> tuple[str, ReferenceBank]:
        """The bank that is chosen, and its category."""
        banks, chosen = self._references
        if chosen is not None:
            return chosen, banks[chosen]
        if banks:
            raise InputError(
                f"references of several products are set ({', '.join(banks)}): give categories, one for each image, or "
                "choose one by set_reference(category=...)"
            )
        raise InputError(
            "no reference is set: call set_reference(images) with a few normal images of the product, or with a saved "
            "bank, before asking for features or scores"
        )

    def _select(self, images: Any, count: int, batch_size: int, progress: bool) -> list[PreparedImage]:
        """So many images that stand for all, in their order."""
        seen, described = list[PreparedImage](), list[Tensor]()
        batches = PreparedBatches(images, self.preprocess, batch_size)
        for batch, features in self._encode_batches(batches, progress, "select"):
            seen += batch
            described.append(describe_images(features))
        chosen = choose_images(torch.cat(described), count).tolist() if seen else []
        return [seen[place] for place in sorted(chosen)]

    @torch.no_grad()
    def _best_augmentation(self, images: list[PreparedImage], batch_size: int) -> str:
        """What ``choose_augmentation`` takes for a bank of these images, each compared with the others."""
        if len(images) < 3:
            expected = "expected at least 3, of which each can be compared with the others"
            raise InputError(f"augment_references is 'auto' with {len(images)} images, {expected}")
        peaks = dict[str, Tensor]()
        for name in AUGMENTATIONS:
            bank = self.make_reference(images, augment_references=name, batch_size=batch_size)
            parts, first = list[Tensor](), 0
            batches = PreparedBatches(images, self.preprocess, batch_size)
            for batch, features in self._encode_batches(batches, False, "auto"):
                residuals = self.residuals(features, bank, own=range(first, first := first + len(batch)))
                maps = anomaly_map(self.projectors(residuals), batch[0].network_size)
                parts.append((maps.amax(dim=(1, 2)) / maps.mean(dim=(1, 2))).log())
            peaks[name] = torch.cat(parts)
        return choose_augmentation(peaks)

    @property
    def _fingerprint(self) -> str:
        """What reference patches are stamped with: those of 8-bit layers are far from the others, at any size."""
        return self._stamp_of(self.config)

    def _stamp_of(self, config: ADPretrainConfig) -> str:
        return config.fingerprint + ("-int8" if self.is_quantized else "")


def _loaded(images: Any) -> Any:
    """A bank, where it is one or the path of one that was saved; images as they are."""
    return ReferenceBank.load(images) if isinstance(images, (str, Path)) and is_bank(images) else images
