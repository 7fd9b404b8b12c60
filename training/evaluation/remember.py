"""Features of images that were seen before are looked up: the networks that make them are frozen.

Detectors pass over the same images again and again, and those of one category share them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.reference import ReferenceBank
from training.evaluation.memory import Memory, exact_digest, look_up

if TYPE_CHECKING:  # importing anomalib takes seconds
    from adpretrain_hf.integrations.anomalib import DetectorFeatures


class RememberedBackbone(nn.Module):
    """A backbone that remembers the tokens of images.

    Args:
        backbone: a frozen network: images (B, 3, H, W) to L maps (B, C, h, w).
        memory: for one backbone only.
    """

    def __init__(self, backbone: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.backbone, self._memory = backbone, memory

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to L maps (B, C, h, w)."""
        keys = [("tokens", exact_digest(image)) for image in images]
        return look_up(self._memory, keys, lambda place: self.backbone(images[place : place + 1]))


@dataclass(frozen=True)
class CategoryReferences:
    """The references of one category.

    Attributes:
        bank: their patches.
        names: paths of the bank's images, in its order; empty where they are not known.
    """

    bank: ReferenceBank
    names: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> bytes:
        """The identity of the bank, of all its values."""
        return b"".join(exact_digest(level) for level in self.bank.patches)

    def place_of(self, name: str) -> int | None:
        """Which of the bank's images has this path."""
        return self.names.index(name) if name in self.names else None


_Compared = tuple[CategoryReferences | None, int | None]  # with what an image is, and which of them it is itself


class RememberedFeatures(nn.Module):
    """``DetectorFeatures`` that remember, and know several categories; they have the same attributes.

    Args:
        features: make what is not remembered.
        memory: for extractors of one bundle only.
        references: for the path of each training image the references of its category; those that are set, by default.
    """

    def __init__(
        self, features: DetectorFeatures, memory: Memory, references: Mapping[str, CategoryReferences] | None = None
    ) -> None:
        super().__init__()
        self.inner, self._memory = features, memory
        self.layers, self.out_dims = features.layers, features.out_dims
        self._references = dict(references or {})
        self._set: CategoryReferences | None = None
        self._noted: list[_Compared] = []

    @property
    def extractor(self) -> ADPretrainFeatureExtractor:
        """See ``DetectorFeatures``."""
        return self.inner.extractor

    @property
    def needs_reference(self) -> bool:
        """See ``DetectorFeatures``."""
        return self.inner.needs_reference

    @property
    def own(self) -> list[int | None]:
        """See ``DetectorFeatures``."""
        return [place for _, place in self._noted]

    def set_reference(self, references: Any, names: Sequence[str] = ()) -> None:
        """See ``DetectorFeatures``."""
        self.inner.set_reference(references, names)
        bank = self.extractor.reference
        self._set = None if bank is None else CategoryReferences(bank, self.inner.names)

    def note_own(self, names: Sequence[str]) -> None:
        """Says by their paths which images the next batch holds; see ``DetectorFeatures``."""
        references = [self._references.get(str(name), self._set) for name in names]
        places = [None if one is None else one.place_of(str(name)) for one, name in zip(references, names, strict=True)]
        self._noted = list(zip(references, places, strict=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, H, W) to ``{"layer<n>": (B, C, h, w)}``."""
        compared = self._noted or [(self._set, None)] * len(images)
        keys = [self._key(image, *one) for image, one in zip(images, compared, strict=True)]
        maps = look_up(self._memory, keys, lambda place: self._compute(images[place : place + 1], *compared[place]))
        return dict(zip(self.layers, maps, strict=True))

    def _key(self, image: Tensor, references: CategoryReferences | None, own: int | None) -> Hashable:
        key = (self.inner.kind, *self.layers, exact_digest(image))
        if not self.needs_reference or references is None:
            return key
        return (*key, self.extractor.variant, references.digest, own, bool(self._noted))

    def _compute(self, image: Tensor, references: CategoryReferences | None, own: int | None) -> list[Tensor]:
        if references is not None:
            self.inner.set_reference(references.bank, references.names)
        self.inner.own = [own] if self._noted else []  # in training alone images of the bank are looked for
        return list(self.inner(image).values())
