"""Defects painted on any photograph, with the mask of the pixels that they changed."""

import math
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from adpretrain_hf.errors import InputError
from training.synthetic.camera import Field, Rng, log_uniform, noise, smoothstep

# Names of the families, and the folder that each has in RealIAD's layout: RealIAD's own codes where it has the kind.
FAMILIES = {
    "scratch": "HS", "stain": "ZW", "foreign": "YW", "missing": "QS", "dent": "BX", "abrasion": "CH", "pits": "AK",
    "damage": "PS", "crack": "LW", "thread": "MF", "misplaced": "CW", "fade": "TS", "smear": "YM",
}  # fmt: skip

MIN_SIDE = 64  # px: below, the smallest defects are a fraction of a pixel
AREAS = (0.001, 0.08)  # share of the image: a drop of 6 px to a palm of 40 px radius in 256 px
CONTRASTS = (0.06, 0.9)
GRACE = 3  # px around the mask within which the feathered edge of a defect may still change the image

_ALPHA_IN_MASK = 0.15  # below, the eye sees the surface and not the defect
_LEAST_CHANGE = 2.0  # grey levels: what the noise of a camera hides
_MEAN_CHANGE = 8.0  # grey levels, mean over the mask: a defect is at least this plain
_SMALLEST = 6  # px in a mask
_FINE = 2  # lines and dots are drawn this many times finer and then averaged: soft edges
_BORDER = 4  # px kept free around what is drawn, for shadows and rims

# What shapes and painters return: how much of the defect covers each pixel of a window of the image, (h, w) in [0, 1];
# and that window (h, w, 3) in grey levels, float32, as it is or with the new pixels that are laid over it.
Layer = tuple[Field, np.ndarray]


