"""RealIAD as it is evaluated: by the split in its jsons, of any categories. anomalib takes the original 30 alone."""

from __future__ import annotations

from pathlib import Path

from adpretrain_hf.errors import InputError
from training.data.folders import Category, Sample
from training.real_iad_json import read_annotation, usable_items
from training.real_iad_trees import class_tree, layout_of_folder, resolution_of


def real_iad_names(root: Path) -> list[str]:
    """The categories at the resolution that is there."""
    base, resolution = _resolution(root)
    return sorted(layout_of_folder(base)[1][resolution])


def read_real_iad(root: Path, name: str) -> Category:
    """All views of a category; an image is anomalous if it has a mask.

    Raises:
        InputError: the json or the files are incomplete or contradict each other, or are still in a zip.
    """
    base, resolution = _resolution(root)
    release, _ = layout_of_folder(base)
    folder = base / release.folder(resolution)
    if not (folder / name).is_dir():
        raise InputError(f"{folder / name}.zip is not unpacked: unpack it beside itself to evaluate on it")
    annotation = read_annotation(base, name, release)
    tree = class_tree(folder, name, annotation.prefix)
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for item in usable_items(annotation, tree):
        mask = Path(tree.address(item.mask)) if item.mask else None
        parts[item.split].append(Sample(Path(tree.address(item.image)), mask, mask is not None, item.anomaly_class))
    return Category.of("realiad", name, parts["train"], parts["test"])


def _resolution(root: Path) -> tuple[Path, str]:
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
