"""ReferenceBank: the patches of a few normal images of one category, and residuals against the nearest of them."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from adpretrain_hf.errors import BundleError, InputError, MissingPathError, one_of
from adpretrain_hf.files import atomic_path, check_names, read_safetensors
from adpretrain_hf.images import PreparedImage, Tiles, to_device
from adpretrain_hf.matching import nearest_residual, to_rows
from adpretrain_hf.reference.coreset import choose_core
from adpretrain_hf.scoring import BY_MAXIMUM, Judgement, region_mask

_FORMAT = "adpretrain_reference_bank_1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OF_IMAGES = {"num_images", "images", "image_patches"}  # in what banks that are added may differ


class ReferenceImage(NamedTuple):
    """What a bank knows of one of its images; texts that are not known are empty.

    Attributes:
        name: of its file, without folders, or its place in the list; for people.
        digest: ``PreparedImage.digest``, by which it is recognised.
    """

    name: str = ""
    digest: str = ""

    @classmethod
    def of(cls, image: PreparedImage) -> "ReferenceImage":
        """An image as a bank knows it: a file that others get to see says nothing of this machine's folders."""
        return cls(os.path.basename(image.name), image.digest)


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
        images: names and digests of the images, in order, or digests alone; empty if not known.
        image_patches: how many patches each image has, in order; empty where all have as many.
        judgement: how the product's maps become scores and decisions; as a dict where it comes from a file.
        augmentation: which copies of the images are in the bank, too, as ``make_reference`` calls them; empty for none.
            An image's patches are its own and then those of its copies.
        tiles: how the images are cut into windows, and those that are compared with them; ``Tiles`` or what it takes.
        grid: rows and columns of the windows of every image, where each window is compared with the patches of its own
            place alone. The patches of all images' first windows come first then, and so on.

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
        images: Sequence[ReferenceImage | str] = (),
        image_patches: Sequence[int] = (),
        judgement: Judgement | Mapping[str, Any] = BY_MAXIMUM,
        augmentation: str = "",
        tiles: Any = None,
        grid: Sequence[int] = (),
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
        self.tiles, self.grid = Tiles.of(tiles), tuple(grid)
        self._windows = math.prod(self.grid)  # that do not share their patches; 1 without a grid
        if shapes[0][0] % self._windows:
            raise InputError(f"got {shapes[0][0]} reference patches, expected as many for each of {grid} windows")
        self.patches = list(patches)
        self.fingerprint, self.category = fingerprint, category
        self.num_images, self.compacted = num_images, compacted
        # Of a file they come as lists, or, where an earlier version wrote it, as digests.
        self.images = [ReferenceImage("", one) if isinstance(one, str) else ReferenceImage(*one) for one in images]
        self.image_patches, self.augmentation = list(image_patches), augmentation
        self.judgement = judgement if isinstance(judgement, Judgement) else Judgement.from_dict(judgement)
        self.said = set[str]()  # warnings about it
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
            f"levels, {c} channels, {self.patches[0].dtype}, fingerprint={self.fingerprint!r}"
            + (f", augmentation={self.augmentation!r}" if self.augmentation else "")
            + (f", tiles={self.tiles}, tile_reference={self.tile_reference!r})" if self.tiles else ")")
        )

    @property
    def options(self) -> dict[str, Any]:
        """By what ``make_reference`` makes a bank of the same kind, but for a calibration."""
        judgement, tiles = self.judgement, {"tiles": self.tiles, "tile_reference": self.tile_reference}
        return (tiles if self.tiles else {}) | {
            "augment_references": self.augmentation or "none",
            "image_score": judgement.image_score,
            "top": None if judgement.image_score == "max" else judgement.top,
            "region": None if judgement.region is None else region_mask(judgement.region).numpy(),
        }

    @property
    def tile_reference(self) -> str:
        """What a window is compared with: the patches of its own place, ``"window"``, or ``"all"``."""
        return "window" if self.grid else "all"

    def residuals(
        self,
        features: Sequence[Tensor],
        own: Sequence[int | None] = (),
        levels: Sequence[int] | None = None,
        windows: Sequence[int] = (),
    ) -> list[Tensor]:
        """Subtracts from every token its nearest reference patch (paper, section 3.2).

        The nearest one by cosine similarity is sought; the un-normalised one is subtracted. An image whose patches
        are in the bank gets the residual 0.

        Args:
            features: L maps (B, C, h, w).
            own: for each image which of the bank's images it is, from 0, or None: it is compared with the others.
            levels: which of the bank's levels the maps are of, from 0; all by default.
            windows: for each image which window of its grid it is, from 0, row by row, where the bank has a grid.

        Returns:
            L maps (B, C, h, w).

        Raises:
            InputError: not as many levels or channels as the bank has; an image that cannot be left out, see
                ``remove``; a bank with a grid, and images that are not said to be windows.
        """
        places = range(len(self.patches)) if levels is None else levels
        channels, shapes = self.patches[0].shape[1], [tuple(level.shape) for level in features]
        if len(shapes) != len(places) or any(len(s) != 4 or s[1] != channels for s in shapes):
            expected = f"{len(places)} levels of (B, {channels}, h, w)"
            raise InputError(f"got feature maps of shapes {shapes}, the bank has {expected}")
        hidden = None
        if any(image is not None for image in own):
            rows = [(0, 0) if image is None else self._rows_of(image) for image in own]
            hidden = to_device(torch.tensor(rows), features[0].device, torch.long)
        which = None
        if self._windows > 1:
            if len(windows) != len(features[0]):
                grid = " x ".join(map(str, self.grid))
                raise InputError(
                    f"{len(windows)} of {len(features[0])} images are said to be windows, and the bank has references "
                    f"for each of {grid} windows: give images to score, extract or stream, which know"
                )
            which = to_device(torch.tensor(windows), features[0].device, torch.long)
        return [
            nearest_residual(level, self.patches[place], self._inverse_norms[place], hidden, which, self._windows)
            for level, place in zip(features, places, strict=True)
        ]

    def __add__(self, other: "ReferenceBank") -> "ReferenceBank":
        """The bank of the images of both, as if it had been made of all of them at once.

        It has the precision and the device of the first. A core-set and a whole bank do not go together.

        Raises:
            InputError: the banks are of different extractors, products or kinds, have an image in common, or do not
                know which patches are whose.
        """
        if not isinstance(other, ReferenceBank):
            return NotImplemented
        self._check_kind(other)
        counts = [bank._counts() for bank in (self, other)]
        if not self.compacted and not all(counts):
            raise InputError("a reference bank that does not know which patches are whose cannot be added to another")
        unequal = len({*counts[0], *counts[1]}) > 1
        other = other.to(self.patches[0].device, self.patches[0].dtype)
        images = [bank.images or [ReferenceImage()] * bank.num_images for bank in (self, other)]
        by_window = zip(*([*bank._by_window()] for bank in (self, other)), strict=True)
        return self._with(
            [torch.cat(levels, dim=1).flatten(0, 1) for levels in by_window],
            category=self.category or other.category,
            num_images=self.num_images + other.num_images,
            images=images[0] + images[1] if self.images or other.images else [],
            image_patches=counts[0] + counts[1] if unequal else [],
        )

    def remove(self, image: int | str) -> "ReferenceBank":
        """The bank of all images but one, such as one that turned out to have a defect.

        Args:
            image: its place among ``images``, from 0, or its name there.

        Raises:
            InputError: no such image, no other image, a bank that does not know which patches are whose, or a compacted
                one.
        """
        index = self._place_of(image) if isinstance(image, str) else image
        first, end = self._rows_of(index)
        patches = [torch.cat((rows[:, :first], rows[:, end:]), dim=1).flatten(0, 1) for rows in self._by_window()]
        images, counts = (
            [value for place, value in enumerate(values) if place != index]
            for values in (self.images, self.image_patches)
        )
        return self._with(patches, num_images=self.num_images - 1, images=images, image_patches=counts)

    @property
    def leaves_out(self) -> bool:
        """Whether one of its images can be compared with the others."""
        return not self.compacted and self.num_images > 1

    without_image = remove  # what an image that is itself among the references is compared with

    def _check_kind(self, other: "ReferenceBank") -> None:
        """Raises InputError if another bank is of another kind, or has an image of this one."""
        mine, theirs = (
            {"levels": len(bank.patches), "channels": bank.patches[0].shape[1]}
            | bank.judged(bank.judgement.calibrated(None))._about()
            for bank in (self, other)
        )
        own = {"category"} if "" in (self.category, other.category) else set()
        names = [name for name in {**mine, **theirs} if name not in own | _OF_IMAGES]
        if differing := [name for name in names if mine.get(name) != theirs.get(name)]:
            found = f"{', '.join(differing)}: {[(mine.get(name), theirs.get(name)) for name in differing]}"
            raise InputError(f"reference banks that differ cannot be added, got other values of {found}")
        common = {image.digest for image in self.images} & {image.digest for image in other.images} - {""}
        if twice := [image.name or image.digest for image in other.images if image.digest in common]:
            raise InputError(f"both reference banks have the images {', '.join(twice)}: remove them from one")

    def _place_of(self, name: str) -> int:
        names = [image.name for image in self.images]
        if names.count(name) != 1:
            found = f"{names.count(name)} images of the bank are called {name!r}"
            raise InputError(f"{found}: {one_of(name, names)}, or its place, from 0")
        return names.index(name)

    def _by_window(self) -> Iterator[Tensor]:
        """The levels as (T, K / T, C), of T windows that do not share their patches; 1 without a grid."""
        return (level.unflatten(0, (self._windows, -1)) for level in self.patches)

    def _counts(self) -> list[int]:
        """How many patches each image has; empty where that is not known, as of a compacted bank."""
        each, rest = divmod(len(self), max(self.num_images, 1))
        return self.image_patches or ([] if self.compacted or rest else [each] * self.num_images)

    def _rows_of(self, index: int) -> tuple[int, int]:
        """Where an image's patches begin and end; with a grid, among those of each window."""
        if self.compacted:
            raise InputError("cannot leave an image out of a compacted bank: leave it out first, then compact")
        counts = self._counts()
        if len(counts) < 2 or not 0 <= index < len(counts):
            bank = f"a bank of {self.num_images} images with {len(self)} patches"
            expected = "at least 2 images, of equally many patches or with image_patches, and the index of one of them"
            raise InputError(f"cannot leave image {index} out of {bank}: expected {expected}")
        return sum(counts[:index]) // self._windows, sum(counts[: index + 1]) // self._windows

    def of_levels(self, places: Sequence[int], fingerprint: str) -> "ReferenceBank":
        """The bank of some levels, from 0, for the extractor of these alone."""
        return self._with([self.patches[place] for place in places], fingerprint=fingerprint)

    def compact(self, fraction: float, *, seed: int = 0) -> "ReferenceBank":
        """A bank of fewer patches that stand for all: matching takes time and memory in proportion to their number.

        Every level, and of a grid every window, keeps patches of its own, chosen by ``coreset.choose_core``; the same
        seed chooses the same ones.

        Args:
            fraction: of the patches to keep, above 0 and at most 1.
            seed: of the choice.

        Raises:
            InputError: a fraction out of its range.
        """
        if not 0 < fraction <= 1:
            raise InputError(f"the fraction of patches to keep is {fraction}, expected a number above 0 and at most 1")
        each = len(self) // self._windows
        count = max(1, round(fraction * each))
        if count == each:
            return self
        patches = [
            torch.cat([rows[choose_core(rows, count, seed=seed)] for rows in level.split(each)])
            for level in self.patches
        ]
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
        same_values = dtype in (None, self.patches[0].dtype)
        return self._with(patches, **({"judgement": self.judgement} if same_values else {}))

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
        more = {name: getattr(self, name) for name in ("compacted", "images", "image_patches", "augmentation", "grid")}
        more["tiles"] = self.tiles and self.tiles.to_dict()
        if self.judgement != BY_MAXIMUM:
            more["judgement"] = self.judgement.to_dict()
        return about | {name: value for name, value in more.items() if value}

    def judged(self, judgement: Judgement) -> "ReferenceBank":
        """The same patches with another judgement."""
        return ReferenceBank(self.patches, **(self._about() | {"judgement": judgement}))

    def _with(self, patches: Sequence[Tensor], **changes: Any) -> "ReferenceBank":
        """The same bank with other patches, whose scores no calibration is known of."""
        return ReferenceBank(patches, **(self._about() | {"judgement": self.judgement.calibrated(None)} | changes))


def is_bank(path: str | Path) -> bool:
    """Whether a path is meant as a saved bank: by its ending, or a file of another name by how it begins."""
    if str(path).endswith(".safetensors"):
        return True
    try:
        with open(path, "rb") as file:
            return _FORMAT.encode() in file.read(4096)  # the header of a safetensors file comes first
    except OSError:
        return False
