"""EncodedImages: an image is encoded once, and all kinds of features are made of its tokens.

Detectors pass over the same images again and again, kinds of features and draws of references share them, and the
backbone is frozen. Tokens lie in a file that is mapped into memory: what is not used leaves the memory by itself.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import PreparedImage, stack
from adpretrain_hf.matching import to_rows
from adpretrain_hf.reference import ReferenceBank
from training.data.slots import SlotFile
from training.data.table import Row, prepare_entry, seen_mask
from training.evaluation.detectors import PublishedDetector
from training.references import encode_ahead

FEATURES = ("raw", "residual", "pretrained")  # in the paper's order
MakeFeatures = Callable[[Tensor], list[Tensor]]  # places (n,) -> L maps (n, C, h, w)
Loaded = tuple[PreparedImage, Tensor | None, bytes]  # an image, its mask (H, W) bool, the digest of its values


class EncodedImages:
    """N images of one shape, their tokens and what the network sees of their masks, made when first asked for.

    What an image is encoded to does not depend on the others, see ``encode_ahead``: a run that was interrupted should
    give what one in a piece does.

    Args:
        extractor: whose backbone encodes; its projectors are not used.
        images: N encoded images, see ``read_encoded``.
        masks: N encoded masks, or None.
        file: that the tokens are kept in. It has a name for a moment only: its room is given back with these images,
            and when the program is killed.

    Attributes:
        size: H and W of the network's input, once an image has been read.
    """

    def __init__(
        self,
        extractor: ADPretrainFeatureExtractor,
        images: Sequence[Mapping[str, Any]],
        masks: Sequence[Mapping[str, Any] | None],
        file: Path,
    ) -> None:
        self._extractor, self._images, self._masks, self._path = extractor, images, masks, file
        self._names = [str(image["path"] or f"image {place}") for place, image in enumerate(images)]
        self._places = {name: place for place, name in enumerate(self._names)}
        self._file: Any = None  # a SlotFile, once it is known how many tokens an image has
        self._encoded: dict[int, Tensor | None] = {}  # their masks, (H, W) bool, or None without one
        self._digests: dict[bytes, int] = {}  # places by the values of the prepared images
        self.size = (0, 0)

    def places(self, rows: Sequence[Row]) -> Tensor:
        """Where the images of some rows are among these, (n,), from 0."""
        return torch.tensor([self._places[row.image] for row in rows])

    @torch.no_grad()
    def encode(self, places: Sequence[int], on_error: Callable[[int, ImageError], None] | None = None) -> list[int]:
        """Encodes those of some images that are not yet.

        Args:
            places: of the images.
            on_error: called with the place and the error of an image that cannot be used, or whose mask cannot; by
                default the error is raised.

        Returns:
            The places of the images that can be used.

        Raises:
            ImageError: an image or its mask cannot be used.
            InputError: the images are of different shapes, or the disk is full.
        """
        missing = [place for place in dict.fromkeys(places) if place not in self._encoded]
        calls = ((place, partial(self._load, place)) for place in missing)
        for place, (_, mask, digest), tokens in encode_ahead(calls, self._encode, self._extractor.device, on_error):
            if self._file is None:
                slots, shape = len(self._images), tokens.shape
                self._file = SlotFile(self._path, slots=slots, shape=shape, dtype=tokens.dtype)
                self._path.unlink()
            self._file.write(place, tokens)
            self._encoded[place], self._digests[digest] = mask, place
        return [place for place in places if place in self._encoded]

    def tokens(self, places: Tensor) -> list[Tensor]:
        """What the backbone makes of some images: L maps (n, C, h, w), on its device."""
        self.encode(places.tolist())
        rows = self._file.values[places].to(self._extractor.device)  # (n, L, P, C)
        height = self.size[0] // self._extractor.config.patch_size
        return [level.mT.unflatten(2, (height, -1)) for level in rows.unbind(1)]

    def masks(self, places: Tensor) -> Tensor:
        """The masks of some images as the network sees them, (n, H, W), bool; nothing where there is none."""
        self.encode(places.tolist())
        none = torch.zeros(self.size, dtype=torch.bool)
        found = (self._encoded[place] for place in places.tolist())
        return torch.stack([none if mask is None else mask for mask in found])

    def bank(self, places: Sequence[int]) -> ReferenceBank:
        """Some images as references."""
        levels = [to_rows(level) for level in self._extractor.comparable(self.tokens(torch.tensor(places)))]
        return ReferenceBank(levels, num_images=len(places))

    def find(self, digest: bytes) -> list[Tensor] | None:
        """What an image is encoded to, L maps (C, h, w), if it is one that is, by a digest of its prepared values."""
        place = self._digests.get(digest)
        return None if place is None else [level[0] for level in self.tokens(torch.tensor([place]))]

    def _load(self, place: int) -> Loaded:
        preprocess, mask = self._extractor.preprocess, self._masks[place]
        prepared = prepare_entry(self._images[place], preprocess, self._names[place])
        seen = None if mask is None else seen_mask(mask, prepared, preprocess)
        return prepared, seen, _digest(prepared.tensor)

    def _encode(self, loaded: list[Loaded]) -> list[Tensor]:
        images = [image for image, _, _ in loaded]
        self.size = self.size if any(self.size) else images[0].network_size
        for image in images:
            if image.network_size != self.size:
                raise InputError(
                    f"prepared images of different shapes {sorted({self.size, image.network_size})} cannot be "
                    f"compared, such as {image.name}: give --resize-mode crop, or images of one shape"
                )
        return self._extractor.backbone(stack(images, self._extractor.device).to(self._extractor.dtype))


def feature_maker(
    encoded: EncodedImages, extractor: ADPretrainFeatureExtractor, kind: str, references: Sequence[int]
) -> MakeFeatures:
    """How features of encoded images are made.

    Args:
        encoded: the images.
        extractor: of their backbone, with the projectors that are wanted.
        kind: ``"raw"``, the backbone's tokens; ``"residual"``, what the projectors are given; ``"pretrained"``.
        references: places of the images that residuals are taken against. One of them is compared with the others.
    """
    if kind == "raw":
        return lambda images: [level.float() for level in encoded.tokens(images)]
    bank = encoded.bank(references)
    place_of = {image: place for place, image in enumerate(references)} if len(references) > 1 else {}

    @torch.no_grad()
    def make(images: Tensor) -> list[Tensor]:
        own = [place_of.get(image) for image in images.tolist()]
        maps = extractor.residuals(extractor.comparable(encoded.tokens(images)), bank, own=own)
        return [level.float() for level in (maps if kind == "residual" else extractor.projectors(maps))]

    return make


@torch.no_grad()
def fit_and_score(
    detector: PublishedDetector, make: MakeFeatures, train: Tensor, test: Tensor, encoded: EncodedImages, at_a_time: int
) -> tuple[Tensor, Tensor]:
    """Maps (n, H, W) and scores (n,), on the CPU, of images at places ``test`` by a detector that is fitted on others.

    All features of the images to fit on are in memory, those of the others batch by batch.
    """
    parts = [make(part) for part in train.split(at_a_time)]
    detector.fit([torch.cat(level) for level in zip(*parts, strict=True)])
    del parts  # as large as what the detector keeps
    scored = [detector.score(make(part), encoded.size) for part in test.split(at_a_time)]
    maps, scores = (torch.cat([one.cpu() for one in own]) for own in zip(*scored, strict=True))
    return maps, scores


class EncodedBackbone(nn.Module):
    """A frozen backbone that looks up the tokens of images that it has encoded; it encodes others, synthetic ones."""

    def __init__(self, backbone: nn.Module, encoded: Sequence[EncodedImages]) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self._encoded = list(dict.fromkeys(encoded))

    def forward(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Images (B, 3, H, W) to L maps (B, C, h, w), or some of them; see ``Backbone``."""
        found = [self._find(_digest(image)) for image in images]
        new = [place for place, tokens in enumerate(found) if tokens is None]
        maps = self.backbone(images[new]) if new else []
        for row, place in enumerate(new):
            found[place] = [level[row] for level in maps]
        levels = list(zip(*found, strict=True))
        places = range(len(levels)) if layers is None else [self.backbone.layers.index(layer) for layer in layers]
        return [torch.stack(levels[place]).to(images.device) for place in places]

    def _find(self, digest: bytes) -> list[Tensor] | None:
        return next((tokens for one in self._encoded if (tokens := one.find(digest)) is not None), None)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.detach().float().cpu().contiguous().numpy().data, digest_size=16).digest()
