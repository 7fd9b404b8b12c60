"""Pictures of maps: the colours' range, heat maps, overlays and contact sheets."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from adpretrain_hf.errors import InputError
from adpretrain_hf.overlays import ColourRange, SheetEntry, colour_range, contact_sheet, heat_map, overlay
from tests.benchmarks.peak_memory import peak_memory
from tests.conftest import random_image

QUICK = settings(max_examples=60, deadline=None, database=None)
UNIT = ColourRange(0.0, 1.0)
DARKEST, BRIGHTEST = (0, 0, 4), (252, 255, 164)

maps = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 50, width=32)
)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> object:
    """A division by zero is a warning in numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours_in(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def lightness(image: Image.Image) -> np.ndarray:
    """Luma, without the rounding of mode L."""
    return np.asarray(image, dtype=np.float64) @ (0.299, 0.587, 0.114)


# The range


def test_the_range_goes_from_the_typical_patch_to_the_most_anomalous() -> None:
    normal, defective = np.full((50, 50), 2.0), np.full((50, 50), 3.0)
    defective[10:20, 10:20] = 9.0
    assert colour_range([normal, defective]) == ColourRange(2.5, 9.0)


def test_a_run_of_normal_images_stays_dark() -> None:
    noise = [2 + 0.05 * np.random.default_rng(seed).random((50, 50)) for seed in range(3)]
    colours = colour_range(noise)
    assert colours.high == pytest.approx(1.5 * colours.low)
    assert max(lightness(heat_map(anomaly, colours)).max() for anomaly in noise) < 20


def test_a_single_bright_pixel_does_not_set_the_range() -> None:
    anomaly = np.full((100, 100), 2.0)
    anomaly[0, 0] = 1000
    assert colour_range([anomaly]).high == pytest.approx(3.0)


@QUICK
@given(st.lists(maps, min_size=1, max_size=4))
def test_the_range_is_never_empty_and_knows_no_order(anomalies: list[np.ndarray]) -> None:
    colours = colour_range(anomalies)
    assert np.isfinite([colours.low, colours.high]).all()
    assert colours.high > colours.low and colours.high >= 1.5 * colours.low
    assert colour_range(reversed(anomalies)) == colours
    for anomaly in anomalies:
        assert np.quantile(anomaly, 0.999) <= colours.high * (1 + 1e-5)  # float32 here, float64 there
        heat_map(anomaly, colours)


@pytest.mark.parametrize("value", [0.0, 1e-12, 1.0, 1e6])
def test_constant_maps_do_not_divide_by_zero(value: float) -> None:
    anomaly = np.full((8, 6), value, np.float32)
    colours = colour_range([anomaly, anomaly])
    assert set(colours_in(heat_map(anomaly, colours))) == {DARKEST}
    image = random_image(0, 6, 8)
    np.testing.assert_array_equal(np.asarray(overlay(image, anomaly, colours)), np.asarray(image))


# Heat maps


@QUICK
@given(maps)
def test_a_heat_map_has_the_maps_shape(anomaly: np.ndarray) -> None:
    picture = heat_map(anomaly, ColourRange(1.0, 20.0))
    assert picture.mode == "RGB" and picture.size == anomaly.shape[::-1]


def test_lightness_rises_with_the_score() -> None:
    ramp = np.linspace(0, 1, 512, dtype=np.float32)[None]
    light = lightness(heat_map(ramp, UNIT))[0]
    assert (np.diff(light) >= -1).all()  # colours are rounded to 8 bits
    assert (np.diff(light[::16]) > 0).all()
    assert light[0] < 5 and light[-1] > 235


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (math.nan, 1), (0, math.nan), (0, math.inf)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="the colours' range is .*, expected finite numbers, LOW < HIGH"):
        ColourRange(low, high)


def test_the_ends_of_the_range() -> None:
    anomaly = np.array([[-5.0, 1.0, 3.0, 99.0]])
    picture = heat_map(anomaly, ColourRange(1.0, 3.0))
    assert colours_in(picture) == [DARKEST, DARKEST, BRIGHTEST, BRIGHTEST]


def test_the_same_value_has_the_same_colour_in_every_image() -> None:
    first = heat_map(np.array([[0.3, 0.0]]), UNIT)
    second = heat_map(np.array([[1.0, 0.3]]), UNIT)
    assert first.getpixel((0, 0)) == second.getpixel((1, 0))


# Overlays


@QUICK
@given(hnp.arrays(np.float32, (9, 7), elements=st.floats(-1, 2, width=32)))
def test_an_overlay_leaves_normal_pixels_as_they_are(anomaly: np.ndarray) -> None:
    image = random_image(0, 7, 9)
    result = overlay(image, anomaly, UNIT)
    assert result.mode == "RGB" and result.size == image.size
    normal = anomaly <= 0
    np.testing.assert_array_equal(np.asarray(result)[normal], np.asarray(image)[normal])


def test_an_overlay_marks_what_is_anomalous() -> None:
    image = Image.new("RGB", (4, 3), (0, 0, 200))
    anomaly = np.zeros((3, 4), np.float32)
    anomaly[1, 2] = 7
    result = overlay(image, anomaly, UNIT)
    marked = 0.25 * np.array((0, 0, 200)) + 0.75 * np.array(BRIGHTEST)
    np.testing.assert_allclose(result.getpixel((2, 1)), marked, atol=0.5)
    assert sum(pixel != (0, 0, 200) for pixel in colours_in(result)) == 1


