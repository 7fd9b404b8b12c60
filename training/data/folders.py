"""Data sets of plain folders: MVTecAD, MPDD, BTAD, MVTec3D-AD, VisA, and anyone's own images in MVTecAD's layout.

One reader for training and for evaluation. Listed here, not by anomalib: that refuses paths outside ASCII, reads seven
suffixes, does not say which file it stumbles over, and pairs masks by their places in sorted lists, which differ for
``1.png``, ``10.png`` and their masks; and VisA it copies into another layout first, which takes its size on disk again.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import SUFFIXES, find_images
from training.data.table import Row, refuse, refuse_shared

_PARTS = ("train", "test")
_VISA_SPLIT = "split_csv/1cls.csv"
_VISA_COLUMNS = ["object", "split", "label", "image", "mask"]


@dataclass(frozen=True)
class Category:
    """One category, in order of the images' paths.

    Attributes:
        data_set: its name in ``LAYOUTS``, or ``"realiad"``.
        name: of the category.
        train: the images that are meant for training; normal ones.
        test: normal and anomalous images.
    """

    data_set: str
    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]

    @classmethod
    def of(cls, data_set: str, name: str, train: Iterable[Row], test: Iterable[Row]) -> "Category":
        """A category of images in any order.

        Raises:
            InputError: masks of a lossy kind, or one of several images.
        """
        parts = [tuple(sorted(rows, key=lambda row: Path(row.image))) for rows in (train, test)]
        refuse_shared(chain(*parts), f"the category {name!r} of {data_set}")
        masks = [row.mask for part in parts for row in part if row.mask]
        lossy = [mask for mask in masks if mask.lower().endswith((".jpg", ".jpeg", ".webp", ".gif"))]
        exact = "whatever is not 0 is a defect, and they do not keep 0: convert them to PNG, 0 where there is none"
        refuse(lossy, f"masks of the category {name!r} of {data_set} are no PNG, BMP, TIFF or PGM", exact)
        return cls(data_set, name, *parts)


class Layout(NamedTuple):
    """How a data set is read; nothing is ever downloaded, and nothing decoded.

    Attributes:
        names: of the categories in a folder.
        read: one of them.
    """

    names: Callable[[Path], list[str]]
    read: Callable[[Path, str], Category]


def layout_of(root: Path) -> str:
    """Which of ``LAYOUTS`` a folder has; ``"images"`` where it holds nothing but images itself.

    Raises:
        InputError: none of them.
    """
    if (root / _VISA_SPLIT).is_file():
        return "visa"
    for name in ("mvtec3d", "btad", "folder"):
        if LAYOUTS[name].names(root):
            return name
    folders = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if folders or not find_images(root):
        raise InputError(
            f"{root} is in no layout that is known: expected <category>/train/good and beside it, if there are any, "
            "test/<kind> and ground_truth/<kind> (as MVTecAD), VisA, BTAD, MVTec3D-AD, RealIAD, or images of one "
            f"product without damage and nothing else; there are {', '.join(folders[:10]) or 'no images'}"
        )
    return "images"


def _names_with(training: str) -> Callable[[Path], list[str]]:
    """Lists the folders that have images to train on in a subfolder, e.g. ``train/good``."""
    return lambda root: sorted(folder.name for folder in root.iterdir() if (folder / training).is_dir())


def _own_names(root: Path) -> list[str]:
    """The categories of a folder; its own name, if it is one category itself."""
    return [root.name] if (root / "train/good").is_dir() else _names_with("train/good")(root)


def _read_mvtecad(data_set: str, normal: str, root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/``, masks in ``ground_truth/<kind>/<stem>_mask.png`` or ``<stem>.png``.

    Of your own images ``test`` and masks may be left out, and the folder may be the category itself.
    """
    own = data_set == "folder"
    base = root if own and (root / "train" / normal).is_dir() else root / name
    _refuse_relatives(base)
    images = {part: find_images(base / part) if (base / part).is_dir() or not own else [] for part in _PARTS}
    masks = find_images(base / "ground_truth") if (base / "ground_truth").is_dir() else []
    pairs = _paired_masks(base, images["test"], masks, normal) if masks or not own else {}
    return _category(data_set, base, images, pairs, normal)


