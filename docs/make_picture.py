"""Draws docs/picture.jpg, the README's picture: a normal image, two defects that are caught and one that is missed.

    python docs/make_picture.py

in a checkout. A defective image is *caught* if it scores above every normal test image of its product, and *missed* if
not; the script says so by itself, from the scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.images import list_images, read_image
from adpretrain_hf.overlays import ColourRange, colour_range, heat_map, overlay
from adpretrain_hf.scoring import ScoredImage

ROOT = Path(__file__).parents[1]
PRODUCT = ROOT / "tests" / "photos" / "gravel"
SHOWN = {"good/001": "normal", "foreign/002": "foreign body", "wire/000": "wire", "wire/001": "wire"}
SIDE, GAP, MARGIN, CAPTION, BAR = 300, 16, 16, 76, 100
WIDTH = 2 * MARGIN + len(SHOWN) * (SIDE + GAP) + BAR
HEIGHT = 2 * MARGIN + CAPTION + 2 * SIDE + GAP
TOP = MARGIN + CAPTION
OUTLINE = (0, 220, 255)


def main(output: Path) -> None:
    """Scores the product's test images and draws the chosen ones."""
    scored = score_product()
    colours = colour_range(one.full_size_map().numpy() for one in scored.values())
    highest = max(one.score for name, one in scored.items() if name.startswith("good/"))
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    for column, name in enumerate(SHOWN):
        left = MARGIN + column * (SIDE + GAP)
        draw_caption(picture, left, name, scored[name].score, highest)
        draw_image(picture, left, name, scored[name], colours)
    draw_bar(picture, colours, highest)
    picture.save(output, quality=85, optimize=True)


def score_product() -> dict[str, ScoredImage]:
    """Every test image's result, by its kind and number, e.g. ``wire/000``."""
    bundle = ROOT / "hub_cards" / "adpretrain-dinov2-small"
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, device="cpu", image_size=224)
    extractor.set_reference(PRODUCT / "train" / "good")
    paths = list_images(PRODUCT / "test")
    names = [path.relative_to(PRODUCT / "test").with_suffix("").as_posix() for path in paths]
    return dict(zip(names, extractor.score_stream(paths, progress=False), strict=True))


def draw_caption(picture: Image.Image, left: int, name: str, score: float, highest: float) -> None:
    """Two lines above a column: what it shows, and its score beside the highest normal one."""
    title, remark, colour = f"{SHOWN[name]}: caught", f" > {highest:.3f}", "black"
    if name.startswith("good/"):
        title, remark = SHOWN[name], ", highest normal" if score == highest else ""
    elif score <= highest:
        title, remark, colour = f"{SHOWN[name]}: missed", f" < {highest:.3f}", "firebrick"
    draw = ImageDraw.Draw(picture)
    draw.text((left, MARGIN), title, fill=colour, font=ImageFont.load_default(30))
    draw.text((left, MARGIN + 40), f"score {score:.3f}{remark}", fill=colour, font=ImageFont.load_default(22))


def draw_image(picture: Image.Image, left: int, name: str, scored: ScoredImage, colours: ColourRange) -> None:
    """The photograph, and below it the same under its map, with the outline of where the defect was painted."""
    size = (SIDE, SIDE)
    path = PRODUCT / "test" / f"{name}.jpg"
    photograph = read_image(path, str(path)).resize(size, Image.Resampling.BICUBIC)
    anomaly = Image.fromarray(scored.full_size_map().numpy()).resize(size, Image.Resampling.BICUBIC)
    under_map = overlay(photograph, np.asarray(anomaly), colours)
    mask = PRODUCT / "ground_truth" / f"{name}_mask.png"
    if mask.is_file():
        under_map.paste(OUTLINE, mask=outline(Image.open(mask)))
    picture.paste(photograph, (left, TOP))
    picture.paste(under_map, (left, TOP + SIDE + GAP))


def outline(mask: Image.Image) -> Image.Image:
    """A thin line around a mask, at the size of the picture's tiles."""
    shape = mask.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
    shape = shape.point(lambda value: 255 * (value > 40))
    return ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(5)), shape).filter(ImageFilter.GaussianBlur(0.6))


def draw_bar(picture: Image.Image, colours: ColourRange, highest: float) -> None:
    """The scale of the maps' colours beside the lower row, with the highest normal score marked."""
    left, top = WIDTH - MARGIN - BAR, TOP + SIDE + GAP
    values = np.linspace(colours.high, colours.low, SIDE)
    picture.paste(heat_map(np.repeat(values[:, None], 24, axis=1), colours), (left, top))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    for value in (colours.high, highest, colours.low):
        y = top + round((SIDE - 1) * (colours.high - value) / (colours.high - colours.low))
        draw.line((left + 24, y, left + 32, y), fill="black", width=2)
        draw.text((left + 38, y), f"{value:.3f}", fill="black", font=font, anchor="lm")


if __name__ == "__main__":
    main(ROOT / "docs" / "picture.jpg")
