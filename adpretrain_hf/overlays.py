"""Pictures of anomaly maps: heat maps, overlays on the image, frames that tell a decision, and a contact sheet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from adpretrain_hf.errors import InputError
from adpretrain_hf.scoring import Calibration

# Dark to bright, even in lightness, and readable without colour vision.
_COLOURS = np.array(
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39),
     (252, 255, 164)],
    dtype=np.float32,
)  # fmt: skip
_UNSEEN = (128, 128, 128)
_NORMAL, _ANOMALOUS = (0, 158, 115), (213, 40, 0)  # a bluish green, told from the red without colour vision
_BAND = 2**18  # pixels that are blended at a time
_TILE, _CAPTION, _GAP, _COLUMNS = 128, 34, 10, 3


@dataclass(frozen=True)
class ColourRange:
    """The map values of the darkest and the brightest colour, the same for all images that are to be compared.

    Raises:
        InputError: they are not finite, or the brightest is not above the darkest.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(f"the colours' range is {self.low} to {self.high}, expected finite numbers, LOW < HIGH")


@dataclass(frozen=True)
class SheetEntry:
    """One image of a contact sheet: the picture, its map (H, W), two lines of caption."""

    image: Image.Image
    anomaly: np.ndarray
    title: str
    subtitle: str
    colours: ColourRange


def calibrated_colours(calibration: Calibration) -> ColourRange:
    """Colours that mean the same in every picture of a product: an ordinary pixel is dark, the threshold halfway."""
    low = calibration.typical
    return ColourRange(low, low + 2 * max(calibration.pixel_threshold() - low, 1e-6))


def colour_range(maps: Iterable[np.ndarray]) -> ColourRange:
    """Chooses the colours' range for some maps: from the typical patch to the most anomalous one.

    The brightest colour is at least half again the typical value, so that a run of normal images stays dark.
    """
    quantiles = [np.quantile(anomaly, (0.5, 0.999)) for anomaly in maps]
    low = float(np.median([typical for typical, _ in quantiles]))
    return ColourRange(low, max(1.5 * low, float(max(high for _, high in quantiles)), low + 1e-6))


def heat_map(anomaly: np.ndarray, colours: ColourRange) -> Image.Image:
    """Colours a map (H, W)."""
    return Image.fromarray(_colour(anomaly, colours)[1].astype(np.uint8))


def overlay(
    image: Image.Image, anomaly: np.ndarray, colours: ColourRange, box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """Lays a map (H, W) over its RGB image (W x H); what is normal stays as it is.

    Args:
        image, anomaly, colours: the picture, its map, and the range of all.
        box: top, left, height and width of what the network saw; the rest is hatched. All of it by default.
    """
    pixels, rows = np.array(image), max(1, _BAND // anomaly.shape[1])
    for start in range(0, len(anomaly), rows):  # in floats, a large image would take gigabytes
        band = slice(start, start + rows)
        relative, colour = _colour(anomaly[band], colours)
        weight = 0.75 * np.sqrt(relative)[..., None]
        pixels[band] = ((1 - weight) * pixels[band].astype(np.float32) + weight * colour).round()
    if box is not None:
        _hatch(pixels, box)
    return Image.fromarray(pixels)


def _hatch(pixels: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Draws diagonal lines over an image (H, W, 3) outside a box."""
    top, left, height, width = box
    pitch = max(8, min(pixels.shape[:2]) // 32)
    columns = np.arange(pixels.shape[1])
    for row, line in enumerate(pixels):
        hatched = (row + columns) % pitch < pitch / 4
        if top <= row < top + height:
            hatched[left : left + width] = False
        line[hatched] = _UNSEEN


def outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with white lines along the inner edges of what is True in a mask (H, W)."""
    inside = Image.fromarray(mask).convert("L")
    width = max(1, min(picture.size) // 256)
    lines = np.asarray(inside) > np.asarray(inside.filter(ImageFilter.MinFilter(2 * width + 1)))
    pixels = np.array(picture)
    pixels[lines] = 255
    return Image.fromarray(pixels)


def framed(picture: Image.Image, is_anomalous: bool) -> Image.Image:
    """The picture in a frame inside its edges: green for a normal image, red for an anomalous one."""
    picture, width = picture.copy(), max(2, min(picture.size) // 48)
    box, colour = (0, 0, picture.width - 1, picture.height - 1), _ANOMALOUS if is_anomalous else _NORMAL
    ImageDraw.Draw(picture).rectangle(box, outline=colour, width=width)
    return picture


def contact_sheet(entries: Sequence[SheetEntry]) -> Image.Image:
    """Draws image, heat map and overlay of every entry, with its caption, three entries in a row."""
    width, height = 3 * _TILE + 2 + _GAP, _TILE + _CAPTION + _GAP
    rows, columns = -(-len(entries) // _COLUMNS), min(_COLUMNS, len(entries))
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for number, entry in enumerate(entries):
        row, column = divmod(number, _COLUMNS)
        _draw_entry(sheet, entry, _GAP + column * width, _GAP + row * height)
    return sheet


def _draw_entry(sheet: Image.Image, entry: SheetEntry, left: int, top: int) -> None:
    pictures = (entry.image, heat_map(entry.anomaly, entry.colours), overlay(entry.image, entry.anomaly, entry.colours))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((left, top), entry.title, fill="black", font=font)
    draw.text((left, top + 15), entry.subtitle, fill="black", font=font)
    for place, picture in enumerate(pictures):
        tile = picture.copy()  # thumbnail() works in place
        tile.thumbnail((_TILE, _TILE))
        sheet.paste(tile, (left + place * (_TILE + 1), top + _CAPTION))


def _colour(anomaly: np.ndarray, colours: ColourRange) -> tuple[np.ndarray, np.ndarray]:
    """Where a map (H, W) lies in the range, 0 to 1, and its colours (H, W, 3)."""
    relative = np.clip((anomaly.astype(np.float32) - colours.low) / (colours.high - colours.low), 0, 1)
    anchors = np.linspace(0, 1, len(_COLOURS))
    return relative, np.stack([np.interp(relative, anchors, channel) for channel in _COLOURS.T], axis=-1)