def _read_mvtec3d(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/{rgb,gt}/``; depth is not used, validation images are left out."""
    base = root / name
    images = {part: [path for path in find_images(base / part) if path.parent.name == "rgb"] for part in _PARTS}
    return _category("mvtec3d", base, images, {path: path.parents[1] / "gt" / path.name for path in images["test"]})


def _read_images(root: Path, name: str) -> Category:
    """Images of one product, all without damage."""
    return Category.of("images", name, (_row(path, None, name, "good", False) for path in find_images(root)), ())


def _visa_names(root: Path) -> list[str]:
    """The categories that the published split names."""
    return sorted({row["object"] for row in _visa_split(root)})


def _read_visa(root: Path, name: str) -> Category:
    """``<category>/Data/Images/{Normal,Anomaly}/*.JPG`` and ``Data/Masks/Anomaly/*.png``, split by ``1cls.csv``."""
    rows = [row for row in _visa_split(root) if row["object"] == name]
    train, test = ([_visa_row(root, row) for row in rows if row["split"] == part] for part in _PARTS)
    return Category.of("visa", name, train, test)


LAYOUTS = {
    "mvtecad": Layout(_names_with("train/good"), functools.partial(_read_mvtecad, "mvtecad", "good")),
    "visa": Layout(_visa_names, _read_visa),
    "btad": Layout(_names_with("train/ok"), functools.partial(_read_mvtecad, "btad", "ok")),
    "mvtec3d": Layout(_names_with("train/good/rgb"), _read_mvtec3d),
    "mpdd": Layout(_names_with("train/good"), functools.partial(_read_mvtecad, "mpdd", "good")),
    "folder": Layout(_own_names, functools.partial(_read_mvtecad, "folder", "good")),
    "images": Layout(lambda root: [root.name], _read_images),
}


def _category(
    data_set: str, base: Path, images: Mapping[str, Sequence[Path]], masks: Mapping[Path, Path], normal: str = "good"
) -> Category:
    """A category of the images in ``train/<normal>`` and ``test/<kind>``."""
    kinds = {path: path.relative_to(base / part).parts[0] for part, paths in images.items() for path in paths}
    stray = [str(path) for path in images["test"] if kinds[path] == path.name]
    stray += [str(path) for path in images["train"] if kinds[path] != normal]
    stray += [str(path) for path in sorted(base.iterdir()) if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    expected = f"expected {base}/train/{normal} and {base}/test/<kind>: move them there, or away"
    refuse(stray, f"images of {data_set} are in none of its folders", expected)
    train, test = (
        [_row(path, masks.get(path), base.name, kinds[path], kinds[path] != normal) for path in images[part]]
        for part in _PARTS
    )
    return Category.of(data_set, base.name, train, test)


def _row(image: Path, mask: Path | None, category: str, kind: str, is_anomalous: bool) -> Row:
    """The row of an image; whatever its mask, a normal one has none."""
    place = str(mask) if mask and is_anomalous else None
    return Row(str(image), place, category, "", kind, is_anomalous, not is_anomalous, image.stem)


def _paired_masks(base: Path, test: Sequence[Path], masks: Sequence[Path], normal: str) -> dict[Path, Path]:
    """The mask of each anomalous test image: ``<stem>_mask`` or ``<stem>`` at the same place in ``ground_truth``.

    Of the images of ``test``, those in its folder ``normal`` have none.

    Raises:
        InputError: an anomalous image without a mask, a mask without an image, or images of one stem, which would share
            a mask.
    """
    of_stem = {_stem(mask, base / "ground_truth"): mask for mask in masks}
    images = {path: _stem(path, base / "test") for path in test}
    anomalous = {path: stem for path, stem in images.items() if not stem.startswith(f"{normal}/")}
    number = Counter(anomalous.values())
    alike = sorted(str(path) for path, stem in anomalous.items() if number[stem] > 1)
    refuse(alike, "images differ in their suffix alone and would share a mask", "give each a name of its own")
    of_normal = {stem for path, stem in images.items() if path not in anomalous}  # nothing is marked there
    expected = [mask for stem, mask in of_stem.items() if not {stem, stem.removesuffix("_mask")} & of_normal]
    found = {path: of_stem.get(f"{stem}_mask") or of_stem.get(stem) for path, stem in anomalous.items()}
    pairs = {path: mask for path, mask in found.items() if mask is not None}
    remedy = f"expected one in {base}/ground_truth for each anomalous image in {base}/test, and no other"
    refuse(sorted(map(str, found.keys() - pairs.keys())), "images have no mask", remedy)
    refuse(sorted(map(str, set(expected) - set(pairs.values()))), "masks have no image", remedy)
    return pairs


def _stem(path: Path, below: Path) -> str:
    return path.relative_to(below).with_suffix("").as_posix()


def _refuse_relatives(base: Path) -> None:
    """Data sets of the same makers that look like MVTecAD, and are not."""
    for sign, name, why in (
        ("test_public", "MVTec AD 2", "its masks lie in test_public"),
        ("test/logical_anomalies", "MVTec LOCO", "an image has several masks there, and a metric of its own"),
    ):
        if (base / sign).is_dir():
            raise InputError(
                f"{base} is of {name} (it has {sign}), which is not read: {why}. Bring it into the layout of 'folder': "
                "train/good, test/<kind> and ground_truth/<kind>, with one mask for each image"
            )


def _visa_row(root: Path, row: Mapping[str, str]) -> Row:
    mask = root / row["mask"] if row["mask"] else None
    return _row(root / row["image"], mask, row["object"], row["label"], row["label"] != "normal")


def _visa_split(root: Path) -> list[dict[str, str]]:
    path = root / _VISA_SPLIT
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): it comes with VisA and says what to train on") from error
    if list(frame.columns) != _VISA_COLUMNS:
        raise InputError(f"{path} has the columns {list(frame.columns)}, expected {_VISA_COLUMNS}")
    return frame.to_dict("records")
