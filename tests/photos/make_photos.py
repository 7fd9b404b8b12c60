"""Cut and paint the demo photographs next to this file, in MVTecAD's layout.

Photographs of brick, gravel and grass that scikit-image ships are cut into tiles that share no pixel; some
tiles get a painted defect and the mask of it. Everything is seeded: a second run writes the same pictures.

    python tests/photos/make_photos.py [folder]

Needs scikit-image, scipy, numpy and pillow.
"""

import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import data

Array = np.ndarray
Painter = Callable[[Array, np.random.Generator, float], Array]

SIDE = 102
FINE = 4  # shapes are drawn this much larger and then shrunk, which smooths their edges
VISIBLE = 9  # grey levels
QUALITY = 92

# "21" is row 2, column 1 of the photograph's 5 x 5 grid. Left out on purpose: gravel 03 and 04 and the upper two rows
# of grass hold stretches that occur again elsewhere in the same photograph; bricks with a scratch, a spot or dark marks
# of their own; gravel 10, 13, 24 and 33, where straws lie that look like the painted wires.
# The oddest cells (weeds, leaves, pale stones, a knot in a brick) are references, never test images.
LAYOUT = {
    "brick": {"train/good": "02 04 10 21 22 31 33 40", "test/good": "12 23", "test/crack": "00 30 13",
              "test/stain": "11 20 41", "test/scratch": "01 03"},
    "gravel": {"train/good": "00 02 11 20 23 32 42 44", "test/good": "22 31", "test/foreign": "01 30 34",
               "test/stain": "12 40 43", "test/wire": "21 41 14"},
    "grass": {"train/good": "21 22 23 32 33 40 41 43", "test/good": "24 31", "test/foreign": "20 34 44",
              "test/stain": "30 42"},
}  # fmt: skip
TALLER = {("gravel", "14"): 38}  # these rows belong to gravel 04, below the stretch that occurs again


def _shrink(canvas: Image.Image) -> Array:
    """A finely drawn shape at the size of its tile, 0 to 1."""
    return np.asarray(canvas.reduce(FINE), float) / 255


def _draw(shape: tuple[int, ...], dots: Array, radii: Sequence[float] | Array) -> Array:
    """Coverage (0 to 1) of a line through `dots` (n, 2 as x, y) that is `radii` thick."""
    canvas = Image.new("L", (shape[1] * FINE, shape[0] * FINE))
    pen = ImageDraw.Draw(canvas)
    for (x, y), r in zip(dots * FINE, np.asarray(radii) * FINE, strict=True):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return _shrink(canvas)


def _walk(rng: np.random.Generator, shape: tuple[int, ...], length: int, bend: float, jag: float) -> Array:
    """A wandering path of `length` pixels about the middle of the tile; `jag` adds sharp corners."""
    steps = length * 2
    drift = np.cumsum(ndimage.gaussian_filter1d(rng.normal(0, bend, steps), 10))
    corners = np.repeat(rng.normal(0, jag, steps // 10 + 1), 10)[:steps]
    angle = rng.uniform(0, 2 * np.pi) + drift + corners
    dots = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], 1) / 2, 0)
    middle = np.array(shape[1::-1]) * rng.uniform(0.42, 0.58, 2)
    return dots - (dots.min(0) + dots.max(0)) / 2 + middle


def _taper(count: int, radius: float, rng: np.random.Generator) -> Array:
    """Radii that wobble along a line and thin out towards both of its ends."""
    wobble = 1 + ndimage.gaussian_filter1d(rng.normal(0, 1.5, count), 5)
    return radius * np.clip(wobble, 0.5, 1.6) * np.sin(np.linspace(0.25, np.pi - 0.25, count)) ** 0.5


