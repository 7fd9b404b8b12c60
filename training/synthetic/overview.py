"""A contact sheet of a folder in RealIAD's layout: of every class each normal view, and defects with their masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from adpretrain_hf.files import atomic_path

_SIDE = 112  # px of a picture on the sheet
_TITLE = 14  # px of the line above them
_DEFECTS = 3
_ACROSS = 2  # classes side by side


def draw_overview(folder: Path, size: int) -> Path:
    """Writes ``overview.png`` into ``folder``, a tree of images of ``size`` px, and returns its path."""
    files = sorted((folder / "realiad_jsons" / "realiad_jsons").glob("*.json"))
    rows = [
        _class_row(folder / f"realiad_{size}", json.loads(file.read_text(encoding="utf-8")), k)
        for k, file in enumerate(files)
    ]
    width, height = max(row.width for row in rows), rows[0].height
    sheet = Image.new("RGB", (width * _ACROSS, height * -(-len(rows) // _ACROSS)), "white")
    for k, row in enumerate(rows):
        sheet.paste(row, (k % _ACROSS * width, k // _ACROSS * height))
    with atomic_path(folder / "overview.png") as temporary:
        sheet.save(temporary)
    return folder / "overview.png"


def _class_row(images: Path, index: dict[str, Any], number: int) -> Image.Image:
    prefix = images / index["meta"]["prefix"]
    normal = {item["image_path"].split("_")[-2]: item for item in reversed(index["train"])}  # one of each view
    defects = [item for item in index["test"] if item["mask_path"]]
    # Another family in every class, so that the sheet shows all of them.
    shown = [defects[(number * _DEFECTS + k) * 7 % len(defects)] for k in range(_DEFECTS)]
    names = [normal[view]["image_path"] for view in sorted(normal)]
    names += [name for item in shown for name in (item["image_path"], item["mask_path"])]
    row = Image.new("RGB", (_SIDE * len(names) + _TITLE, _SIDE + _TITLE), "white")
    title = f"{index['meta']['prefix'].rstrip('/')}: normal, {', '.join(item['anomaly_class'] for item in shown)}"
    ImageDraw.Draw(row).text((2, 1), title, fill="black")
    for k, name in enumerate(names):
        with Image.open(prefix / name) as picture:
            row.paste(picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX), (k * _SIDE, _TITLE))
    return row
