"""ReferenceBank: the patches of a few normal images of one category, and residuals against the nearest of them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.coreset import choose_core
from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.files import atomic_path, check_names, read_safetensors
from adpretrain_hf.images import PreparedImage, digests
from adpretrain_hf.matching import nearest_residual, to_rows

_LOG = logging.getLogger(__name__)
_FORMAT = "adpretrain_reference_bank_1"
_UNSEEN = 0.02  # a share of an image that rounding does not explain
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ReferenceBank:
    """The patches of one category's normal images, for every level.

    Made by ``extractor.set_reference`` or ``extractor.make_reference``; kept in a file of its own, never in the
    weights, for categories come and go.

    Args:
        patches: L tensors (K, C), the un-normalised tokens of K patches; float32, float16 or bfloat16.
        fingerprint: ``ADPretrainConfig.fingerprint`` of the extractor that made them.
        category: name of the product, for people.
        num_images: how many images the patches come from, for people.
        compacted: whether they are a choice of those images' patches, see ``compact``.
        images: ``PreparedImage.digest`` of each image, in order, by which it is recognised; empty if not known.
        image_patches: how many patches each image has, in order; empty where all have as many.

    Raises:
        InputError: no patches, shapes that do not belong together, or NaN or infinite values.
    """

    def __init__(
        self,
        patches: Sequence[Tensor],
        *,
        fingerprint: str = "",
        category: str = "",
        num_images: int = 0,
        compacted: bool = False,
        images: Sequence[str] = (),
        image_patches: Sequence[int] = (),
    ) -> None:
        shapes = [tuple(level.shape) for level in patches]
        if not shapes or any(len(shape) != 2 or shape != shapes[0] for shape in shapes) or 0 in shapes[0]:
            raise InputError(f"got reference patches of shapes {shapes}, expected one (K, C) for each level, K >= 1")
        if any(level.dtype not in _DTYPES for level in patches):
            raise InputError(f"got reference patches of {patches[0].dtype}, expected one of {_DTYPES}")
        if not all(level.isfinite().all() for level in patches):
            raise InputError("the reference patches hold NaN or infinite values: check the reference images")
        if image_patches and (len(image_patches), sum(image_patches)) != (num_images, shapes[0][0]):
            raise InputError(
                f"got {num_images} images with {shapes[0][0]} reference patches, expected {len(image_patches)} with "
                f"{sum(image_patches)}, as image_patches says"
            )
        self.patches = list(patches)
        self.fingerprint, self.category = fingerprint, category
        self.num_images, self.compacted, self.images = num_images, compacted, list(images)
        self.image_patches = list(image_patches)
        # The norms are needed by every matching and do not change.
        self._inverse_norms = [1 / level.float().norm(dim=1).clamp_min(1e-12) for level in patches]

    @classmethod
    def from_features(cls, features: Sequence[Tensor], *, fingerprint: str = "", category: str = "") -> "ReferenceBank":
        """Makes a bank of all patches of L feature maps (B, C, h, w)."""
        patches = [to_rows(level).contiguous() for level in features]
        return cls(patches, fingerprint=fingerprint, category=category, num_images=len(features[0]))

    def __len__(self) -> int:
        """K, the number of patches."""
        return len(self.patches[0])

    def __repr__(self) -> str:
        k, c = self.patches[0].shape
        return (
            f"ReferenceBank(category={self.category!r}, {self.num_images} images, {k} patches, {len(self.patches)} "
            f"levels, {c} channels, {self.patches[0].dtype}, fingerprint={self.fingerprint!r})"
        )

    def residuals(
        self, features: Sequence[Tensor], own: Sequence[int | None] = (), levels: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Subtracts from every token its nearest reference patch (paper, section 3.2).

        The nearest one by cosine similarity is sought; the un-normalised one is subtracted. An image whose patches
        are in the bank gets the residual 0.

        Args:
            features: L maps (B, C, h, w).
            own: for each image which of the bank's images it is, from 0, or None: it is compared with the others.
            levels: which of the bank's levels the maps are of, from 0; all by default.

        Returns:
            L maps (B, C, h, w).

        Raises:
            InputError: not as many levels or channels as the bank has; an image that cannot be left out, see
                ``without_image``.
        """
        places = range(len(self.patches)) if levels is None else levels
        channels, shapes = self.patches[0].shape[1], [tuple(level.shape) for level in features]
        if len(shapes) != len(places) or any(len(s) != 4 or s[1] != channels for s in shapes):
            expected = f"{len(places)} levels of (B, {channels}, h, w)"
            raise InputError(f"got feature maps of shapes {shapes}, the bank has {expected}")
        hidden = None
        if any(image is not None for image in own):
            rows = [(0, 0) if image is None else self._rows_of(image) for image in own]
            hidden = torch.tensor(rows, device=features[0].device)
        return [
            nearest_residual(level, self.patches[place], self._inverse_norms[place], hidden)
            for level, place in zip(features, places, strict=True)
        ]

    def without_image(self, index: int) -> "ReferenceBank":
        """The bank of all images but one: what that image itself is compared with, where it shall not find itself.

        Args:
            index: of the image, from 0, in the order that the bank was made in.

        Raises:
            InputError: no such image, no other image, a bank that does not know which patches are whose, or a compacted
                one.
        """
        first, end = self._rows_of(index)
        patches = [torch.cat((level[:first], level[end:])) for level in self.patches]
        images, counts = (
            [value for place, value in enumerate(values) if place != index]
            for values in (self.images, self.image_patches)
        )
        return self._with(patches, num_images=self.num_images - 1, images=images, image_patches=counts)

    def _rows_of(self, index: int) -> tuple[int, int]:
        """Where an image's patches begin and end."""
        if self.compacted:
            raise InputError("cannot leave an image out of a compacted bank: leave it out first, then compact")
        each, rest = divmod(len(self), max(self.num_images, 1))
        counts = self.image_patches or [each] * self.num_images
        if (rest and not self.image_patches) or self.num_images < 2 or not 0 <= index < self.num_images:
            bank = f"a bank of {self.num_images} images with {len(self)} patches"
            expected = "at least 2 images, of equally many patches or with image_patches, and the index of one of them"
            raise InputError(f"cannot leave image {index} out of {bank}: expected {expected}")
        return sum(counts[:index]), sum(counts[: index + 1])

    def compact(self, fraction: float, *, seed: int = 0) -> "ReferenceBank":
        """A bank of fewer patches that stand for all: matching takes time and memory in proportion to their number.

        Every level keeps patches of its own, chosen by ``coreset.choose_core``; the same seed chooses the same ones.

        Args:
            fraction: of the patches to keep, above 0 and at most 1.
            seed: of the choice.

        Raises:
            InputError: a fraction out of its range.
        """
        if not 0 < fraction <= 1:
            raise InputError(f"the fraction of patches to keep is {fraction}, expected a number above 0 and at most 1")
        count = max(1, round(fraction * len(self)))
        if count == len(self):
            return self
        patches = [level[choose_core(level, count, seed=seed)] for level in self.patches]
        return self._with(patches, compacted=True, image_patches=[])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ReferenceBank":
        """A bank on another device or in another precision (itself, if it is there already).

        Raises:
            InputError: the values do not fit the precision.
        """
        patches = [level.to(device=device, dtype=dtype) for level in self.patches]
        if all(new is old for new, old in zip(patches, self.patches, strict=True)):
            return self
        if dtype is not None and not all(level.isfinite().all() for level in patches):
            largest = max(level.abs().max().item() for level in self.patches)
            raise InputError(f"the bank's values, up to {largest:.3g}, do not fit {dtype}: take bfloat16 or float32")
        return self._with(patches)

    def save(self, path: str | Path) -> None:
        """Writes the bank as a safetensors file."""
        tensors = {f"level.{level}": patches.cpu().clone() for level, patches in enumerate(self.patches)}
        with atomic_path(path) as temporary:
            # One entry only: safetensors writes several in any order, and the same bank should give the same bytes.
            save_file(tensors, temporary, metadata={_FORMAT: json.dumps(self._about())})

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceBank":
        """Reads what ``save`` wrote. Whether it fits an extractor is checked when it is given to one.

        Raises:
            MissingPathError: no such file.
            BundleError: not a reference bank, or a damaged one.
        """
        if not Path(path).is_file():
            raise MissingPathError(f"no reference bank at {path}: make one with `adpretrain reference`")
        tensors, metadata = read_safetensors(path)
        if _FORMAT not in metadata:
            raise BundleError(f"{path} is not a reference bank: its metadata lack {_FORMAT!r}")
        check_names(str(path), tensors, {f"level.{level}" for level in range(len(tensors))})
        try:
            return cls([tensors[f"level.{level}"] for level in range(len(tensors))], **json.loads(metadata[_FORMAT]))
        except (InputError, TypeError, json.JSONDecodeError) as error:
            raise BundleError(f"{path}: {error}") from error

    def _about(self) -> dict[str, Any]:
        about = {"fingerprint": self.fingerprint, "category": self.category, "num_images": self.num_images}
        more = {name: getattr(self, name) for name in ("compacted", "images", "image_patches")}
        return about | {name: value for name, value in more.items() if value}

    def _with(self, patches: Sequence[Tensor], **changes: Any) -> "ReferenceBank":
        """The same bank with other patches."""
        return ReferenceBank(patches, **(self._about() | changes))


