"""Scores images by an ONNX file that `adpretrain export` wrote, and decides; needs onnxruntime, NumPy and Pillow alone.

python predict.py screw.onnx images/ --output scores.csv
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# A TIFF may hold what Pillow reads otherwise than its tags say.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


class Predictor:
    """An exported model.

    Args:
        path: of the ONNX file.

    Attributes:
        about: how images are prepared, the product, and its calibration.
        size: H and W of prepared images.

    Raises:
        ValueError: the file is none that `adpretrain export` wrote.
    """

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of an input that has a default
        providers = onnxruntime.get_available_providers()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
            self.about: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map["adpretrain"])
        except Exception as error:  # onnxruntime's own kinds have no other base
            raise ValueError(f"{path} is no ONNX file of `adpretrain export` that can be read: {error!r}") from error
        (images,) = self.session.get_inputs()
        self.size, self._dtype = tuple(images.shape[2:]), np.float16 if "float16" in images.type else np.float32

    def score(self, path: str | Path) -> float:
        """The anomaly score of an image file.

        Raises:
            ValueError, OSError: the image cannot be used.
        """
        (scores,) = self.session.run(["score"], {"images": self.prepare(path)[None].astype(self._dtype)})
        if not math.isfinite(scores[0]):
            raise ValueError(f"its score is {scores[0]}")
        return float(scores[0])

    def prepare(self, path: str | Path) -> np.ndarray:
        """An image file as the network takes it: (3, H, W), float32.

        Raises:
            ValueError, OSError: the image cannot be used.
        """
        image = read(path)
        width, height = image.size
        patch, side, short = self.about["patch_size"], self.about["image_size"], min(image.size)
        if short < patch or max(image.size) > 20 * short:
            raise ValueError(f"it has {width} x {height} pixels, too small or too long")
        if self.about["resize_mode"] == "crop":
            new_width, new_height = int(side * width / short), int(side * height / short)
            left, top = round((new_width - side) / 2), round((new_height - side) / 2)
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + side, top + side))
        else:
            scale = side / short / patch
            new_size = (round(width * scale) * patch, round(height * scale) * patch)
            image = image.resize(new_size, Image.Resampling.BICUBIC)
        if (image.height, image.width) != self.size:
            sides = f"--image-height {image.height} --image-width {image.width}"
            expected = f"{self.size[0]} x {self.size[1]}"
            raise ValueError(f"the model takes {expected} pixels, height first: export one by {sides}")
        mean, std = (np.array(self.about[name], dtype=np.float32) for name in ("mean", "std"))
        return ((np.asarray(image, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)

    def decide(self, score: float, threshold: float | None = None) -> tuple[int, float] | tuple[()]:
        """Whether a score is anomalous, 0 or 1, and how clearly, from 0 to 1; nothing without a calibration.

        Args:
            score: of an image.
            threshold: the calibration's by default.
        """
        if not (known := self.about.get("calibration")):
            return ()
        above = score - (known["threshold"] if threshold is None else threshold)
        return int(above > 0), 0.5 * (1 + math.tanh(above / known["scale"] / 2))


def read(path: str | Path) -> Image.Image:
    """Reads an image file of 8 bits as upright RGB, its alpha channel dropped.

    Raises:
        ValueError, OSError: it cannot be read, or holds more than 8 bits.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it holds more than 8 bits (mode {image.mode}): convert it to 8")
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


def list_images(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among the paths, and all images below the folders among them, in order."""
    for path in paths:
        below = path.rglob("*") if path.is_dir() else ()
        images = sorted(one for one in below if one.suffix.lower() in SUFFIXES and not one.name.startswith("."))
        yield from images if path.is_dir() else [path]


def finite(text: str) -> float:
    """A number, neither infinite nor NaN.

    Raises:
        ValueError: it is none.
    """
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a line for each image, and returns the exit code: 0, or 1 where an image could not be used.

    Raises:
        SystemExit: 2, an argument is wrong; standard error says which.
    """
    parser = argparse.ArgumentParser(description="Score images by an ONNX file that `adpretrain export` wrote.")
    parser.add_argument("model", help="the ONNX file")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", type=Path, help="the CSV file to write; to the terminal by default")
    parser.add_argument("--threshold", type=finite, help="the score that an anomalous image exceeds")
    args = parser.parse_args(argv)
    try:
        return write_scores(Predictor(args.model), args.images, args.output, args.threshold)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def write_scores(predictor: Predictor, paths: Sequence[Path], output: Path | None, threshold: float | None) -> int:
    """What ``main`` does; an error in its arguments is a ValueError or an OSError."""
    header, failed = ("image", "score", "anomalous", "confidence")[: 2 + len(predictor.decide(0.0))], False
    if threshold is not None and len(header) == 2:
        raise ValueError("--threshold needs a model that was exported with a calibrated reference")
    if not (images := list(list_images(paths))):
        raise ValueError(f"no images in {', '.join(map(str, paths))}: expected files that end in {', '.join(SUFFIXES)}")
    with open_table(output) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        for path in images:
            try:
                score = predictor.score(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                print(f"{path} cannot be used: {error}", file=sys.stderr)
                failed = True
            else:
                table.writerow((path, score, *predictor.decide(score, threshold)))
    return int(failed)


def open_table(output: Path | None) -> AbstractContextManager[TextIO]:
    """The CSV file, or standard output: of text that takes the names of files, which may be any bytes."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("w", newline="", encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return nullcontext(sys.stdout)


if __name__ == "__main__":
    raise SystemExit(main())
