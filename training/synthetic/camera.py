"""How a class of the synthetic set is photographed: three camera views, and what differs between two pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from training.synthetic.noise import Field
from training.synthetic.surface import Lamp, Surface, shade

VIEWS = ("C1", "C2", "C3")
STAGE = 2.5  # side of the material's square, in images: room for turned and tilted views at random places
BOARD = 1.1  # side of the part's square, in images

_FAR = 3.0  # distance of the camera, in images: a mild perspective


@dataclass(frozen=True)
class Pose:
    """How the camera looks at the plane: ``zoom`` times nearer, then turned by roll, yaw and pitch in radians."""

    zoom: float
    roll: float
    yaw: float
    pitch: float


@dataclass(frozen=True)
class Scene:
    """One class seen by one camera: lit canvases of which every photograph shows a part.

    ``ground``: the material, or what the part lies on; ``part``: its light times its coverage, None for a material;
    ``cover``: what it hides of the ground, with its shadow; ``inside``: the part alone. ``size``: side of a
    photograph in px. ``play``: how far the part is turned from one picture to the next, in radians.
    """

    ground: Image.Image
    part: Image.Image | None
    cover: Image.Image | None
    inside: Image.Image | None
    pose: Pose
    size: int
    play: float


def scenes(ground: Surface, part: Surface | None, rng: np.random.Generator, size: int) -> dict[str, Scene]:
    """The scenes of a class, one for each of ``VIEWS``: from above, and twice tilted and turned in other light."""
    play = rng.uniform(0.02, 0.25)
    azimuth = rng.uniform(0, 2 * math.pi)
    turn, tilt, lean = rng.uniform(0.25, 0.8), rng.uniform(0.2, 0.45), rng.choice([-1, 1]) * rng.uniform(0.25, 0.5)
    poses = (Pose(1.0, 0, 0, 0), Pose(1.05, turn, 0.1, tilt), Pose(1.2, -turn, lean, -0.15))
    lamps = (
        Lamp(azimuth, rng.uniform(0.8, 1.1)), Lamp(azimuth + 1.8, rng.uniform(0.7, 0.95)), Lamp(azimuth - 1.6, 0.9)
    )  # fmt: skip
    return {
        view: _scene(ground, part, lamp, pose, size, play) for view, lamp, pose in zip(VIEWS, lamps, poses, strict=True)
    }


def _scene(ground: Surface, part: Surface | None, lamp: Lamp, pose: Pose, size: int, play: float) -> Scene:
    floor = _picture(shade(ground, lamp))
    if part is None or part.inside is None:
        return Scene(floor, None, None, None, pose, size, play)
    inside = part.inside
    reach = size * 0.025
    away = (-math.sin(lamp.azimuth) * reach, -math.cos(lamp.azimuth) * reach)
    shadow = ndimage.gaussian_filter(ndimage.shift(inside, away, order=1), reach * 0.6)
    contact = ndimage.gaussian_filter(inside, reach * 0.5)
    cover = inside + np.clip(0.55 * shadow + 0.3 * contact, 0, 0.75) * (1 - inside)
    lit = shade(part, lamp) * inside[..., None]
    return Scene(floor, _picture(lit), _picture(cover * 255), _picture(inside * 255), pose, size, play)


def _picture(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def photograph(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """One picture of the scene, of a chance pose, place, exposure, sharpness and noise.

    Returns:
        The photograph (size, size, 3) uint8, and where the part is, (size, size) bool; None for a material.
    """
    size, jitter = scene.size, rng.normal(0, 1, 4)
    turn = scene.play if scene.part is not None else 0.03
    pose = replace(
        scene.pose,
        zoom=scene.pose.zoom * math.exp(0.03 * jitter[0]),
        roll=scene.pose.roll + turn * jitter[1],
        yaw=scene.pose.yaw + 0.02 * jitter[2],
        pitch=scene.pose.pitch + 0.02 * jitter[3],
    )
    still = np.zeros(2)
    room = scene.ground.width / 2 - _reach(pose, size) - 2
    picture = _look(scene.ground, pose, size, rng.uniform(-room, room, 2), still)
    where = None
    if scene.part is not None and scene.cover is not None and scene.inside is not None:
        shift = np.clip(rng.normal(0, 0.02, 2), -0.05, 0.05) * size
        part, cover, inside = (_look(i, pose, size, still, shift) for i in (scene.part, scene.cover, scene.inside))
        picture = picture * (1 - cover[..., None] / 255) + part
        where = inside > 128
    return _expose(picture, rng), where


def _plane_to_image(pose: Pose, size: int) -> np.ndarray:
    """The homography (3, 3) of px in the plane around its middle to px in the image around its middle."""
    (cr, sr), (cy, sy), (cp, sp) = ((math.cos(a), math.sin(a)) for a in (pose.roll, pose.yaw, pose.pitch))
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    turned = (pitch @ yaw @ roll)[:, :2] * pose.zoom
    far = _FAR * size
    return np.column_stack([np.vstack([far * turned[:2], turned[2:]]), [0, 0, far]])


def _reach(pose: Pose, size: int) -> float:
    """How far from the middle of the plane the image's corners look, in px."""
    corners = np.array([[x, y, 1] for x in (-size / 2, size / 2) for y in (-size / 2, size / 2)]).T
    seen = np.linalg.inv(_plane_to_image(pose, size)) @ corners
    return float(np.abs(seen[:2] / seen[2]).max())


def _look(canvas: Image.Image, pose: Pose, size: int, place: np.ndarray, shift: np.ndarray) -> Field:
    """The part of the canvas around ``place`` (x, y from its middle), moved by ``shift`` in the image; px, float32."""
    to_middle = np.array([[1, 0, -size / 2 - shift[0]], [0, 1, -size / 2 - shift[1]], [0, 0, 1]])
    from_middle = np.array([[1, 0, canvas.width / 2 + place[0]], [0, 1, canvas.height / 2 + place[1]], [0, 0, 1]])
    back = from_middle @ np.linalg.inv(_plane_to_image(pose, size)) @ to_middle
    numbers = (back / back[2, 2]).ravel()[:8].tolist()
    seen = canvas.transform((size, size), Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BICUBIC)
    return np.asarray(seen, dtype=np.float32)


def _expose(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, white balance, exposure, a lens that is never quite sharp, and the noise of the sensor."""
    size = picture.shape[0]
    rows, columns = np.linspace(-1, 1, size, dtype=np.float32)[:, None], np.linspace(-1, 1, size, dtype=np.float32)
    down, across = rng.normal(0, 0.05, 2)
    light = 1 + down * rows + across * columns - rng.uniform(0, 0.08) * (rows**2 + columns**2)
    balance = np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.015, 3)).astype(np.float32)
    bright = picture * (light[..., None] * balance).astype(np.float32)
    sharp = Image.fromarray(np.clip(bright, 0, 255).astype(np.uint8))
    soft = ndimage.gaussian_filter(np.asarray(sharp, np.float32), (s := rng.uniform(0.25, 0.75) * size / 256, s, 0))
    grain = rng.standard_normal(soft.shape, dtype=np.float32)
    noisy = soft + grain * (rng.uniform(0.8, 2.0) + 0.12 * np.sqrt(soft))
    return np.clip(noisy, 0, 255).astype(np.uint8)