def test_what_the_network_did_not_see_is_hatched() -> None:
    image = Image.new("RGB", (80, 40), (10, 20, 30))
    drawn = np.asarray(overlay(image, np.zeros((40, 80)), UNIT, (0, 20, 40, 40)))
    assert (drawn[:, 20:60] == (10, 20, 30)).all()
    hatched = (drawn == 128).all(axis=2)
    assert 0.2 < hatched[:, :20].mean() < 0.35 and 0.2 < hatched[:, 60:].mean() < 0.35


def test_an_overlay_of_12_megapixels_takes_no_gigabytes() -> None:
    image, anomaly = Image.new("RGB", (4000, 3000), "#646464"), np.zeros((3000, 4000), dtype=np.float32)
    anomaly[2000:, 3000:] = 1
    with peak_memory() as peak:
        drawn = overlay(image, anomaly, UNIT, (0, 500, 3000, 3000))
    if math.isnan(peak.megabytes):
        pytest.skip("this system does not tell the peak of memory")
    assert peak.megabytes < 250  # three of the picture's 36 or 48, and some
    assert drawn.getpixel((1000, 1000)) == (100,) * 3 != drawn.getpixel((3300, 2500))


def test_an_overlay_does_not_change_its_image() -> None:
    image = random_image(0, 7, 9)
    before = image.copy()
    overlay(image, np.ones((9, 7)), UNIT)
    assert image.tobytes() == before.tobytes()


# Contact sheets


def entry(width: int = 100, height: int = 60, colour: str = "red", value: float = 0.0) -> SheetEntry:
    return SheetEntry(
        Image.new("RGB", (width, height), colour), np.full((height, width), value), "brick: good", "score 0.1", UNIT
    )


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def bounds(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_one_entry_shows_image_heat_map_and_overlay() -> None:
    sheet = contact_sheet([entry(100, 60)])
    assert sheet.mode == "RGB"
    assert count(sheet, (255, 0, 0)) == 2 * 100 * 60  # the image, and the overlay of a normal map
    assert count(sheet, DARKEST) == 100 * 60
    image_left, top, overlay_right, bottom = bounds(sheet, (255, 0, 0))
    heat_left, heat_top, heat_right, heat_bottom = bounds(sheet, DARKEST)
    assert (top, bottom) == (heat_top, heat_bottom) and bottom - top == 60
    assert image_left < heat_left < heat_right < overlay_right
    assert count(sheet, (255, 255, 255)) > 0 and bottom <= sheet.height


def test_the_anomaly_is_drawn_twice() -> None:
    sheet = contact_sheet([entry(50, 50, value=1.0)])
    assert count(sheet, BRIGHTEST) == 50 * 50
    assert count(sheet, (255, 0, 0)) == 50 * 50


def test_the_caption_is_above_the_pictures() -> None:
    _, top, _, _ = bounds(contact_sheet([entry()]), (255, 0, 0))
    caption = np.asarray(contact_sheet([entry()]))[:top]
    assert (caption < 100).any(axis=-1).sum() > 50
    blank = SheetEntry(Image.new("RGB", (9, 9)), np.zeros((9, 9)), "", "", UNIT)
    assert (np.asarray(contact_sheet([blank]))[:top] == 255).all()


@pytest.mark.parametrize("number", range(1, 8))
def test_sheet_sizes(number: int) -> None:
    one, two, three, four = (contact_sheet([entry()] * n).size for n in (1, 2, 3, 4))
    column, row = two[0] - one[0], four[1] - one[1]
    assert column > 0 and row > 0 and three[0] == one[0] + 2 * column
    columns, rows = min(number, 3), (number + 2) // 3
    sheet = contact_sheet([entry()] * number)
    assert sheet.size == (one[0] + (columns - 1) * column, one[1] + (rows - 1) * row)
    assert count(sheet, (255, 0, 0)) == number * 2 * 100 * 60


@pytest.mark.parametrize(("width", "height"), [(1, 1), (128, 128), (129, 40), (1000, 400), (300, 900), (2000, 100)])
def test_images_of_any_size_fit_into_their_tile(width: int, height: int) -> None:
    sheet = contact_sheet([entry(width, height), entry(20, 20, "blue")])
    assert sheet.size == contact_sheet([entry(), entry()]).size
    scale = min(1, 128 / max(width, height))
    shown = count(sheet, DARKEST) - 20 * 20
    assert shown == pytest.approx(width * height * scale**2, rel=0.1)  # whole pixels
    left, top, right, bottom = bounds(sheet, DARKEST)
    assert left > 0 and top > 0 and right < sheet.width and bottom < sheet.height
    assert count(sheet, (0, 0, 255)) == 2 * 20 * 20  # nothing was drawn over the neighbour


@pytest.mark.parametrize("side", [50, 300])
def test_drawing_leaves_the_entries_as_they_are(side: int) -> None:
    entries = [entry(side, side)]
    first = contact_sheet(entries)
    assert entries[0].image.size == (side, side)
    assert contact_sheet(entries).tobytes() == first.tobytes()