class Defect:
    """One defect to paint: where, how large, how plain; and the shapes and tones that painters share.

    ``image``: (H, W, 3) uint8; ``size``: (H, W); ``unit``: px that are one px of an image of 256 px;
    ``radius``: px, of a disc with the area that the defect is to have; ``centre``: (y, x) px; ``contrast``: 0
    (invisible) to 1 (black on white).
    """

    def __init__(self, image: np.ndarray, where: np.ndarray | None, rng: Rng) -> None:
        self.image, self.rng = image, rng
        height, width = self.size = image.shape[:2]
        self.unit = max(min(self.size) / 256, 0.5)
        self.radius = float(np.sqrt(log_uniform(rng, *AREAS) * height * width / np.pi))
        if where is not None and where.any():
            self.centre: tuple[int, ...] = divmod(int(rng.choice(np.flatnonzero(where))), width)
        else:
            self.centre = tuple(int(rng.integers(side // 16, side - side // 16)) for side in self.size)
        self.contrast = log_uniform(rng, *CONTRASTS)

    def turn(self) -> float:
        """An angle in radians."""
        return self.rng.uniform(0, 2 * math.pi)

    def length(self, low: float, high: float) -> float:
        """The length in px of a stroke, ``low`` to ``high`` times the radius, and not beyond the image."""
        return min(max(self.radius * self.rng.uniform(low, high), 8.0), 0.85 * min(self.size))

    def tone(self, window: np.ndarray) -> float:
        """A change of brightness in grey levels, away from the nearer end of the range, more on busy ground."""
        sign = -1.0 if self.rng.random() < float(window.mean()) / 255 else 1.0
        return sign * (8 + 0.3 * float(window[..., 1].std()) + 130 * self.contrast)

    def tint(self) -> np.ndarray:
        """A colour cast (3,): factors that average to 0, the greatest between 0.1 (dirt) and 1 (paint)."""
        cast = self.rng.normal(size=3)
        cast -= cast.mean()
        return (cast / np.abs(cast).max() * log_uniform(self.rng, 0.1, 1.0)).astype(np.float32)

    def piece(self, shape: tuple[int, ...]) -> np.ndarray:
        """A random window (h, w, 3) float32 of the image, turned or mirrored."""
        places = []
        for side, length in zip(self.size, shape, strict=False):
            place = (int(self.rng.integers(0, side)) + np.arange(length)) % (2 * side)
            places.append(np.minimum(place, 2 * side - 1 - place))  # mirrored: repeated as it is it would show seams
        down, across = (1 if self.rng.random() < 0.5 else -1 for _ in range(2))
        return self.image[np.ix_(*places)].astype(np.float32)[::down, ::across]

    def blob(self, *, feather: float, roughness: float, stretch: float = 2.0) -> Layer:
        """An irregular ellipse of up to ``stretch`` times its width, from ``roughness`` 0 (smooth) to 0.5 (a splash).

        ``feather``: units over which its edge goes from 0 to 1.
        """
        rng, radius, (y, x) = self.rng, self.radius, self.centre
        soft, ratio = max(min(feather * self.unit, radius), 1.0), math.sqrt(rng.uniform(1.0, stretch))
        reach = radius * (1.15 + 1.6 * roughness) * ratio + soft
        top, left = max(int(y - reach), 0), max(int(x - reach), 0)
        bottom, right = min(int(y + reach) + 2, self.size[0]), min(int(x + reach) + 2, self.size[1])
        rows = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
        columns = np.arange(left, right, dtype=np.float32) - np.float32(x)
        turn = rng.uniform(0, math.pi)
        along = columns * math.cos(turn) + rows * math.sin(turn)
        across = rows * math.cos(turn) - columns * math.sin(turn)
        distance = np.sqrt((along / (radius * ratio)) ** 2 + (across * ratio / radius) ** 2)
        wobble = np.clip(roughness * noise(rng, distance.shape, max(radius * 0.9, 2.0)), -0.7, 1.0)
        inside = (1.0 + wobble - distance) * radius  # beyond twice the radius it ends, whatever the noise says
        return self._window(smoothstep(0.5 + inside / soft).astype(np.float32), top, left)

    def shard(self) -> Layer:
        """A jagged polygon at the centre."""
        corners = int(self.rng.integers(4, 12))
        angles = (np.arange(corners) + self.rng.uniform(0, 0.8, corners)) * 2 * math.pi / corners
        reach = self.radius * self.rng.uniform(0.55, 1.35, corners)
        squash, turn = self.rng.uniform(0.5, 1.0), self.rng.uniform(0, math.pi)
        along, across = reach * np.cos(angles), reach * np.sin(angles) * squash
        x = (self.centre[1] + along * math.cos(turn) - across * math.sin(turn)) * _FINE
        y = (self.centre[0] + along * math.sin(turn) + across * math.cos(turn)) * _FINE
        canvas = self.canvas()
        ImageDraw.Draw(canvas).polygon(np.column_stack([x, y]).ravel().tolist(), fill=255)
        return self.drawn(canvas)

    def walk(self, length: float, turn: float, bend: float, step: float, start: np.ndarray | None = None) -> np.ndarray:
        """A path (n, 2) of (y, x) in px, bent by about ``bend`` radians, from ``start`` or else through the centre."""
        count = max(int(length / step), 2)
        # The drift has a mean of its own, so that long paths are arcs rather than trembling straight lines.
        drift = self.rng.normal(0, bend) / count + self.rng.normal(0, 0.5 * bend / math.sqrt(count), count)
        angles = turn + np.cumsum(drift)
        steps = np.column_stack([np.sin(angles), np.cos(angles)]) * step
        path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]) + (self.centre if start is None else start)
        return path if start is not None else path + (np.array(self.centre) - path[len(path) // 2])

    def strokes(self, lines: list[tuple[np.ndarray, float, float]]) -> Layer:
        """Lines: each a path (n, 2), its width in px at the start, and its width at the end."""
        canvas = self.canvas()
        for path, first, last in lines:
            widths = (np.linspace(first, last, len(path) - 1) * _FINE).tolist()
            for (start, end), width in zip(pairwise((path[:, ::-1] * _FINE).tolist()), widths, strict=True):
                ImageDraw.Draw(canvas).line([*start, *end], fill=255, width=max(round(width), 1))
        return self.drawn(canvas)

    def canvas(self) -> Image.Image:
        """What lines and dots are drawn on, ``_FINE`` times as large as the image: 255 for 1."""
        return Image.new("L", (self.size[1] * _FINE, self.size[0] * _FINE))

    def drawn(self, canvas: Image.Image) -> Layer:
        """The patch of a canvas that was drawn on."""
        return self._window(np.asarray(canvas.reduce(_FINE), np.float32) / 255)

    def _window(self, alpha: Field, top: int = 0, left: int = 0) -> Layer:
        """Without the empty rows and columns around it, but for a border: later work is in proportion to the window."""
        rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        if rows.size:
            first, start = max(int(rows[0]) - _BORDER, 0), max(int(columns[0]) - _BORDER, 0)
            alpha = alpha[first : rows[-1] + _BORDER + 1, start : columns[-1] + _BORDER + 1]
            top, left = top + first, left + start
        self.place = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        return alpha, self.image[self.place].astype(np.float32)

    def scratch(self) -> Layer:
        """One or several parallel strokes: a light or dark groove with an edge of the opposite shade."""
        path = self.walk(self.length(2.5, 7), self.turn(), bend=self.rng.uniform(0, 1.2), step=3.0)
        width = log_uniform(self.rng, 0.7, 2.6) * self.unit
        lines = [(path, width, width * 0.5)]
        for _ in range(int(self.rng.integers(1, 5)) if self.rng.random() < 0.35 else 0):
            gap = self.rng.normal(0, 7 * self.unit, 2)
            lines.append((path[int(self.rng.integers(0, len(path) // 2 + 1)) :] + gap, width * 0.8, width * 0.3))
        core, window = self.strokes(lines)
        edge = np.roll(core, (1, 1), (0, 1)) * (1 - core)
        pressure = np.clip(0.85 + 0.25 * noise(self.rng, core.shape, 9 * self.unit, 2), 0.35, 1.0)
        amount = self.tone(window) * 1.2
        change = amount * pressure * (core > 0) - 0.6 * amount * edge * (core == 0)
        return np.maximum(core, 0.7 * edge), window + change[..., None]

    def crack(self) -> Layer:
        """A dark, jagged, branching line with one lit lip: a trunk, and boughs that leave it and grow thinner."""
        width, length = log_uniform(self.rng, 0.8, 2.4) * self.unit, self.length(2.5, 6)
        step, turn = max(length / 24, 2.0), self.turn()
        trunk = self.walk(length, turn, bend=1.6, step=step)
        lines = [(trunk, width, width * 0.4)]
        for _ in range(int(self.rng.integers(0, 5))):
            start = trunk[int(self.rng.integers(1, len(trunk)))]
            side = turn + self.rng.choice([-1, 1]) * self.rng.uniform(0.4, 1.2)
            bough = self.walk(length * self.rng.uniform(0.15, 0.45), side, bend=1.6, step=step, start=start)
            lines.append((bough, width * 0.6, width * 0.2))
        core, window = self.strokes(lines)
        lip = np.roll(core, (1, 1), (0, 1)) * (1 - core)
        depth = 0.25 + 0.7 * self.contrast**0.5
        content = window * (1 - depth) + (lip > core)[..., None] * (window * depth + 25 + 50 * self.contrast)
        return np.maximum(core, 0.5 * lip), content

    def thread(self) -> Layer:
        """A hair or a fibre: a long thin curve of one colour with a faint shadow."""
        path = self.walk(self.length(4, 10), self.turn(), bend=self.rng.uniform(1.5, 6), step=2.0)
        width = log_uniform(self.rng, 0.7, 2.2) * self.unit
        alpha, window = self.strokes([(path, width, width)])
        light = window.mean() < 110 or (self.rng.random() < 0.2 and window.mean() < 190)
        colour = (215 if light else 40) + 40 * self.tint() * self.rng.random()
        opacity = 0.45 + 0.5 * self.contrast**0.5
        body, shadow = alpha * opacity, 0.45 * np.roll(alpha, [max(round(1.5 * self.unit), 1)] * 2, (0, 1)) * opacity
        return np.maximum(body, shadow), np.where((body >= shadow)[..., None], colour, window * 0.45)

    def pits(self) -> Layer:
        """A cluster of small pits or specks, many small and a few large, each with a lit and a shaded side."""
        rng, radius, canvas = self.rng, self.radius * 1.2, self.canvas()
        for index in range(int(log_uniform(rng, 1, 30))):
            far = 0.0 if index == 0 else radius * 0.6  # the first lies in the middle: inside the image
            y, x = (rng.normal(middle, far) * _FINE for middle in self.centre)
            half = max(log_uniform(rng, 0.08, 0.4) * radius, 1.5) * _FINE
            flat = half * rng.uniform(0.7, 1.0)
            ImageDraw.Draw(canvas).ellipse([x - half, y - flat, x + half, y + flat], fill=int(rng.integers(150, 256)))
        alpha, window = self.drawn(canvas)
        change = self.tone(window) * 1.2 * (1 + 0.3 * self.tint() * rng.random())
        return alpha, window + change + _relief(alpha, self.turn()) * (30 + 90 * self.contrast)

    def foreign(self) -> Layer:
        """A piece of another material lying on the surface: its own texture and colour, lit, with a shadow."""
        alpha, window = self.blob(feather=1.5, roughness=0.15) if self.rng.random() < 0.5 else self.shard()
        turn = self.turn()
        bulk = ndimage.uniform_filter(alpha, max(int(self.radius * 0.5), 2))
        material = _relief(bulk, turn) * self.radius * self.rng.uniform(20, 70) + self._material(window)
        shift = tuple(round(-s * self.rng.uniform(1.5, 4) * self.unit) for s in (math.sin(turn), math.cos(turn)))
        shadow = 0.6 * ndimage.uniform_filter(ndimage.shift(alpha, shift, order=0), max(round(2 * self.unit), 2))
        shadow[shadow < 0.08] = 0
        total = alpha + shadow * (1 - alpha)
        share = (alpha / np.maximum(total, 1e-6))[..., None]
        return total, share * material + (1 - share) * window * 0.35

    def _material(self, window: np.ndarray) -> np.ndarray:
        """A texture (h, w, 3) unlike the window: from the photograph with other colours, or drawn."""
        rng = self.rng
        if rng.random() < 0.45:
            colour = window.mean((0, 1)) + self.tone(window) * (1 + 0.8 * self.tint())
            grain = noise(rng, window.shape[:2], rng.uniform(1, 8) * self.unit)[..., None]
            return colour + grain * rng.uniform(3, 25)
        piece = self.piece(window.shape[:2])
        piece = 255 - piece if rng.random() < 0.5 else piece[..., rng.permutation(3)]
        return piece + 0.3 * self.tone(window)

    def missing(self) -> Layer:
        """A part that is not there: its place filled with what is around it, or a hole in shadow."""
        is_hole = self.rng.random() < 0.4
        alpha, window = self.blob(feather=self.rng.uniform(1, 4), roughness=self.rng.uniform(0, 0.3), stretch=3)
        around = alpha < 0.05
        ground = window[around].mean(0) if around.any() else window.mean((0, 1))
        grain = self.rng.uniform(1.5, 5) * noise(self.rng, alpha.shape, 1.5, 2)[..., None]
        if not is_hole:
            return alpha, ground + 0.15 * (_from_afar(window) - ground) + 0.25 * self.tone(window) + grain
        depth = ndimage.uniform_filter(alpha, max(int(self.radius * 0.4), 2))
        dark = ground * (1 - (0.3 + 0.6 * self.contrast) * (0.55 + 0.45 * depth[..., None]))
        return alpha, dark + _relief(depth, self.turn()) * self.radius * 45 + grain

    def damage(self) -> Layer:
        """A chipped or torn place: jagged, rough inside, with one bright edge."""
        alpha, window = self.shard()
        rough = noise(self.rng, alpha.shape, max(self.radius * 0.35, 3), 4)
        bed = _from_afar(window) + self.tone(window) * (1 + 0.2 * self.tint())
        facets = _relief(rough * 2 + ndimage.uniform_filter(alpha, 3) * 4, self.turn())
        return alpha, bed + (10 + 35 * self.contrast) * facets

    def misplaced(self) -> Layer:
        """A patch of the same photograph in a place where it does not belong."""
        alpha, window = self.blob(feather=2, roughness=0.2) if self.rng.random() < 0.6 else self.shard()
        pieces = [self.piece(alpha.shape) for _ in range(3)]
        # Of three candidates the one that differs most: on an even ground most pieces look like what they cover.
        piece = max(pieces, key=lambda p: float((np.abs(p - window).mean(-1) * alpha).sum()))
        return alpha, piece + self.rng.normal(0, 12)

    def stain(self) -> Layer:
        """A spill: the surface seen through a coloured film, often with a darker rim, sometimes opaque."""
        alpha, window = self.blob(feather=self.rng.uniform(2, 12), roughness=self.rng.uniform(0.15, 0.5))
        strength = 0.12 + 0.7 * self.contrast
        wet = window * np.clip(1 - strength * (0.6 + 0.55 * self.tint()), 0, 1.5)
        if window.mean() < 70 or self.rng.random() < 0.2:  # a light film: dust, mould, lime
            wet = window + strength * (235 + 20 * self.tint() - window)
        rim = 4 * alpha * (1 - alpha) * (self.rng.random() < 0.5)
        cloud = 1 + 0.22 * noise(self.rng, alpha.shape, max(self.radius * 0.6, 3))
        return alpha, window + (wet - window) * np.clip(cloud + 0.8 * rim, 0, 1.4)[..., None]

    def abrasion(self) -> Layer:
        """A worn patch: its detail rubbed away and fine streaks of one direction left in it."""
        rng = self.rng
        alpha, window = self.blob(feather=10, roughness=0.4, stretch=3)
        long, fine = 14 * self.unit, max(1.2 * self.unit, 1.0)
        streaks = noise(rng, alpha.shape, (long, fine) if rng.random() < 0.5 else (fine, long), 2)
        wear = smoothstep(0.75 + 0.35 * noise(rng, alpha.shape, max(self.radius * 0.5, 3)) + 0.3 * streaks)[..., None]
        worn = 0.5 * window + 0.5 * _from_afar(window) + 0.8 * self.tone(window) * (1 + 0.25 * self.tint())
        return alpha, window + (worn + 9 * streaks[..., None] - window) * wear

    def fade(self) -> Layer:
        """A patch whose colour has gone: paler, darker, or of another hue."""
        alpha, window = self.blob(feather=self.rng.uniform(4, 14), roughness=0.35)
        gray = (window @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        faded = gray + (window - gray) * self.rng.uniform(0, 0.6)
        spread = 0.8 * abs(self.tone(window))
        return alpha, faded * (1 - 0.4 * self.contrast) + self.tone(window) * 0.6 + spread * 0.5 * self.tint()

    def smear(self) -> Layer:
        """A print, paint or glue that was wiped: the pixels dragged in one direction, with some colour of their own."""
        alpha, window = self.blob(feather=6, roughness=0.35, stretch=4)
        reach = max(int(self.radius * self.rng.uniform(0.5, 1.5)), 5)
        dragged = ndimage.uniform_filter1d(window, reach, axis=int(self.rng.integers(0, 2)))
        streaks = noise(self.rng, alpha.shape, (max(1.5 * self.unit, 1.0), 12 * self.unit), 2)
        colour = self.tone(window) * (0.7 + 0.7 * self.tint())
        return alpha, dragged + colour * np.clip(0.8 + 0.35 * streaks, 0, 1.5)[..., None]

    def dent(self) -> Layer:
        """A bulge, dimple or twist: the surface's own pixels displaced, and shaded as the slope turns to the light."""
        alpha, window = self.blob(feather=8, roughness=0.1)
        soft = ndimage.uniform_filter(ndimage.uniform_filter(alpha, max(int(self.radius * 0.7), 3)), 3)
        rows, columns = np.indices(alpha.shape, dtype=np.float32)
        down, across = rows - (self.centre[0] - self.place[0].start), columns - (self.centre[1] - self.place[1].start)
        power = self.rng.choice([-1, 1]) * (0.2 + 0.5 * self.contrast) * soft
        twist = self.rng.uniform(-1, 1) * (0.3 + self.contrast) * soft
        bent_rows = np.clip(np.rint(rows + power * down + twist * across), 0, alpha.shape[0] - 1).astype(int)
        bent_columns = np.clip(np.rint(columns + power * across - twist * down), 0, alpha.shape[1] - 1).astype(int)
        light = _relief(soft * self.radius, self.turn()) * (25 + 110 * self.contrast)
        return alpha, window[bent_rows, bent_columns] + light


def _relief(height: Field, turn: float) -> Field:
    """Light and shade (H, W, 1) on a height map (H, W) in px, lit from the direction ``turn``; 0 where it is flat."""
    down, across = np.gradient(height)
    return (down * math.sin(turn) + across * math.cos(turn))[..., None]


def _from_afar(window: np.ndarray) -> np.ndarray:
    """The window without its detail: what a worn-off, filled or wet surface looks like."""
    reach = int(max(min(window.shape[:2]) / 4, 2.0))
    return ndimage.uniform_filter(window, (reach, reach, 1))


def paint_defect(
    image: np.ndarray, family: str, rng: Rng, *, where: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Paints one defect of random place, size (0.1 % to 8 % of the image) and contrast (subtle to plain).

    The same image, family and state of ``rng`` give the same pixels.

    Args:
        image: a photograph (H, W, 3) uint8, both sides at least 64 px; it is not changed.
        family: a name out of ``FAMILIES``.
        rng: all that is random comes from it.
        where: (H, W) bool, the pixels that may be the middle of the defect, e.g. the part; default is everywhere.

    Returns:
        The image with the defect (H, W, 3) uint8, and its mask (H, W) bool with at least one pixel. Farther than
        ``GRACE`` px from the mask the image is what it was.

    Raises:
        InputError: an image of another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < MIN_SIDE:
        expected = f"(H, W, 3) uint8 with both sides at least {MIN_SIDE} px"
        raise InputError(f"image: expected {expected}, got {image.shape} {image.dtype}")
    while True:  # a shape that happens to fall out of the image or on pixels of its own colour is drawn anew
        defect = Defect(image, where, rng)
        painted, mask = _compose(defect, *getattr(defect, family)())
        if mask.sum() >= _SMALLEST and _contrast(image, painted, mask) >= _MEAN_CHANGE / 2:
            return painted, mask


def _contrast(image: np.ndarray, painted: np.ndarray, mask: np.ndarray) -> float:
    """Mean change of the mask's pixels, in grey levels."""
    return float(np.abs(painted[mask].astype(np.int16) - image[mask]).max(-1).mean())


def _compose(defect: Defect, alpha: Field, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before, inside = defect.image[defect.place].astype(np.float32), alpha > _ALPHA_IN_MASK
    after = np.clip(before + (content - before) * alpha[..., None], 0, 255)
    change = after - before
    if inside.any() and float(np.abs(change).max(-1)[inside].mean()) < _MEAN_CHANGE:
        # It would hardly be seen, as a smear on a white wall: an even shade makes it plain, whichever way it went.
        sign = -1.0 if float(before[inside].mean()) > 100 else 1.0
        shade = np.float32(2 * _MEAN_CHANGE * sign - float(change[inside].mean()))
        after = np.clip(after + shade * alpha[..., None], 0, 255)
    after = after.astype(np.uint8)
    # A mask has no holes where the new pixels happen to equal the old ones, so the change is judged over 5 px.
    inside &= ndimage.uniform_filter(np.abs(after - before).max(-1), 5) >= _LEAST_CHANGE
    near = ndimage.maximum_filter(inside, 2 * GRACE - 1)
    painted, mask = defect.image.copy(), np.zeros(defect.size, bool)
    painted[defect.place][near], mask[defect.place] = after[near], inside
    return painted, mask
