"""Draws the data set in RealIAD's layout: materials, parts, defects, masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import atomic_path
from training.synthetic.camera import VIEWS, Scene, photograph
from training.synthetic.catalogue import class_names, class_scenes
from training.synthetic.defects import FAMILIES, paint_defect
from training.synthetic.noise import generator

SIZES = (256, 512, 1024)  # px, those of RealIAD's folders
SIZE = 256  # the one that is drawn unless another is asked for

_SETTINGS = "synthetic.json"
_VERSION = 1  # of the drawings: another one means other pixels for the same settings
_DATE = "20240115"


@dataclass(frozen=True)
class Plan:
    """All that the pixels depend on."""

    categories: int
    normals: int
    defects_per_family: int
    size: int
    seed: int
    version: int = _VERSION

    def __post_init__(self) -> None:
        """Raises: InputError: a number that makes no data set."""
        for name in ("categories", "normals", "defects_per_family"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be a whole number from 0, got {self.seed}")
        if self.size not in SIZES:
            raise InputError(f"size must be one of RealIAD's {', '.join(map(str, SIZES))} px, got {self.size}")

    @property
    def images_per_class(self) -> int:
        """Over all views."""
        return (self.normals + self.defects_per_family * len(FAMILIES)) * len(VIEWS)


def generate(
    folder: str | Path,
    *,
    categories: int = 24,
    normals: int = 12,
    defects_per_family: int = 1,
    size: int = SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Draws the data set, or returns at once where the same one lies already.

    The same arguments give the same files on every run. Each sample has three views; a defective one has a defect of
    its family in each view, at a place of its own. Half of the normal samples are the training split of the json.

    Args:
        folder: gets ``realiad_<size>/<class>/...`` and ``realiad_jsons/realiad_jsons/<class>.json``.
        categories: number of classes, any; materials and parts in turn.
        normals: normal samples of each class.
        defects_per_family: defective samples of each class and each of ``FAMILIES``.
        size: side of the images in px: 256, 512 or 1024.
        seed: of all that is random.
        progress: shows a bar with images per second and the time left.

    Returns:
        The folder.

    Raises:
        InputError: a number out of its range, or ``folder`` holds something else, or a set of other settings.
        OSError: the files cannot be written; ``folder`` is then as it was.
    """
    plan, folder = Plan(categories, normals, defects_per_family, size, seed), Path(folder)
    if _is_there(folder, plan):
        return folder
    total = plan.categories * plan.images_per_class
    with atomic_path(folder) as temporary, tqdm(total=total, unit="image", disable=not progress) as bar:
        temporary.mkdir()
        for name in class_names(plan.categories):
            _write_class(temporary, plan, bar, name)
        (temporary / _SETTINGS).write_text(_as_json(asdict(plan)), encoding="utf-8")
    return folder


def _is_there(folder: Path, plan: Plan) -> bool:
    """Whether the same set lies in ``folder``; False also where nothing does."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    settings = folder / _SETTINGS
    if not settings.is_file():
        raise InputError(f"{folder} is there already and is no synthetic data set: choose another folder")
    found, wanted = settings.read_text(encoding="utf-8"), _as_json(asdict(plan))
    if found != wanted:
        found, wanted = " ".join(found.split()), " ".join(wanted.split())
        raise InputError(f"{folder} holds a synthetic data set of {found}, expected {wanted}: choose another folder")
    return True


def _write_class(root: Path, plan: Plan, bar: tqdm[Any], name: str) -> None:
    scenes = class_scenes(name, plan.seed, plan.size)
    images = root / f"realiad_{plan.size}" / name
    index: dict[str, Any] = {"meta": {"prefix": f"{name}/", "normal_class": "OK", "pre_transform": []}}
    index |= {"train": [], "test": []}
    for code, family, number in _samples(plan):
        sample = Path(code if family is None else f"NG/{code}") / f"S{number:04d}"
        split = "train" if family is None and 2 * number <= plan.normals + 1 else "test"
        for view, scene in scenes.items():
            image = sample / f"{name}_{number:04d}_{code}_{view}_{_DATE}.jpg"
            rng = generator(plan.seed, name, code, number, view)
            mask = _write_image(images, image, scene, family, rng)
            item = {"category": name, "anomaly_class": code, "image_path": image.as_posix(), "mask_path": mask}
            index[split].append(item)
            bar.update()
    index_file = root / "realiad_jsons" / "realiad_jsons" / f"{name}.json"
    index_file.parent.mkdir(parents=True, exist_ok=True)
    index_file.write_text(_as_json(index), encoding="utf-8")


def _samples(plan: Plan) -> Iterator[tuple[str, str | None, int]]:
    """(anomaly class, family, number from 1) of every sample of a class."""
    yield from (("OK", None, number) for number in range(1, plan.normals + 1))
    for family, code in FAMILIES.items():
        yield from ((code, family, number) for number in range(1, plan.defects_per_family + 1))


def _write_image(folder: Path, image: Path, scene: Scene, family: str | None, rng: np.random.Generator) -> str | None:
    """Writes a photograph; one with a defect has a mask beside it, whose path in ``folder`` is returned."""
    picture, part = photograph(scene, rng)
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    mask_path = None
    if family is not None:
        picture, mask = paint_defect(picture, family, rng, where=part)
        mask_path = image.with_suffix(".png").as_posix()
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / mask_path)
    Image.fromarray(picture).save(folder / image, quality=int(rng.integers(88, 97)))
    return mask_path


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=0) + "\n"