def _blob(rng: np.random.Generator, shape: tuple[int, ...], radius: float, corners: int) -> Array:
    """Coverage of a closed, uneven, oblong spot somewhere in the middle of the tile."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    reach = radius * rng.uniform(0.85, 1.25) * np.ones(corners)
    for k in range(2, 12):
        reach *= 1 + rng.uniform(0.15, 0.35) / (k - 1) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    middle = np.array(shape[1::-1]) * rng.uniform(0.28, 0.72, 2)
    dots = np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None] + middle
    canvas = Image.new("L", (shape[1] * FINE, shape[0] * FINE))
    ImageDraw.Draw(canvas).polygon([tuple(dot) for dot in dots * FINE], fill=255)
    return _shrink(canvas)


def _crack(tile: Array, rng: np.random.Generator, strength: float) -> Array:
    """A dark jagged gap with a side branch and one faintly lit lip."""
    dots = _walk(rng, tile.shape, 84, 0.06, 0.5)
    fork = _walk(rng, tile.shape, 24, 0.06, 0.5)
    fork += dots[len(dots) // 2] - fork[0]
    gap = np.maximum(_draw(tile.shape, dots, _taper(len(dots), 0.7, rng)),
                     _draw(tile.shape, fork, np.linspace(0.55, 0.2, len(fork))))  # fmt: skip
    lip = np.clip(np.roll(gap, (1, 1), (0, 1)) - gap, 0, 1)
    gap = ndimage.gaussian_filter(gap, 0.45)
    return tile * (1 - 0.85 * strength * gap) + 14 * strength * lip


def _scratch(tile: Array, rng: np.random.Generator, strength: float) -> Array:
    """A thin bright curve whose pressure varies, and a shorter one beside it."""
    dots = _walk(rng, tile.shape, 76, 0.03, 0.0)
    along = (dots[-1] - dots[0]) / np.linalg.norm(dots[-1] - dots[0])
    side = dots[len(dots) // 3 : -len(dots) // 4] + 3.2 * along[::-1] * (-1, 1)
    line = np.maximum(_draw(tile.shape, dots, _taper(len(dots), 0.7, rng)),
                      0.7 * _draw(tile.shape, side, _taper(len(side), 0.5, rng)))  # fmt: skip
    return tile + 80 * strength * ndimage.gaussian_filter(line, 0.45)


def _wire(tile: Array, rng: np.random.Generator, strength: float) -> Array:
    """A thin bent wire lying on the surface: light along its back, dark in its shadow."""
    dots = _walk(rng, tile.shape, 88, 0.12, 0.0)
    body = ndimage.gaussian_filter(_draw(tile.shape, dots, np.full(len(dots), 0.75)), 0.4)
    shade = ndimage.gaussian_filter(_draw(tile.shape, dots + 1.2, np.full(len(dots), 0.95)), 0.8)
    ground = tile * (1 - 0.5 * shade)
    return ground * (1 - body) + body * (90 + 120 * strength)


def _stain(tile: Array, rng: np.random.Generator, strength: float) -> Array:
    """A soft mottled spot that darkens or bleaches the surface, whose texture stays visible."""
    cover = ndimage.gaussian_filter(_blob(rng, tile.shape, 10, 60), 1.3)
    mottle = ndimage.gaussian_filter(rng.normal(0, 1.2, tile.shape), 1.5)
    cover = np.clip(cover * (0.9 + mottle * 0.4), 0, 1)
    target = tile * (1 - 0.6 * strength) if rng.random() < 0.5 else 0.7 * tile + 45 + 70 * strength
    return tile * (1 - cover) + cover * target


def _foreign(tile: Array, rng: np.random.Generator, strength: float, other: Array) -> Array:
    """A lump of another photograph lying on this one, with a shadow at its lower right."""
    cover = ndimage.gaussian_filter(_blob(rng, tile.shape, 10, 11), 0.6)
    top, left = rng.integers(0, np.array(other.shape) - tile.shape)
    lump = other[top : top + tile.shape[0], left : left + tile.shape[1]]
    shade = ndimage.gaussian_filter(np.roll(cover, (2, 2), (0, 1)), 1.2)
    ground = tile * (1 - 0.6 * strength * shade)
    return ground * (1 - cover) + cover * (lump * (0.9 + 0.35 * strength))


def mask_of(before: Array, after: Array) -> Array:
    """Where two tiles differ visibly, without pinholes and stray pixels.

    Args:
        before: The tile as photographed.
        after: The tile with its defect.

    Returns:
        A mask of the same size, 0 or 255.
    """
    seen = np.abs(after - before) >= VISIBLE
    around = np.ones((3, 3))
    seen = ndimage.binary_fill_holes(ndimage.binary_closing(seen, around))
    labels, count = ndimage.label(seen, around)
    sizes = ndimage.sum_labels(labels > 0, labels, np.arange(count + 1))
    return np.where(sizes[labels] >= 4, 255, 0).astype(np.uint8)


def _cut(photo: Array, category: str, cell: str) -> Array:
    """The tile of one grid cell."""
    top, left = int(cell[0]) * SIDE, int(cell[1]) * SIDE
    return photo[top - TALLER.get((category, cell), 0) : top + SIDE, left : left + SIDE]


def paint(tile: Array, category: str, defect: str, index: int, other: Array) -> tuple[Array, Array]:
    """Paint one defect.

    Args:
        tile: The tile as photographed.
        category: Name of the photograph, part of the seed.
        defect: Which kind of defect.
        index: Number of the picture among its kind, 0 to 2: the higher, the weaker the paint.
        other: The photograph that a foreign body is taken from.

    Returns:
        The tile with its defect, and the mask of it.
    """
    rng = np.random.default_rng([zlib.crc32(f"{category}/{defect}".encode()), index])
    painters: dict[str, Painter] = {"crack": _crack, "scratch": _scratch, "wire": _wire, "stain": _stain,
                                    "foreign": lambda *args: _foreign(*args, other)}  # fmt: skip
    before = tile.astype(float)
    after = np.clip(painters[defect](before, rng, (1.0, 0.8, 0.6)[index]), 0, 255)
    return after.round().astype(np.uint8), mask_of(before, after)


def _save(folder: Path, name: str, image: Array, **options: int) -> None:
    """Write one picture, making its folder when needed."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / name, **options)


def make(root: Path) -> None:
    """Write every category.

    Args:
        root: Folder that gets one folder per category.
    """
    photos = {"brick": data.brick(), "gravel": data.gravel(), "grass": data.grass()}
    others = {"gravel": "grass", "grass": "brick", "brick": "grass"}
    for category, splits in LAYOUT.items():
        for split, cells in splits.items():
            for index, cell in enumerate(cells.split()):
                tile, defect = _cut(photos[category], category, cell), Path(split).name
                if defect != "good":
                    tile, mask = paint(tile, category, defect, index, photos[others[category]])
                    _save(root / category / "ground_truth" / defect, f"{index:03d}_mask.png", mask)
                _save(root / category / split, f"{index:03d}.jpg", tile, quality=QUALITY)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
