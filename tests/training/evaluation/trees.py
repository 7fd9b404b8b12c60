"""Miniature trees of the data sets' layouts, with their quirks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 10)  # width and height


def image(path: Path) -> Path:
    """Writes a small image; its suffix says which kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format={".jpg": "JPEG", ".bmp": "BMP"}.get(path.suffix.lower(), "PNG"))
    return path


def mask(path: Path, value: int = 255) -> Path:
    """Writes a mask with a square of a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
    pixels[2:5, 3:7] = value
    Image.fromarray(pixels).save(path)
    return path


def images(folder: Path, names: Iterable[str]) -> None:
    """Writes images with these names."""
    for name in names:
        image(folder / name)


def mvtecad(root: Path, name: str = "bottle", suffix: str = "_mask") -> Path:
    """Three images to train on, two normal and three anomalous ones of two kinds to test on."""
    images(root / name / "train/good", ["000.png", "001.png", "002.png"])
    images(root / name / "test/good", ["000.png", "001.png"])
    for kind, numbers in {"broken": ("000", "001"), "contamination": ("000",)}.items():
        for number in numbers:
            image(root / name / "test" / kind / f"{number}.png")
            mask(root / name / "ground_truth" / kind / f"{number}{suffix}.png")
    return root


def visa(root: Path) -> Path:
    """Images called .JPG, masks with the class's number, and the split in a table."""
    rows = ["object,split,label,image,mask"]
    for number, (split, label) in enumerate(
        [("train", "normal"), ("train", "normal"), ("test", "normal"), ("test", "anomaly"), ("test", "anomaly")]
    ):
        kind = "Normal" if label == "normal" else "Anomaly"
        path = f"candle/Data/Images/{kind}/{number:04}.JPG"
        mask_path = f"candle/Data/Masks/Anomaly/{number:04}.png" if label == "anomaly" else ""
        image(root / path)
        if mask_path:
            mask(root / mask_path, value=number - 2)
        rows.append(f"candle,{split},{label},{path},{mask_path}")
    image(root / "candle/Data/Images/Normal/9999.JPG")  # that no split names
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root


def btad(root: Path) -> Path:
    """Classes of images and masks called .bmp and .png, of .png both, and of .bmp both."""
    for name, image_suffix, mask_suffix in (("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp")):
        images(root / name / "train/ok", [f"{number:04}{image_suffix}" for number in range(2)])
        images(root / name / "test/ok", [f"0005{image_suffix}"])
        images(root / name / "test/ko", [f"0007{image_suffix}", f"0008{image_suffix}"])
        for number in ("0007", "0008"):
            mask(root / name / "ground_truth/ko" / f"{number}{mask_suffix}")
    return root


def mvtec3d(root: Path) -> Path:
    """Colour images beside depth, with validation images that nobody asks for."""
    for split, kinds in (("train", ["good"]), ("validation", ["good"]), ("test", ["good", "hole"])):
        for kind in kinds:
            for number in ("000", "001"):
                image(root / "bagel" / split / kind / "rgb" / f"{number}.png")
                (root / "bagel" / split / kind / "xyz").mkdir(exist_ok=True)
                (root / "bagel" / split / kind / "xyz" / f"{number}.tiff").write_bytes(b"not read")
                if split == "test":
                    mask(root / "bagel" / split / kind / "gt" / f"{number}.png", value=0 if kind == "good" else 255)
    return root
