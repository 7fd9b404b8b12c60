"""The data sets that can be evaluated on: which categories they have, and the images of each.

RealIAD is evaluated by the split in its jsons, of any categories: anomalib takes the original 30 alone.
"""

from pathlib import Path

from adpretrain_hf.errors import InputError, MissingPathError
from training.data.folders import LAYOUTS, Category, Layout
from training.data.real_iad import layout_of_folder, resolution_of, rows_of_class
from training.data.table import refuse


def category_names(data_set: str, root: str | Path) -> list[str]:
    """The categories of one of ``DATA_SETS`` in its folder, in alphabetical order.

    Raises:
        MissingPathError: no such folder.
        InputError: nothing in the folder looks like the data set.
    """
    folder = Path(root).absolute()
    if not folder.is_dir():
        raise MissingPathError(f"no folder {root} to read {data_set} from: give the one that it was unpacked to")
    names = DATA_SETS[data_set].names(folder)
    if not names:
        raise InputError(f"{root} has no category in the layout of {data_set}: give the folder with its categories")
    return names


def read_category(data_set: str, root: str | Path, name: str) -> Category:
    """The images of one of the ``category_names`` that can be evaluated.

    Raises:
        InputError: no normal image to train on, not both normal and anomalous ones to test on, an image or a mask that
            is not there or of a lossy kind, or masks of some anomalous images only.
    """
    category = DATA_SETS[data_set].read(Path(root).absolute(), name)
    _check(category, f"the category {name!r} of {data_set}")
    return category


def views(category: Category) -> list[str]:
    """The views of a category that show normal and anomalous images, by name; one without a name where all are one."""
    rows = (*category.train, *category.test)
    shown = ({row.view for row in rows if row.is_anomalous == label} for label in (False, True))
    return sorted(set.intersection(*shown))


def _check(category: Category, where: str) -> None:
    rows = (*category.train, *category.test)
    if not category.train or any(row.is_anomalous for row in category.train):
        raise InputError(f"{where} has {len(category.train)} training images, expected normal ones, at least 1")
    for is_anomalous, kind in ((True, "anomalous"), (False, "normal")):
        if not any(row.is_anomalous == is_anomalous for row in category.test):
            raise InputError(f"{where} has no {kind} test image: nothing can be measured without one")
    remedy = "unpack or download the data set again"
    missing = [row.image for row in rows if not Path(row.image).is_file()]
    refuse(missing, f"images of {where} are missing", remedy)
    masks = [row.mask for row in category.test if row.mask]
    refuse([mask for mask in masks if not Path(mask).is_file()], f"masks of {where} are missing", remedy)
    if masks:  # without any, images alone are measured
        without = [row.image for row in category.test if row.is_anomalous and not row.mask]
        refuse(without, f"anomalous images of {where} have no mask, others do", remedy)


def _real_iad_names(root: Path) -> list[str]:
    """The categories at the resolution that is there."""
    base, resolution = _real_iad_resolution(root)
    return sorted(layout_of_folder(base)[1].get(resolution, ()))


def _read_real_iad(root: Path, name: str) -> Category:
    """All views of a category; an image is anomalous if it has a mask.

    Raises:
        InputError: the json or the files are incomplete or contradict each other, or are still in a zip.
    """
    base, resolution = _real_iad_resolution(root)
    release, _ = layout_of_folder(base)
    folder = base / release.folder(resolution)
    if not (folder / name).is_dir():
        raise InputError(f"{folder / name}.zip is not unpacked: unpack it beside itself to evaluate on it")
    rows = rows_of_class(base, release, resolution, name)
    parts = ([row for split, row in rows if split == part] for part in ("train", "test"))
    return Category.of("realiad", name, *parts)


def _real_iad_resolution(root: Path) -> tuple[Path, str]:
    """The folder with the jsons, and the resolution: the one that ``root`` itself is, or the only one in it."""
    if (own := resolution_of(root.name)) is not None:
        return root.parent, own
    there = sorted(layout_of_folder(root)[1])
    if len(there) != 1:
        raise InputError(
            f"{root} has the resolutions {there}, expected one: give its folder, e.g. {root / 'realiad_512'}, with "
            "realiad_jsons beside it"
        )
    return root, there[0]


DATA_SETS = LAYOUTS | {"realiad": Layout(_real_iad_names, _read_real_iad)}
del DATA_SETS["images"]  # in which there is no anomaly
