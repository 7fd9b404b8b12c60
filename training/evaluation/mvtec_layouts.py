"""Data sets in the layout of MVTecAD, or close to it: MVTecAD, MPDD, BTAD, MVTec3D-AD, and any folder.

Listed here, not by anomalib: that refuses paths outside ASCII, reads seven suffixes, does not say which file it
stumbles over, and pairs masks by their places in sorted lists, which differ for ``1.png``, ``10.png`` and their masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import SUFFIXES, find_images
from training.evaluation.categories import Category, Sample, make_category
from training.evaluation.image_tree import paired_masks
from training.refusal import refuse


def names_with(root: Path, training: str) -> list[str]:
    """Names of the folders that have images to train on in a subfolder, e.g. ``train/good``."""
    return sorted(folder.name for folder in root.iterdir() if (folder / training).is_dir())


def read_mvtecad(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/``, masks in ``ground_truth/<kind>/<stem>_mask.png``."""
    _refuse_relatives(root / name)
    return _category("mvtecad", root / name, name, paired_masks(root / name))


def read_mpdd(root: Path, name: str) -> Category:
    """As MVTecAD."""
    return _category("mpdd", root / name, name, paired_masks(root / name))


def read_btad(root: Path, name: str) -> Category:
    """``{01,02,03}/{train,test}/{ok,ko}/``, masks in ``ground_truth/ko/<stem>.png``, of class 03 ``.bmp``."""
    return _category("btad", root / name, name, paired_masks(root / name, normal="ok"), normal="ok")


def read_mvtec3d(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/{rgb,gt}/``; depth is not used, validation images are left out."""
    base = root / name
    images = {part: [path for path in find_images(base / part) if path.parent.name == "rgb"] for part in _PARTS}
    masks = {path: path.parents[1] / "gt" / path.name for path in images["test"]}
    return _category("mvtec3d", base, name, masks, images=images)


def folder_names(root: Path) -> list[str]:
    """The categories of a folder; its own name, if it is one category itself."""
    return [root.name] if (root / "train/good").is_dir() else names_with(root, "train/good")


def read_folder(root: Path, name: str) -> Category:
    """Your own images, as MVTecAD's; masks may be called ``<stem>.png`` too, and ``ground_truth`` may be left out."""
    base = root if (root / "train/good").is_dir() else root / name
    _refuse_relatives(base)
    truth = base / "ground_truth"
    masks = paired_masks(base) if truth.is_dir() and find_images(truth) else {}
    return _category("folder", base, name, masks)


_PARTS = ("train", "test")


def _category(
    data_set: str,
    base: Path,
    name: str,
    masks: Mapping[Path, Path],
    *,
    normal: str = "good",
    images: Mapping[str, Sequence[Path]] | None = None,
) -> Category:
    """A category of the images in ``train/<normal>`` and ``test/<kind>``; masks of normal images are left out."""
    parts = images or {part: find_images(base / part) for part in _PARTS}
    kinds = {path: path.relative_to(base / part).parts[0] for part, paths in parts.items() for path in paths}
    stray = [str(path) for path in parts["test"] if kinds[path] == path.name]
    stray += [str(path) for path in parts["train"] if kinds[path] != normal]
    stray += [str(path) for path in sorted(base.iterdir()) if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    expected = f"expected {base}/train/{normal} and {base}/test/<kind>: move them there, or away"
    refuse(stray, f"images of {data_set} are in none of its folders", expected)
    samples = {
        part: [
            Sample(path, masks.get(path) if kinds[path] != normal else None, kinds[path] != normal, kinds[path])
            for path in paths
        ]
        for part, paths in parts.items()
    }
    return make_category(data_set, name, samples["train"], samples["test"])


def _refuse_relatives(base: Path) -> None:
    """Data sets of the same makers that look like MVTecAD, and are not."""
    if (base / "test_public").is_dir():
        raise InputError(
            f"{base} is of MVTec AD 2 (it has test_public), which is not read: its masks lie in test_public. Bring it "
            "into the layout of 'folder': train/good, test/<kind> and ground_truth/<kind>"
        )
    if (base / "test/logical_anomalies").is_dir():
        raise InputError(
            f"{base} is of MVTec LOCO (it has test/logical_anomalies), which is not read: an image has several masks "
            "there, and a metric of its own. Bring it into the layout of 'folder', with one mask for each image"
        )
