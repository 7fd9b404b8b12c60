"""Data sets in the layout of MVTecAD, or close to it: MVTecAD, MPDD, BTAD, MVTec3D-AD, and any folder.

anomalib lists them, imported only then: it takes seconds. Masks are paired by name here: anomalib goes by places in
sorted lists, which differ for ``1.png``, ``10.png`` and their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from adpretrain_hf.errors import InputError
from training.evaluation.categories import Category, Sample, make_category
from training.evaluation.image_tree import EXTENSIONS, images_below, paired_masks
from training.refusal import refuse


def names_with(root: Path, training: str) -> list[str]:
    """Names of the folders that have images to train on in a subfolder, e.g. ``train/good``."""
    return sorted(folder.name for folder in root.iterdir() if (folder / training).is_dir())


def read_mvtecad(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/``, masks in ``ground_truth/<kind>/<stem>_mask.png``."""
    return _read_mvtec("mvtecad", root, name)


def read_mpdd(root: Path, name: str) -> Category:
    """As MVTecAD."""
    return _read_mvtec("mpdd", root, name)


def read_btad(root: Path, name: str) -> Category:
    """``{01,02,03}/{train,test}/{ok,ko}/``, masks in ``ground_truth/ko/<stem>.png``, of class 03 ``.bmp``."""
    from anomalib.data.datasets.image.btech import make_btech_dataset

    base = root / name
    masks = paired_masks(base, normal="ok")  # anomalib calls all of them .png
    frame = _listed("btad", base, partial(make_btech_dataset, base))
    return _category("btad", name, frame, images_below(base / "train", base / "test"), masks)


def read_mvtec3d(root: Path, name: str) -> Category:
    """``<category>/{train,test}/<kind>/{rgb,gt}/``; depth is not used, validation images are left out."""
    from anomalib.data.datasets.depth.mvtec_3d import make_mvtec_3d_dataset

    base = root / name
    images = [path for path in images_below(base / "train", base / "test") if path.parent.name == "rgb"]
    masks = {path: path.parents[1] / "gt" / path.name for path in images}
    return _category("mvtec3d", name, _listed("mvtec3d", base, partial(make_mvtec_3d_dataset, base)), images, masks)


def folder_names(root: Path) -> list[str]:
    """The categories of a folder; its own name, if it is one category itself."""
    return [root.name] if (root / "train/good").is_dir() else names_with(root, "train/good")


def read_folder(root: Path, name: str) -> Category:
    """Your own images, as MVTecAD's; masks may be called ``<stem>.png`` too, and ``ground_truth`` may be left out."""
    from anomalib.data.datasets.image.folder import make_folder_dataset

    base = root if (root / "train/good").is_dir() else root / name
    test = {path: path.relative_to(base / "test").parts[0] for path in images_below(base / "test")}
    kinds = sorted({kind for path, kind in test.items() if kind not in ("good", path.name)})  # with images in them
    make = partial(
        make_folder_dataset,
        root=base,
        normal_dir="train/good",
        normal_test_dir="test/good" if "good" in test.values() else None,
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        extensions=EXTENSIONS,
    )
    frame = _listed("folder", base, make)
    masks = paired_masks(base) if any(images_below(base / "ground_truth")) else {}
    frame["label"] = [Path(path).parent.name for path in frame.image_path]
    return _category("folder", name, frame, [*images_below(base / "train/good"), *test], masks)


def _read_mvtec(data_set: str, root: Path, name: str) -> Category:
    # The same as make_mvtec_ad_dataset, which passes over files that are links to elsewhere (as of datalad and DVC).
    from anomalib.data.datasets.image.mpdd import make_mpdd_dataset

    base = root / name
    masks = paired_masks(base)
    frame = _listed(data_set, base, partial(make_mpdd_dataset, base, extensions=EXTENSIONS))
    return _category(data_set, name, frame, images_below(base / "train", base / "test"), masks)


def _listed(data_set: str, base: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """What anomalib lists; its errors say what to do."""
    from anomalib.data.errors import MisMatchError

    try:
        return make()
    except (MisMatchError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"anomalib cannot read {base} as {data_set} ({error}): expected what comes with the data set and no other "
            "images; your own are read as 'folder'"
        ) from error


def _category(
    data_set: str, name: str, frame: pd.DataFrame, images: Iterable[Path], masks: Mapping[Path, Path]
) -> Category:
    """A category of what anomalib lists.

    Args:
        data_set, name: of the category.
        frame: anomalib's.
        images: all that there are, called as the folder was called; anomalib resolves links.
        masks: by image; those of normal images are left out.
    """
    called = {_place(path): path for path in images}
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for row in frame[frame.split.isin(list(parts))].itertuples():
        path = called.pop(_place(Path(row.image_path)), None)
        if path is not None:  # as hidden images are
            is_anomalous = bool(row.label_index)
            mask = masks.get(path) if is_anomalous else None
            parts["train" if row.split == "train" else "test"].append(Sample(path, mask, is_anomalous, row.label))
    left = sorted(str(path) for path in called.values())
    refuse(
        left, f"images of {data_set} are passed over by anomalib", "links to folders and other suffixes are not read"
    )
    return make_category(data_set, name, parts["train"], parts["test"])


def _place(path: Path) -> Path:
    return path.parent.resolve() / path.name
