"""Draws the synthetic data set, and a contact sheet of it.

python -m training.synthetic OUTPUT [--categories 24] [--normals 12] [--seed 0] [--size 256]
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from adpretrain_hf.errors import run_program
from adpretrain_hf.files import atomic_path
from training.synthetic.camera import VIEWS
from training.synthetic.generate import SIZE, SIZES, generate

_SIDE = 112  # px of a picture on the contact sheet
_TITLE = 14  # px of the line above them
_DEFECTS = 3
_ACROSS = 2  # classes side by side


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code, see ``run_program``."""
    parser = argparse.ArgumentParser(prog="python -m training.synthetic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="output", help="folder that gets the data set")
    parser.add_argument("--categories", type=int, default=24, help="number of classes (default 24)")
    parser.add_argument("--normals", type=int, default=12, help="normal samples of each class (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument("--size", type=int, default=SIZE, choices=SIZES, help="side of the images in px (default 256)")
    given = parser.parse_args(arguments)

    def run() -> int:
        print(draw_overview(generate(**vars(given)), given.size))
        return 0

    return run_program("synthetic", run)


def draw_overview(folder: Path, size: int) -> Path:
    """Writes ``overview.png`` into ``folder``, of images of ``size`` px: normal views and defects; returns its path."""
    files = sorted((folder / "realiad_jsons" / "realiad_jsons").glob("*.json"))
    width, height = _SIDE * (len(VIEWS) + 2 * _DEFECTS) + _TITLE, _SIDE + _TITLE
    sheet = Image.new("RGB", (width * _ACROSS, height * -(-len(files) // _ACROSS)), "white")
    for number, file in enumerate(files):
        index = json.loads(file.read_text(encoding="utf-8"))
        normal = {item["image_path"].split("_")[-2]: item["image_path"] for item in reversed(index["train"])}
        defects = [item for item in index["test"] if item["mask_path"]]
        # Another family in every class, so that the sheet shows all of them.
        shown = [defects[(number * _DEFECTS + k) * 7 % len(defects)] for k in range(_DEFECTS)]
        left, top = number % _ACROSS * width, number // _ACROSS * height
        title = f"{file.stem}: normal, {', '.join(item['anomaly_class'] for item in shown)}"
        ImageDraw.Draw(sheet).text((left + 2, top + 1), title, fill="black")
        paths = [normal[view] for view in VIEWS] + [item[key] for item in shown for key in ("image_path", "mask_path")]
        for k, path in enumerate(paths):
            with Image.open(folder / f"realiad_{size}" / file.stem / path) as picture:
                small = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
                sheet.paste(small, (left + k * _SIDE, top + _TITLE))
    with atomic_path(folder / "overview.png") as temporary:
        sheet.save(temporary)
    return folder / "overview.png"


if __name__ == "__main__":
    sys.exit(main())