class RunNotice:
    """Looks at the images of a run for what makes their scores mean something else, and says it once.

    Args:
        bank: that all images are compared with.
    """

    def __init__(self, bank: ReferenceBank) -> None:
        self._bank, self._said = bank, set[str]()
        self._places = {digest: place for place, digest in enumerate(bank.images) if digest}

    def own(self, batch: Sequence[PreparedImage]) -> list[int | None]:
        """For each image which of the bank's images it is, or None; empty where none is, or cannot be left out."""
        for image in batch:
            if image.unseen > _UNSEEN:
                text = "%s: %.0f %% of it are cut off and not looked at; with resize_mode='resize' nothing is"
                self._say(text, image, 100 * image.unseen)
        places = [self._places.get(digest) for digest in digests(batch)] if self._places else []
        own = {place: image for place, image in zip(places, batch, strict=False) if place is not None}
        if not own:
            return []
        first = next(iter(own.values()))
        if self._bank.compacted or self._bank.num_images < 2:
            self._say("%s is a reference itself, and compared with itself: its score says nothing", first)
            return []
        self._say("%s is a reference itself: such images are compared with the other references", first)
        return places

    def _say(self, text: str, image: PreparedImage, *numbers: float) -> None:
        if text not in self._said:
            self._said.add(text)
            _LOG.warning(f"{text} (said once)", image.name, *numbers)


