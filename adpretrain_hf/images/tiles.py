"""Tiles: a large image as windows that overlap, each of which the network sees at the image's own resolution."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

import numpy as np

from adpretrain_hf.errors import ImageError, InputError, whole_number

TILE_REFERENCES = ("window", "all")


@dataclass(frozen=True)
class Windows:
    """Where the windows of one image lie, in its pixels; all have the same size.

    Attributes:
        tops, lefts: where the rows and the columns of windows begin.
        height, width: of every window.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and of columns."""
        return len(self.tops), len(self.lefts)

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Top, left, height and width of every window, row by row."""
        return [(top, left, self.height, self.width) for top, left in product(self.tops, self.lefts)]

    def check_grid(self, name: str, grid: tuple[int, ...]) -> None:
        """Raises ImageError where an image cannot be compared window by window with references of such a grid."""
        if self.grid != grid:
            (rows, columns), (expected_rows, expected_columns) = self.grid, grid
            raise ImageError(
                f"{name} has {rows} x {columns} windows, the references {expected_rows} x {expected_columns}: expected "
                "images of the references' size, a fixed number of tiles (rows and columns), or tile_reference='all'"
            )


@dataclass(frozen=True)
class Tiles:
    """How images are cut into windows: into so many rows and columns, or into squares of a size.

    The windows of an image are equally large and lie equally far apart, so that the last ones end where it ends.

    Args:
        rows, columns: of windows, whatever the size of the image.
        tile_size: side of a window in pixels of the image, instead; no longer than the image is.
        overlap: at least this share of a window's side is also in the next one, from 0 to 0.5.

    Raises:
        InputError: neither or both of a grid and a size, or a number out of its range.
    """

    rows: int | None = None
    columns: int | None = None
    tile_size: int | None = None
    overlap: float = 0.125

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if name != "overlap" and value is not None}
        is_counted = all(whole_number(value) >= 1 for value in given.values())
        if not is_counted or sorted(given) not in (["columns", "rows"], ["tile_size"]):
            raise InputError(f"got {self}, expected rows and columns, or tile_size alone, as integers >= 1")
        for name, value in given.items():
            object.__setattr__(self, name, whole_number(value))
        overlap: Any = self.overlap
        if not isinstance(overlap, (int, float, np.floating)) or not 0 <= overlap <= 0.5:
            raise InputError(f"the overlap of tiles is {overlap!r}, expected a share of their side from 0 to 0.5")
        object.__setattr__(self, "overlap", float(overlap))

    @classmethod
    def of(cls, tiles: Any) -> "Tiles | None":
        """What a caller gives as tiles: none, (rows, columns), what ``to_dict`` returned, or Tiles.

        Raises:
            InputError: anything else.
        """
        if tiles is None or isinstance(tiles, cls):
            return tiles
        if isinstance(tiles, Mapping) and tiles.keys() <= {field.name for field in fields(cls)}:
            return cls(**tiles)
        if isinstance(tiles, (tuple, list)) and len(tiles) == 2:
            return cls(*tiles)
        raise InputError(f"got {tiles!r} as tiles, expected (rows, columns), Tiles(tile_size=...) or None")

    def to_dict(self) -> dict[str, Any]:
        """The values that are given, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def windows(self, height: int, width: int) -> Windows:
        """The windows of an image of so many pixels; they cover it."""
        (tops, window_height), (lefts, window_width) = self._axis(height, self.rows), self._axis(width, self.columns)
        return Windows(tops, lefts, window_height, window_width)

    def _axis(self, extent: int, number: int | None) -> tuple[tuple[int, ...], int]:
        """Where windows begin along one axis, and how long they are."""
        if number is None:
            length = min(self.tile_size or extent, extent)
            step = max(1, int(length * (1 - self.overlap)))
            number = 1 - (length - extent) // step
        else:
            length = -int(-extent // (number - (number - 1) * self.overlap))
        return tuple(place * (extent - length) // max(1, number - 1) for place in range(number)), length
