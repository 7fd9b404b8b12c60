"""Data sets in the layout of MVTecAD, or close to it: MVTecAD, MPDD, BTAD, MVTec3D-AD, and any folder.

anomalib reads them. It pairs images with masks by their place in a list, so what it is given is checked first.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from anomalib.data.datasets.depth.mvtec_3d import make_mvtec_3d_dataset
from anomalib.data.datasets.image.btech import make_btech_dataset
from anomalib.data.datasets.image.folder import make_folder_dataset
from anomalib.data.datasets.image.mpdd import make_mpdd_dataset
from anomalib.data.datasets.image.mvtecad import make_mvtec_ad_dataset

from training.evaluation.categories import Category, Sample, make_category, refuse

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_EXTENSIONS = tuple(sorted(_IMAGES | {suffix.upper() for suffix in _IMAGES}))


def names_with(root: Path, training: str) -> list[str]:
    """Names of the folders that have images to train on in a subfolder, e.g. ``train/good``."""
    return sorted(folder.name for folder in root.iterdir() if (folder / training).is_dir())


def read_mvtecad(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/``, masks in ``ground_truth/<kind>/<stem>_mask.png``."""
    _check_masks(root / name)
    return _category("mvtecad", name, make_mvtec_ad_dataset(root / name, extensions=_EXTENSIONS))


def read_mpdd(root: Path, name: str) -> Category:
    """As MVTecAD."""
    _check_masks(root / name)
    return _category("mpdd", name, make_mpdd_dataset(root / name, extensions=_EXTENSIONS))


def read_btad(root: Path, name: str) -> Category:
    """``{01,02,03}/{train,test}/{ok,ko}/``, masks in ``ground_truth/ko/<stem>.png``, of class 03 ``.bmp``."""
    frame = make_btech_dataset(root / name)
    # anomalib names all masks .png.
    frame["mask_path"] = [_existing(path, ".bmp") if path else "" for path in frame.mask_path]
    return _category("btad", name, frame)


def read_mvtec3d(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/{rgb,gt}/``; depth is not used, validation images are left out."""
    return _category("mvtec3d", name, make_mvtec_3d_dataset(root / name))


def folder_names(root: Path) -> list[str]:
    """The categories of a folder; its own name, if it is one category itself."""
    return [root.name] if (root / "train/good").is_dir() else names_with(root, "train/good")


def read_folder(root: Path, name: str) -> Category:
    """Your own images, as MVTecAD's; masks may be called ``<stem>.png`` too, and ``ground_truth`` may be left out."""
    base = root if (root / "train/good").is_dir() else root / name
    kinds = sorted(folder.name for folder in base.glob("test/*") if folder.is_dir() and folder.name != "good")
    has_masks = (base / "ground_truth").is_dir()
    if has_masks:
        _check_masks(base)
    frame = make_folder_dataset(
        root=base,
        normal_dir="train/good",
        normal_test_dir="test/good" if (base / "test/good").is_dir() else None,
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds] if has_masks else None,
        extensions=_EXTENSIONS,
    )
    frame["label"] = [Path(path).parent.name for path in frame.image_path]
    return _category("folder", name, frame)


def _category(data_set: str, name: str, frame: pd.DataFrame) -> Category:
    parts = {
        split: [
            Sample(Path(row.image_path), _mask(row), bool(row.label_index), row.label)
            for row in frame[frame.split == split].itertuples()
        ]
        for split in ("train", "test")
    }
    return make_category(data_set, name, parts["train"], parts["test"])


def _mask(row: object) -> Path | None:
    path = getattr(row, "mask_path", None)
    has_one = bool(getattr(row, "label_index", 0)) and isinstance(path, str) and path not in ("", "None", "nan")
    return Path(str(path)) if has_one else None


def _existing(path: str, other_suffix: str) -> str:
    other = Path(path).with_suffix(other_suffix)
    return str(other) if other.is_file() and not Path(path).is_file() else path


def _check_masks(base: Path) -> None:
    """Raises InputError if an anomalous image has no mask, or a mask no image."""
    images = {
        f"{path.parent.name}/{path.stem}"
        for path in base.glob("test/*/*")
        if path.suffix.lower() in _IMAGES and path.parent.name != "good"
    }
    masks = {
        f"{path.parent.name}/{path.stem.removesuffix('_mask')}"
        for path in base.glob("ground_truth/*/*")
        if path.suffix.lower() in _IMAGES
    }
    remedy = f"expected one in {base}/ground_truth for each anomalous image in {base}/test, and no other"
    refuse(sorted(images - masks), "images have no mask", remedy)
    refuse(sorted(masks - images), "masks have no image", remedy)