def is_bank(path: str | Path) -> bool:
    """Whether a path is meant as a saved bank: by its ending, or a file of another name by how it begins."""
    if str(path).endswith(".safetensors"):
        return True
    try:
        with open(path, "rb") as file:
            return _FORMAT.encode() in file.read(4096)  # the header of a safetensors file comes first
    except OSError:
        return False


def residuals_per_image(
    features: Sequence[Tensor], banks: Sequence[ReferenceBank], levels: Sequence[int] | None = None
) -> list[Tensor]:
    """Residuals of a batch in which every image has its own bank, as where categories are mixed.

    Args:
        features: L maps (B, C, h, w).
        banks: B banks; one that several images share is matched once for all of them.
        levels: see ``ReferenceBank.residuals``.

    Returns:
        L maps (B, C, h, w).

    Raises:
        InputError: not one bank for each image.
    """
    if len(banks) != len(features[0]):
        raise InputError(f"got {len(banks)} reference banks for {len(features[0])} images, expected one for each")
    residuals = [torch.empty_like(level) for level in features]
    for bank in {id(bank): bank for bank in banks}.values():
        rows = torch.tensor([i for i, own in enumerate(banks) if own is bank], device=features[0].device)
        parts = bank.residuals([level[rows] for level in features], levels=levels)
        for level, part in zip(residuals, parts, strict=True):
            level[rows] = part
    return residuals
