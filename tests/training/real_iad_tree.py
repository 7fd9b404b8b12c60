"""Trees in RealIAD's layout, made for tests and measurements."""

from __future__ import annotations

import copy
import io
import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from training.data.real_iad import open_real_iad


class RealIADClass:
    """One class: its json, to be changed at will, and the bytes of the files that go with it.

    By default two normal samples, one in each split, and for each defect code a sample whose last view does not show
    the defect and has no mask, as in the original.

    Args:
        name: of the class.
        views: of each sample.
        normals: number of normal samples.
        codes: defect codes.
        samples: damaged samples for each code.
        between: between the parts of a file name; some classes of the original have a double underscore.
        tiny: contents that are no images, for measurements.
    """

    def __init__(
        self,
        name: str,
        *,
        views: int = 3,
        normals: int = 2,
        codes: tuple[str, ...] = ("AK",),
        samples: int = 1,
        between: str = "_",
        tiny: bool = False,
    ) -> None:
        self.name = name
        self.json: dict[str, Any] = {"meta": {"normal_class": "OK", "prefix": f"{name}/"}, "train": [], "test": []}
        self.files: dict[str, bytes] = {}
        folders = [("OK", "OK", number) for number in range(1, normals + 1)]
        folders += [(f"NG/{code}", code, number) for code in codes for number in range(1, samples + 1)]
        for folder, code, number in folders:
            split = "train" if code == "OK" and number % 2 else "test"
            for view in range(1, views + 1):
                stem = between.join((name, f"{number:04}", code, f"C{view}", "20231023103255"))
                image, mask = f"{folder}/S{number:04}/{stem}.jpg", f"{folder}/S{number:04}/{stem}.png"
                has_mask = code != "OK" and view < views
                for path in (image, mask) if has_mask else (image,):
                    self.files[path] = b"x" if tiny else picture(path)
                item = {"category": name, "anomaly_class": code if has_mask else "OK"}
                self.json[split].append(item | {"image_path": image, "mask_path": mask if has_mask else None})

    def item(self, split: str, number: int) -> dict[str, Any]:
        return self.json[split][number]

    def copy(self) -> RealIADClass:
        return copy.deepcopy(self)

    def write_folder(self, root: Path, resolution: str = "512", *, below: str = "") -> None:
        """The files, unpacked; ``below`` doubles the class's folder, for example."""
        for name, data in self.files.items():
            path = root / f"realiad_{resolution}" / below / self.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def write_zip(self, root: Path, resolution: str = "512", *, method: int = zipfile.ZIP_DEFLATED) -> Path:
        path = root / f"realiad_{resolution}" / f"{self.name}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in self.files.items():
                archive.writestr(f"{self.name}/{name}", data)
        return path

    def write_json(self, root: Path, folder: str = "realiad_jsons/realiad_jsons") -> Path:
        path = root / folder / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.json), encoding="utf-8")
        return path


def pack_jsons(root: Path, folder: str) -> None:
    """Puts ``realiad_jsons`` into ``realiad_jsons.zip``, its contents below ``folder``, and removes it."""
    with zipfile.ZipFile(root / "realiad_jsons.zip", "w") as archive:
        for path in sorted((root / "realiad_jsons").rglob("*.json")):
            archive.write(path, f"{folder}/{path.name}")
    shutil.rmtree(root / "realiad_jsons")


def picture(name: str) -> bytes:
    """An image file of a colour of its own; a mask has one pixel of the value 1."""
    colour, data = zlib.crc32(name.encode()), io.BytesIO()
    if name.endswith(".png"):
        mask = Image.new("L", (6, 5))
        mask.putpixel((colour % 6, 2), 1)
        mask.save(data, "PNG")
    else:
        Image.new("RGB", (6, 5), (colour & 255, colour >> 8 & 255, colour >> 16 & 255)).save(data, "JPEG", quality=95)
    return data.getvalue()


def load_real_iad(source: Any, *, resolution: str = "512", categories: Any = None, strict: bool = True) -> Dataset:
    """Some classes of RealIAD as a table, all by default."""
    opened = open_real_iad(source, resolution=resolution, strict=strict)
    return opened.load(sorted(set(categories or opened.categories)))
