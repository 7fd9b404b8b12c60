"""Draws the data set in RealIAD's layout: its classes, their photographs, defects and masks."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from adpretrain_hf.errors import InputError, check_count
from adpretrain_hf.files import atomic_path
from training.synthetic.camera import BOARD, STAGE, VIEWS, Scene, Surface, generator, photograph, scenes
from training.synthetic.defects import FAMILIES, paint_defect
from training.synthetic.materials import Material
from training.synthetic.parts import Part

SIZES = (256, 512, 1024)  # px, those of RealIAD's folders
SIZE = 256  # the one that is drawn unless another is asked for

# In turn, so that any number of classes has materials and parts of all kinds.
RECIPES = (
    "brushed_metal", "gear", "linen", "circuit_board", "wood", "printed", "screw", "twill", "capsule", "tiles", "mesh",
    "washer", "carpet", "connector", "leather", "corrugated_sheet", "bottle_cap", "stripes", "button", "gravel",
    "perforated", "bearing", "basket", "plug", "concrete", "cardboard", "paint",
)  # fmt: skip
PARTS = {name for name in RECIPES if hasattr(Part, name)}
# What a part lies on: quiet enough to leave it the eye.
_GROUNDS = ("paint", "cardboard", "linen", "leather", "brushed_metal", "concrete")
_SETTINGS = "synthetic.json"
_VERSION = 1  # of the drawings: another one means other pixels for the same settings
_DATE = "20240115"


def draw(name: str, rng: np.random.Generator, side: int, unit: float) -> Surface:
    """What a recipe draws: a square of ``side`` px, of which ``unit`` are one px of an image of 256 px."""
    if name not in PARTS:
        return getattr(Material(rng, side, unit), name)()
    part = Part(rng, side, unit)
    getattr(part, name)()
    return part.surface


def class_names(count: int) -> list[str]:
    """Names of the first ``count`` classes: each recipe once, then each in a second make (``gear_2``), and so on."""
    makes = [""] + [f"_{make}" for make in range(2, count // len(RECIPES) + 2)]
    return [name + make for make in makes for name in RECIPES][:count]


def class_scenes(name: str, seed: int, size: int) -> dict[str, Scene]:
    """The scene of each view of the class called ``name``, for photographs of ``size`` px."""
    rng = generator(seed, name)
    recipe = name if name in RECIPES else name.rpartition("_")[0]
    material = str(rng.choice(_GROUNDS)) if recipe in PARTS else recipe
    ground = draw(material, rng, round(STAGE * size), size / 256)
    if recipe not in PARTS:
        return scenes(ground, None, rng, size)
    gray = ground.colour.mean(-1, keepdims=True)
    muted = ground._replace(colour=gray + (ground.colour - gray) * np.float32(rng.uniform(0, 0.4)))
    return scenes(muted, draw(recipe, rng, round(BOARD * size), size / 256), rng, size)


def generate(
    folder: str | Path, *, categories: int = 24, normals: int = 12, defects_per_family: int = 1, size: int = SIZE,
    seed: int = 0,
) -> Path:  # fmt: skip
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

    Returns:
        The folder.

    Raises:
        InputError: a number out of its range, or ``folder`` holds something else, or a set of other settings.
        OSError: the files cannot be written; ``folder`` is then as it was.
    """
    counts = {"categories": categories, "normals": normals, "defects_per_family": defects_per_family}
    for name, count in counts.items():
        check_count(name, count)
    if seed < 0:
        raise InputError(f"seed must be a whole number from 0, got {seed}")
    settings = json.dumps(counts | {"size": size, "seed": seed, "version": _VERSION}, indent=0) + "\n"
    if _is_there(folder := Path(folder), settings):
        return folder
    samples = [("train" if 2 * number <= normals + 1 else "test", "OK", number) for number in range(1, normals + 1)]
    samples += [("test", family, number) for family in FAMILIES for number in range(1, defects_per_family + 1)]
    total = categories * len(samples) * len(VIEWS)
    with atomic_path(folder) as temporary, tqdm(total=total, unit="image") as bar:
        indices = temporary / "realiad_jsons" / "realiad_jsons"
        indices.mkdir(parents=True)
        for name in class_names(categories):
            index: dict[str, Any] = {"meta": {"prefix": f"{name}/", "normal_class": "OK", "pre_transform": []}}
            index |= {"train": [], "test": []}
            images, views = temporary / f"realiad_{size}" / name, class_scenes(name, seed, size)
            for (split, family, number), (view, scene) in product(samples, views.items()):
                index[split].append(_write_image(images, family, number, view, scene, seed))
                bar.update()
            (indices / f"{name}.json").write_text(json.dumps(index, indent=0) + "\n", encoding="utf-8")
        (temporary / _SETTINGS).write_text(settings, encoding="utf-8")
    return folder


def _is_there(folder: Path, settings: str) -> bool:
    """Whether the same set lies in ``folder``; False also where nothing does."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / _SETTINGS).is_file():
        raise InputError(f"{folder} is there already and is no synthetic data set: choose another folder")
    found = (folder / _SETTINGS).read_text(encoding="utf-8")
    if found != settings:
        found, wanted = " ".join(found.split()), " ".join(settings.split())
        raise InputError(f"{folder} holds a synthetic data set of {found}, expected {wanted}: choose another folder")
    return True


def _write_image(folder: Path, family: str, number: int, view: str, scene: Scene, seed: int) -> dict[str, str | None]:
    """Writes a photograph into its class's folder, beside it the mask of a defect; returns the item of the json."""
    name, code = folder.name, FAMILIES.get(family, "OK")
    sample = Path(code if family == "OK" else f"NG/{code}") / f"S{number:04d}"
    image, mask_path = sample / f"{name}_{number:04d}_{code}_{view}_{_DATE}.jpg", None
    (folder / sample).mkdir(parents=True, exist_ok=True)
    rng = generator(seed, name, code, number, view)
    picture, part = photograph(scene, rng)
    if family != "OK":
        picture, mask = paint_defect(picture, family, rng, where=part)
        mask_path = image.with_suffix(".png").as_posix()
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / mask_path)
    Image.fromarray(picture).save(folder / image, quality=int(rng.integers(88, 97)))
    return {"category": name, "anomaly_class": code, "image_path": image.as_posix(), "mask_path": mask_path}
