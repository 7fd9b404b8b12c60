"""EncodedImages: an image is encoded once, and all kinds of features are made of its tokens.

Detectors pass over the same images again and again, kinds of features and draws of references share them, and the
backbone is frozen. Tokens lie in a file that is mapped into memory: what is not used leaves the memory by itself.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import OnError, PreparedImage, read_ahead, stack
from adpretrain_hf.matching import to_rows
from adpretrain_hf.reference import ReferenceBank
from training.data.slots import SlotFile
from training.data.table import prepare_entry, seen_mask
from training.evaluation.detectors import PublishedDetector

FEATURES = ("raw", "residual", "pretrained")  # in the paper's order
MakeFeatures = Callable[[Tensor], list[Tensor]]  # places (n,) -> L maps (n, C, h, w)
_BATCH = 64  # images that a GPU encodes at a time


class EncodedImages:
    """N images of one shape, their tokens and what the network sees of their masks, made when first asked for.

    On a CPU images are encoded one at a time: what a network makes of one differs in the last bits with the others of
    its batch, and a run that was interrupted should give what one in a piece does.

    Args:
        extractor: whose backbone encodes; its projectors are not used.
        images: N encoded images, see ``read_encoded``.
        masks: N encoded masks, or None.
        file: that the tokens are kept in, begun anew.

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
        self._file: SlotFile | None = None
        self._encoded: dict[int, Tensor | None] = {}  # their masks, (H, W) bool, or None without one
        self._places: dict[bytes, int] = {}  # by the values of the prepared images
        self.size = self._grid = (0, 0)

    @torch.no_grad()
    def encode(self, places: Iterable[int], on_error: OnError | None = None) -> list[int]:
        """Encodes those of some images that are not yet.

        Args:
            places: of the images, from 0.
            on_error: called with the name and the error of an image that cannot be used, or whose mask cannot; by
                default the error is raised.

        Returns:
            The places of the images that can be used.

        Raises:
            ImageError: an image or its mask cannot be used.
            InputError: the images are of different shapes, or the disk is full.
        """
        extractor, wanted = self._extractor, list(places)
        missing = [place for place in dict.fromkeys(wanted) if place not in self._encoded]
        calls = ((place, partial(self._prepare, place)) for place in missing)
        size = _BATCH if extractor.device.type == "cuda" else 1
        tell = None if on_error is None else lambda place, error: on_error(self._names[place], error)
        ahead = read_ahead(calls, lambda: 2 * size, tell)
        for batch in iter(lambda: list(islice(ahead, size)), []):
            images = [image for _, (image, _, _) in batch]
            for image in images:
                self._check_size(image)
            maps = extractor.backbone(stack(images, extractor.device).to(extractor.dtype))
            tokens = torch.stack([level.flatten(2).mT for level in maps], dim=1).cpu()  # (B, L, P, C)
            self._grid = (maps[0].shape[2], maps[0].shape[3])
            for (place, (_, mask, digest)), own in zip(batch, tokens, strict=True):
                self._keep(place, mask, digest, own)
        return [place for place in wanted if place in self._encoded]

    def tokens(self, places: Tensor) -> list[Tensor]:
        """What the backbone makes of some images: L maps (n, C, h, w), on its device."""
        self.encode(places.tolist())
        assert self._file is not None
        rows = self._file.values[places].to(self._extractor.device)  # (n, L, P, C)
        return [level.mT.unflatten(2, self._grid) for level in rows.unbind(1)]

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

    def find(self, digest: bytes) -> int | None:
        """The place of a prepared image among those that are encoded, by a digest of all its values."""
        return self._places.get(digest)

    def _prepare(self, place: int) -> tuple[PreparedImage, Tensor | None, bytes]:
        """An image, its mask, and the digest of its values; in a thread."""
        preprocess, mask = self._extractor.preprocess, self._masks[place]
        prepared = prepare_entry(self._images[place], preprocess, self._names[place])
        seen = None if mask is None else seen_mask(mask, prepared, preprocess)
        return prepared, seen, _digest(prepared.tensor)

    def _check_size(self, image: PreparedImage) -> None:
        self.size = self.size if any(self.size) else image.network_size
        if image.network_size != self.size:
            raise InputError(
                f"prepared images of different shapes {sorted({self.size, image.network_size})} cannot be compared, "
                f"such as {image.name}: give --resize-mode crop, or images of one shape"
            )

    def _keep(self, place: int, mask: Tensor | None, digest: bytes, tokens: Tensor) -> None:
        if self._file is None:
            self._path.unlink(missing_ok=True)
            slots, shape = len(self._images), tokens.shape
            self._file = SlotFile(self._path, identity="tokens", slots=slots, shape=shape, dtype=tokens.dtype)
        self._file.write(place, "", tokens)
        self._encoded[place] = mask
        self._places[digest] = place


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
def score_images(
    detector: PublishedDetector, make: MakeFeatures, images: Tensor, encoded: EncodedImages, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Maps (n, H, W) and scores (n,), on the CPU, that a detector gives encoded images at places (n,), in batches."""
    scored = [detector.score(make(part), encoded.size) for part in images.split(batch_size)]
    maps, scores = (torch.cat([one.cpu() for one in parts]) for parts in zip(*scored, strict=True))
    return maps, scores


class EncodedBackbone(nn.Module):
    """A backbone that looks up the tokens of images that are encoded already; others it encodes, synthetic ones e.g.

    Args:
        backbone: a frozen network: images (B, 3, H, W) to L maps (B, C, h, w).
        encoded: by the same one.
    """

    def __init__(self, backbone: nn.Module, encoded: Sequence[EncodedImages]) -> None:
        super().__init__()
        self.backbone, self._encoded = backbone, list(dict.fromkeys(encoded))

    def forward(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Images (B, 3, H, W) to L maps (B, C, h, w), or some of them; see ``Backbone``."""
        found = [self._find(image) for image in images]
        new = [place for place, tokens in enumerate(found) if tokens is None]
        maps = self.backbone(images[new]) if new else []
        for row, place in enumerate(new):
            found[place] = [level[row] for level in maps]
        levels, backbone = list(zip(*found, strict=True)), cast(Any, self.backbone)
        places = range(len(levels)) if layers is None else [backbone.layers.index(layer) for layer in layers]
        return [torch.stack(levels[place]).to(images.device) for place in places]

    def _find(self, image: Tensor) -> list[Tensor] | None:
        digest = _digest(image)
        for encoded in self._encoded:
            if (place := encoded.find(digest)) is not None:
                return [level[0] for level in encoded.tokens(torch.tensor([place]))]
        return None


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.detach().float().cpu().contiguous().numpy().data, digest_size=16).digest()
