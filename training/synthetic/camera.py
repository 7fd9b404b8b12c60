"""What drawings are made of - random fields, surfaces, light - and how a class is photographed in three views."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

VIEWS = ("C1", "C2", "C3")
STAGE = 2.5  # side of the material's square, in images: room for turned and tilted views at random places
BOARD = 1.1  # side of the part's square, in images

_FAR = 3.0  # distance of the camera, in images: a mild perspective
_AMBIENT = 0.42  # share of the light that comes from everywhere
_POLISH = 40  # exponent of the highlight: about 10 degrees wide

Rng = np.random.Generator
Field = np.ndarray  # (H, W) float32, or (H, W, 3) where it is said


def generator(*keys: int | str) -> Rng:
    """A random generator of its own for every tuple of keys (text, and whole numbers from 0), the same on every run."""
    words: list[int] = []
    for key in keys:
        # Text by its bytes: Python's own hash() of a string is another one in every process.
        words += [key % 2**32, key // 2**32] if isinstance(key, int) else [*key.encode(), 2**32]
    return np.random.default_rng(words)


def noise(rng: Rng, shape: tuple[int, int], cell: float | tuple[float, float], octaves: int = 3) -> Field:
    """Fractal noise (H, W) float32 of mean about 0 and standard deviation about 1.

    ``cell``: px from one random value to the next in the coarsest octave, one number or (down, across); every further
    octave has half the cells and 0.55 of the height.
    """
    height, width = shape
    cells = cell if isinstance(cell, tuple) else (cell, cell)
    total, power = np.zeros(shape, np.float32), 0.0
    for octave in range(octaves):
        down, across = (max(side / 2**octave, 1.0) for side in cells)
        if down == across == 1.0:
            layer = rng.standard_normal(shape, dtype=np.float32)
        else:
            grid = rng.standard_normal((math.ceil(height / down) + 3, math.ceil(width / across) + 3), dtype=np.float32)
            x, y = 1 + rng.random(), 1 + rng.random()
            box = (x, y, x + width / across, y + height / down)
            smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=box)
            layer = np.asarray(smooth) * np.float32(1.45)  # interpolation takes about a third of the deviation away
        weight = 0.55**octave
        total += weight * layer
        power += weight**2
    return total / np.float32(math.sqrt(power))


def smoothstep(values: Field) -> Field:
    """0 below 0, 1 above 1, and a slope without corners between."""
    clipped = np.clip(values, 0.0, 1.0)
    return clipped * clipped * (3.0 - 2.0 * clipped)


def log_uniform(rng: Rng, low: float, high: float) -> float:
    """A number between ``low`` and ``high`` whose logarithm is uniform: as many small ones as large ones."""
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def mix(first: np.ndarray, second: np.ndarray, share: Field) -> np.ndarray:
    """From the first colour, (3,) or (H, W, 3), to the second, as ``share`` (H, W) goes from 0 to 1: (H, W, 3)."""
    return first + (second - first) * share[..., None]


class Surface(NamedTuple):
    """A square piece of material, or a part seen from above.

    ``colour`` (N, N, 3) in [0, 1]; ``height`` (N, N) in px; ``gloss`` and ``metal``: (N, N) or one number, from 0
    (matt; paint) to 1 (polished; bare metal); ``inside`` (N, N) in [0, 1]: 1 on the part, None where all is material.
    """

    colour: np.ndarray
    height: Field
    gloss: Field | float = 0.0
    metal: Field | float = 0.0
    inside: Field | None = None


class Scene(NamedTuple):
    """One class seen by one camera: lit canvases of which every photograph shows a part.

    ``ground``: the material, or what the part lies on; ``part``: None for a material, else the part's light times its
    coverage, what it hides of the ground with its shadow, and its coverage; ``pose``: how many times nearer the camera
    is, then roll, yaw and pitch in radians; ``size``: side of a photograph in px; ``play``: how far the part is turned
    from one picture to the next, in radians.
    """

    ground: Image.Image
    part: tuple[Image.Image, ...] | None
    pose: tuple[float, float, float, float]
    size: int
    play: float


def shade(surface: Surface, azimuth: float, elevation: float) -> np.ndarray:
    """The surface lit by a lamp at ``azimuth`` and ``elevation`` (radians), as grey levels (N, N, 3) float32.

    Lambert's law for the body, Blinn and Phong's for the highlight, a striped sky for what metal mirrors, and less
    light in hollows.
    """
    height = surface.height
    down, across = np.gradient(height)
    upright = 1 / np.sqrt(1 + down**2 + across**2)
    to_lamp = -(down * math.sin(azimuth) + across * math.cos(azimuth)) * upright  # the slope's share of it
    lambert = np.clip(to_lamp * math.cos(elevation) + upright * math.sin(elevation), 0, None) / math.sin(elevation)
    hollow = height - ndimage.uniform_filter(height, max(height.shape[0] // 60, 3))
    body = surface.colour * ((_AMBIENT + (1 - _AMBIENT) * lambert) * np.clip(1 + 0.09 * hollow, 0.5, 1.12))[..., None]
    # A bright lamp box, a dark room, and a slow change across the image.
    line = np.linspace(-1, 1, height.shape[0], dtype=np.float32)
    drift = line[:, None] * math.sin(azimuth) + line * math.cos(azimuth)
    sky = 0.5 + 0.5 * np.sin(3.2 * to_lamp + 0.9 * drift + 0.4)
    mirrored = surface.colour * (0.42 + 0.62 * sky)[..., None]
    metal = np.broadcast_to(surface.metal, lambert.shape)[..., None]
    half = (math.pi / 2 + elevation) / 2  # elevation of the direction between the lamp and the camera above
    glance = np.clip(to_lamp * math.cos(half) + upright * math.sin(half), 0, 1) ** _POLISH
    return ((body + (mirrored - body) * metal + (surface.gloss * glance * 0.75)[..., None]) * 255).astype(np.float32)


def scenes(ground: Surface, part: Surface | None, rng: Rng, size: int) -> dict[str, Scene]:
    """The scenes of a class, one for each of ``VIEWS``: from above, and twice tilted and turned in other light."""
    play, azimuth = rng.uniform(0.02, 0.25), rng.uniform(0, 2 * math.pi)
    turn, tilt, lean = rng.uniform(0.25, 0.8), rng.uniform(0.2, 0.45), rng.choice([-1, 1]) * rng.uniform(0.25, 0.5)
    poses = ((1.0, 0.0, 0.0, 0.0), (1.05, turn, 0.1, tilt), (1.2, -turn, lean, -0.15))
    lamps = ((azimuth, rng.uniform(0.8, 1.1)), (azimuth + 1.8, rng.uniform(0.7, 0.95)), (azimuth - 1.6, 0.9))
    return {
        view: Scene(_picture(shade(ground, *lamp)), _lit_part(part, *lamp, size) if part else None, pose, size, play)
        for view, pose, lamp in zip(VIEWS, poses, lamps, strict=True)
    }


def _lit_part(part: Surface, azimuth: float, elevation: float, size: int) -> tuple[Image.Image, ...]:
    inside, reach = np.asarray(part.inside), size * 0.025
    away = (-math.sin(azimuth) * reach, -math.cos(azimuth) * reach)
    shadow = ndimage.gaussian_filter(ndimage.shift(inside, away, order=1), reach * 0.6)
    dark = np.clip(0.55 * shadow + 0.3 * ndimage.gaussian_filter(inside, reach * 0.5), 0, 0.75)
    lit = shade(part, azimuth, elevation) * inside[..., None]
    return _picture(lit), _picture((inside + dark * (1 - inside)) * 255), _picture(inside * 255)


def _picture(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def photograph(scene: Scene, rng: Rng) -> tuple[np.ndarray, np.ndarray | None]:
    """One picture of the scene, of a chance pose, place, exposure, sharpness and noise.

    Returns:
        The photograph (size, size, 3) uint8, and where the part is, (size, size) bool; None for a material.
    """
    size, (zoom, roll, yaw, pitch), jitter = scene.size, scene.pose, rng.normal(0, 1, 4)
    roll += (scene.play if scene.part else 0.03) * jitter[1]
    pose = (zoom * math.exp(0.03 * jitter[0]), roll, yaw + 0.02 * jitter[2], pitch + 0.02 * jitter[3])
    to_plane, still = _image_to_plane(*pose, size), np.zeros(2)
    corners = to_plane @ np.array([[x, y, 1] for x in (-size / 2, size / 2) for y in (-size / 2, size / 2)]).T
    room = scene.ground.width / 2 - float(np.abs(corners[:2] / corners[2]).max()) - 2
    picture, where = _look(scene.ground, to_plane, size, rng.uniform(-room, room, 2), still), None
    if scene.part:
        shift = np.clip(rng.normal(0, 0.02, 2), -0.05, 0.05) * size
        part, cover, inside = (_look(canvas, to_plane, size, still, shift) for canvas in scene.part)
        picture, where = picture * (1 - cover[..., None] / 255) + part, inside > 128
    return _expose(picture, rng), where


def _image_to_plane(zoom: float, roll: float, yaw: float, pitch: float, size: int) -> np.ndarray:
    """The homography (3, 3) of px in the image around its middle to px in the plane around its middle."""
    turned = Rotation.from_euler("XYZ", (pitch, yaw, roll)).as_matrix()[:, :2] * zoom
    far = _FAR * size
    return np.linalg.inv(np.column_stack([np.vstack([far * turned[:2], turned[2:]]), [0, 0, far]]))


def _look(canvas: Image.Image, to_plane: np.ndarray, size: int, place: np.ndarray, shift: np.ndarray) -> Field:
    """The part of the canvas around ``place`` (x, y from its middle), moved by ``shift`` in the image; px, float32."""
    to_middle = np.array([[1, 0, -size / 2 - shift[0]], [0, 1, -size / 2 - shift[1]], [0, 0, 1]])
    from_middle = np.array([[1, 0, canvas.width / 2 + place[0]], [0, 1, canvas.height / 2 + place[1]], [0, 0, 1]])
    back = from_middle @ to_plane @ to_middle
    numbers = (back / back[2, 2]).ravel()[:8].tolist()
    seen = canvas.transform((size, size), Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BICUBIC)
    return np.asarray(seen, dtype=np.float32)


def _expose(picture: np.ndarray, rng: Rng) -> np.ndarray:
    """Uneven light, white balance, exposure, a lens that is never quite sharp, and the noise of the sensor."""
    size = picture.shape[0]
    columns = np.linspace(-1, 1, size, dtype=np.float32)
    rows = columns[:, None]
    down, across = rng.normal(0, 0.05, 2)
    light = 1 + down * rows + across * columns - rng.uniform(0, 0.08) * (rows**2 + columns**2)
    balance = np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.015, 3)).astype(np.float32)
    sharp = np.clip(picture * (light[..., None] * balance).astype(np.float32), 0, 255).astype(np.uint8)
    soft = ndimage.gaussian_filter(sharp.astype(np.float32), (s := rng.uniform(0.25, 0.75) * size / 256, s, 0))
    grain = rng.standard_normal(soft.shape, dtype=np.float32)
    return np.clip(soft + grain * (rng.uniform(0.8, 2.0) + 0.12 * np.sqrt(soft)), 0, 255).astype(np.uint8)
