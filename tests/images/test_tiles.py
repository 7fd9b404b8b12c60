"""Tiles: where windows lie, how their maps become one, and large images through banks, streams and the command line."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank, Tiles
from adpretrain_hf.cli import main
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import PreparedBatches, Windows, list_images
from adpretrain_hf.reference import residuals_per_image
from adpretrain_hf.scoring import blend_windows, place_map
from tests.benchmarks.peak_memory import peak_memory
from tests.conftest import BUNDLE, PHOTOS, make_extractor, random_image

QUICK = settings(max_examples=40, deadline=None, database=None)
OVERLAPS = st.floats(0, 0.5)
LARGE = (96, 64)  # width and height


def large_images(*seeds: int) -> list[Image.Image]:
    return [random_image(seed, *LARGE) for seed in seeds]


# Windows


def seen(windows: Windows, height: int, width: int) -> Tensor:
    """How many windows see each pixel."""
    count = torch.zeros(height, width)
    for top, left, rows, columns in windows.boxes:
        assert top >= 0 and left >= 0 and top + rows <= height and left + columns <= width
        count[top : top + rows, left : left + columns] += 1
    return count


@QUICK
@given(height=st.integers(8, 300), width=st.integers(8, 300), size=st.integers(8, 120), overlap=OVERLAPS)
def test_windows_of_a_size_cover_every_pixel_and_overlap(height: int, width: int, size: int, overlap: float) -> None:
    windows = Tiles(tile_size=size, overlap=overlap).windows(height, width)
    assert (windows.height, windows.width) == (min(size, height), min(size, width))
    assert seen(windows, height, width).min() >= 1
    for starts, length in ((windows.tops, windows.height), (windows.lefts, windows.width)):
        steps = np.diff(starts)
        assert (steps <= max(1, int(length * (1 - overlap)))).all() and (len(steps) == 0 or np.ptp(steps) <= 1)


@QUICK
@given(
    height=st.integers(40, 300),
    width=st.integers(40, 300),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    overlap=OVERLAPS,
)
def test_windows_of_a_grid_cover_every_pixel(height: int, width: int, rows: int, columns: int, overlap: float) -> None:
    windows = Tiles(rows, columns, overlap=overlap).windows(height, width)
    assert windows.grid == (rows, columns) and len(windows) == len(windows.boxes) == rows * columns
    assert seen(windows, height, width).min() >= 1


@pytest.mark.parametrize("number", [(), (2,), (0, 2), (2, 2, 50), (None, None, 0), (2.5, 1), (True, 1), ("2", 2)])
def test_tiles_that_there_cannot_be_are_refused(number: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=r"got Tiles\(.*expected rows and columns, or tile_size alone, as integers"):
        Tiles(*number)
    for overlap in (0.6, -0.1, "0.2"):
        with pytest.raises(InputError, match=r"the overlap of tiles is .*, expected a share of their side from 0 to"):
            Tiles(2, 3, overlap=overlap)  # type: ignore[arg-type]
    for tiles in (500, {"rows": 2, "cols": 2}):
        with pytest.raises(InputError, match=r"got .* as tiles, expected \(rows, columns\), Tiles\(tile_size=...\) or"):
            Tiles.of(tiles)


def test_numpys_numbers_are_numbers_of_tiles() -> None:
    tiles = Tiles(tile_size=np.int64(64), overlap=np.float32(0.25))
    assert tiles == Tiles(tile_size=64, overlap=0.25)
    assert json.loads(json.dumps(tiles.to_dict())) == {"tile_size": 64, "overlap": 0.25}


# One map


def cut(field: Tensor, windows: Windows) -> Tensor:
    return torch.stack([field[top : top + h, left : left + w] for top, left, h, w in windows.boxes])


@QUICK
@given(height=st.integers(8, 90), width=st.integers(8, 90), size=st.integers(4, 40), overlap=OVERLAPS)
def test_blending_gives_back_what_was_cut(height: int, width: int, size: int, overlap: float) -> None:
    windows, field = Tiles(tile_size=size, overlap=overlap).windows(height, width), torch.randn(height, width)
    torch.testing.assert_close(blend_windows(cut(field, windows), windows), field, rtol=1e-5, atol=1e-5)


@QUICK
@given(
    height=st.integers(20, 200),
    width=st.integers(20, 200),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    side=st.integers(1, 40),
    overlap=OVERLAPS,
)
def test_a_constant_stays_constant_at_any_resolution(
    height: int, width: int, grid: tuple[int, int], side: int, overlap: float
) -> None:
    windows = Tiles(*grid, overlap=overlap).windows(height, width)
    blended = blend_windows(torch.full((len(windows), side, side + 1), 3.0), windows)
    torch.testing.assert_close(blended, torch.full_like(blended, 3.0))


def test_one_window_fades_into_the_next() -> None:
    windows = Windows((0,), (0, 6), 1, 10)
    blended = blend_windows(torch.tensor([[[0.0] * 10], [[1.0] * 10]]), windows)
    torch.testing.assert_close(blended[0], torch.tensor([0.0] * 6 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 6))


# Scores, features and banks


@pytest.fixture
def whole(tiny_folder: Path) -> ADPretrainFeatureExtractor:
    """A tiny extractor that cuts nothing off."""
    return make_extractor(tiny_folder, resize_mode="resize")


@pytest.mark.parametrize("tile_reference", ["window", "all"])
def test_one_window_is_the_whole_image_to_the_bit(whole: ADPretrainFeatureExtractor, tile_reference: str) -> None:
    images = large_images(2, 3)
    expected = whole.set_reference(large_images(0, 1)).score(images)
    tiles = Tiles(1, 1, overlap=0)
    whole.set_reference(large_images(0, 1), tiles=tiles, tile_reference=tile_reference)
    got = whole.score(images)
    assert torch.equal(got.maps, expected.maps) and torch.equal(got.scores, expected.scores)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_windows_are_scored_as_images_of_their_own(extractor: ADPretrainFeatureExtractor, batch_size: int) -> None:
    """Against the windows at their place; of the size that the network takes, so that nothing is resampled."""
    tiles, (*references, one, two) = Tiles(tile_size=32), [random_image(seed, 56, 48) for seed in range(4)]
    windows, images = tiles.windows(48, 56), [one, two]
    extractor.set_reference(references, tiles=tiles, batch_size=batch_size)
    results = list(extractor.score_stream(images, batch_size=batch_size, progress=False))
    features = list(extractor.stream(images, batch_size=batch_size, progress=False))
    assert [result.image.name for result in results] == ["image 0", "image 1"]
    for image, result, (named, levels) in zip(images, results, features, strict=True):
        alone, maps = [], []
        for top, left, height, width in windows.boxes:
            part = (left, top, left + width, top + height)
            extractor.set_reference([reference.crop(part) for reference in references])
            maps.append(extractor.score(image.crop(part)).maps[0])
            alone.append(extractor(image.crop(part)))
        torch.testing.assert_close(result.anomaly, blend_windows(torch.stack(maps), windows), rtol=1e-4, atol=1e-5)
        assert result.score == result.anomaly.max() and result.full_size_map().shape == (48, 56)
        assert named.windows is not None and named.windows.boxes == windows.boxes and named.box == (0, 0, 48, 56)
        for layer, level in levels.items():
            expected = torch.cat([one[layer] for one in alone])
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
            assert level.shape == (len(windows), 32, 4, 4)


def test_all_windows_are_found_where_those_of_the_place_are_not_alike(extractor: ADPretrainFeatureExtractor) -> None:
    """An image of a reference's windows in other places is normal to all of them alone."""
    reference = random_image(0, 64, 32)
    turned = Image.fromarray(np.roll(np.asarray(reference), 32, axis=1))
    tiles = Tiles(1, 2, overlap=0)
    encoded = [extractor.encode(extractor.preprocess(turned.crop((left, 0, left + 32, 32)))) for left in (0, 32)]
    features = [torch.cat(level) for level in zip(*encoded, strict=True)]
    everywhere = extractor.make_reference(reference, tiles=tiles, tile_reference="all")
    in_place = extractor.make_reference(reference, tiles=tiles)
    assert (everywhere.tile_reference, in_place.tile_reference) == ("all", "window")
    for level, other in zip(everywhere.residuals(features), in_place.residuals(features, windows=[0, 1]), strict=True):
        torch.testing.assert_close(level, torch.zeros_like(level), atol=1e-5, rtol=0)
        assert other.abs().mean() > 1e-2
    for level in residuals_per_image(features, [in_place, everywhere], windows=[1, 0]):
        torch.testing.assert_close(level, torch.zeros_like(level), atol=1e-5, rtol=0)


def test_references_of_windows_are_found_block_by_block(
    extractor: ADPretrainFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor.set_reference(large_images(0, 1, 2), tiles=(2, 3))
    expected = extractor.score(large_images(0, 5)).maps
    monkeypatch.setattr("adpretrain_hf.matching._WINDOW_REFERENCES", 7 * 12)
    torch.testing.assert_close(extractor.score(large_images(0, 5)).maps, expected)


@pytest.mark.parametrize("tile_reference", ["window", "all"])
def test_an_image_that_is_a_reference_is_compared_with_the_others(
    extractor: ADPretrainFeatureExtractor, tile_reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = large_images(0, 1, 2)
    bank = extractor.make_reference(images, tiles=(2, 3), tile_reference=tile_reference)
    with caplog.at_level(logging.WARNING):
        own = extractor.set_reference(bank).score(images[1])
    assert "image 0 is a reference itself" in caplog.text or "the image is a reference itself" in caplog.text
    assert "cut off" not in caplog.text
    others = extractor.set_reference(bank.without_image(1)).score(images[1])
    again = extractor.set_reference([images[0], images[2]], tiles=(2, 3), tile_reference=tile_reference)
    for expected in (others, again.score(images[1])):
        torch.testing.assert_close(own.maps, expected.maps, rtol=1e-4, atol=1e-5)


def test_a_bank_keeps_its_tiles(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    tiles = Tiles(tile_size=40, overlap=0.25)
    bank = extractor.make_reference(large_images(0, 1), tiles=tiles)
    bank.save(tmp_path / "bank.safetensors")
    again = ReferenceBank.load(tmp_path / "bank.safetensors")
    assert (again.tiles, again.tile_reference, again.grid) == (tiles, "window", tiles.windows(64, 96).grid)
    assert again.images == bank.images and len(again.images) == again.num_images == 2
    image = large_images(7)
    expected = extractor.set_reference(bank).score(image).maps
    assert torch.equal(extractor.set_reference(tmp_path / "bank.safetensors").score(image).maps, expected)
    assert "tile_size=40" in repr(again) and "tile_reference='window'" in repr(again)


def test_a_bank_of_before_has_no_tiles(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    """The file of a bank without tiles is what it was, and one of an earlier version is read."""
    extractor.make_reference(large_images(0, 1)).save(tmp_path / "bank.safetensors")
    about = (tmp_path / "bank.safetensors").read_bytes()[:2000]
    assert b"tile" not in about and b"grid" not in about
    bank = ReferenceBank.load(tmp_path / "bank.safetensors")
    assert (bank.tiles, bank.grid) == (None, ())


def test_a_core_set_keeps_as_many_patches_of_every_window(extractor: ADPretrainFeatureExtractor) -> None:
    bank = extractor.make_reference(large_images(0, 1, 2), tiles=(2, 3))
    small = bank.compact(0.25)
    assert len(bank) == 4 * len(small) and small.grid == (2, 3) and small.tiles == bank.tiles
    for level, every in zip(small.patches, bank.patches, strict=True):
        for rows, all_rows in zip(level.chunk(6), every.chunk(6), strict=True):
            assert (torch.cdist(rows, all_rows).amin(dim=1) < 1e-3).all()
    assert extractor.set_reference(small).score(large_images(5)).scores.isfinite().all()


def test_a_line_scan_needs_tiles(extractor: ADPretrainFeatureExtractor) -> None:
    lines = random_image(0, 900, 40)
    with pytest.raises(ImageError, match="900 x 40 pixels, longer than 20 : 1: look at it in tiles"):
        extractor.set_reference(lines)
    extractor.set_reference([lines], tiles=Tiles(tile_size=64))
    assert extractor.score(random_image(1, 900, 40)).maps.shape == (1, 40, 900)


@pytest.mark.parametrize("tile_reference", ["window", "all"])
def test_banks_of_windows_are_added_window_by_window(
    extractor: ADPretrainFeatureExtractor, tile_reference: str
) -> None:
    options = {"tiles": (2, 3), "tile_reference": tile_reference}
    few, more, all_at_once = (
        extractor.make_reference(large_images(*seeds), **options) for seeds in ((0, 1), (2,), (0, 1, 2))
    )
    for level, expected in zip((few + more).patches, all_at_once.patches, strict=True):
        torch.testing.assert_close(level, expected)
    whole = (few + more).remove(2)
    for level, expected in zip(whole.patches, few.patches, strict=True):
        assert torch.equal(level, expected)


def test_images_are_added_as_the_bank_was_made(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    mask = np.ones(LARGE[::-1], dtype=bool)
    mask[:20] = False
    options = {"tiles": (2, 2), "augment_references": "flips", "image_score": "top", "top": 0.1, "region": mask}
    expected = extractor.make_reference(large_images(0, 1, 2), category="nut", **options)
    extractor.set_reference(large_images(0), category="nut", **options)
    bank = extractor.add_reference(large_images(1)).add_reference(large_images(2)).reference
    assert bank is not None and (bank.tiles, bank.grid) == (expected.tiles, expected.grid)
    assert (bank.augmentation, bank.judgement) == ("flips", expected.judgement)
    for level, patches in zip(bank.patches, expected.patches, strict=True):
        torch.testing.assert_close(level, patches)
    assert "augmentation='flips'" in repr(bank)
    with pytest.raises(InputError, match="cannot be added, got other values of .*augmentation"):
        extractor.add_reference(large_images(3), augment_references="none")


def test_a_product_in_tiles_and_one_without_share_a_batch(extractor: ADPretrainFeatureExtractor) -> None:
    small = [random_image(seed, 32, 32) for seed in (5, 6)]
    banks = {
        "large": extractor.make_reference(large_images(0, 1), category="large", tiles=(2, 3)),
        "small": extractor.make_reference(small, category="small"),
    }
    for order in (1, -1):
        images = [*zip([*large_images(0), *small[:1]], ["large", "small"], strict=True)][::order]
        given, categories = zip(*images, strict=True)
        run = {"references": banks, "categories": categories}
        one_by_one = extractor.score(list(given), batch_size=1, **run).scores
        torch.testing.assert_close(extractor.score(list(given), batch_size=16, **run).scores, one_by_one)


# Errors


def test_images_of_another_grid_are_refused_by_name(extractor: ADPretrainFeatureExtractor) -> None:
    sizes = {"tiles": Tiles(tile_size=32)}
    with pytest.raises(ImageError, match="image 1 has 3 x 3 windows, the references 3 x 4: expected images of"):
        extractor.make_reference([random_image(0, *LARGE), random_image(1, 64, 64)], **sizes)
    extractor.set_reference(large_images(0), **sizes)
    failed: list[str] = []
    images = [("large", large_images(1)[0]), ("small", random_image(1, 64, 64)), ("last", large_images(2)[0])]
    results = extractor.score_stream(images, progress=False, on_error=lambda name, error: failed.append(str(error)))
    assert [result.image.name for result in results] == ["large", "last"]
    assert len(failed) == 1 and failed[0].startswith("small has 3 x 3 windows, the references 3 x 4")
    extractor.set_reference(large_images(0), tile_reference="all", **sizes)
    assert len(extractor.score(images).maps) == 3


def test_windows_that_the_network_cannot_take_are_refused(extractor: ADPretrainFeatureExtractor) -> None:
    with pytest.raises(ImageError, match="0 is 7 x 5 pixels, smaller than one patch of 8: take fewer or larger tiles"):
        extractor.make_reference(large_images(0), tiles=Tiles(14, 15, overlap=0))
    with pytest.raises(ImageError, match="900 x 40 pixels, longer than 20 : 1: take more tiles along its longer"):
        extractor.make_reference(random_image(0, 900, 40), tiles=(1, 1))
    with pytest.raises(InputError, match="images that are prepared cannot be cut into tiles: give them unprepared"):
        extractor.make_reference(extractor.preprocess(large_images(0)), tiles=(2, 3))


def test_what_tiles_a_bank_has_is_not_chosen_again(extractor: ADPretrainFeatureExtractor) -> None:
    bank = extractor.make_reference(large_images(0), tiles=(2, 3))
    extractor.set_reference(bank, tiles=(2, 3), tile_reference="window")
    for other in ({"tiles": (2, 2)}, {"tile_reference": "all"}):
        with pytest.raises(InputError, match=r"tile.*: a bank is as it was made \(.*Tiles\(rows=2.*: leave it out"):
            extractor.set_reference(bank, **other)
    everywhere = extractor.make_reference(large_images(0), tiles=(2, 3), tile_reference="all")
    more = extractor.extend_reference(everywhere, large_images(1), tiles=(2, 3), tile_reference=None)
    assert (more.num_images, more.tile_reference) == (2, "all")
    with pytest.raises(InputError, match="tile_reference is 'some', expected one of"):
        extractor.make_reference(large_images(0), tiles=(2, 3), tile_reference="some")
    with pytest.raises(InputError, match="tile_reference is 'all' without tiles: expected both, or neither"):
        extractor.make_reference(large_images(0), tile_reference="all")


def test_prepared_images_are_no_windows(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    extractor.set_reference(large_images(0), tiles=(2, 3))
    with pytest.raises(InputError, match="0 of 1 images are said to be windows, and the bank .* each of 2 x 3 windows"):
        extractor(extractor.preprocess(large_images(1)))
    bank = extractor.make_reference(large_images(0), tiles=(2, 3), tile_reference="all")
    bank.save(tmp_path / "bank.safetensors")
    for references in (None, bank, [bank], tmp_path / "bank.safetensors"):
        with pytest.raises(InputError, match="the reference has tiles, and this method takes whole images.*call score"):
            extractor(large_images(1), references)
    with pytest.raises(InputError, match="got 32 reference patches, expected as many for each of"):
        ReferenceBank([torch.randn(32, 4)], grid=(3, 3))


# The command line


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for folder, seeds in (("normal", (0, 1)), ("images", (2, 3, 4))):
        (tmp_path / folder).mkdir()
        for image, seed in zip(large_images(*seeds), seeds, strict=True):
            image.save(tmp_path / folder / f"{seed}.png")
    return tmp_path / "normal", tmp_path / "images"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_commands_follow_the_tiles(
    extractor: ADPretrainFeatureExtractor,
    bundle: Path,
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    normal, images = folders
    bank, options = (
        tmp_path / "bank.safetensors",
        ("--tile-size", 48, "--tile-overlap", 0.25, "--tile-reference", "all"),
    )
    assert run("reference", bundle, normal, "--output", bank, *options) == 0
    tiles = Tiles(tile_size=48, overlap=0.25)
    assert (ReferenceBank.load(bank).tiles, ReferenceBank.load(bank).tile_reference) == (tiles, "all")
    expected = list(extractor.set_reference(bank).score_stream(list_images(images), progress=False))

    assert run("score", bundle, images, "--reference", bank, "--output", tmp_path / "scores") == 0
    assert run("score", bundle, images, "--reference", normal, "--output", tmp_path / "again", *options) == 0
    for output in ("scores", "again"):
        settings = json.loads((tmp_path / output / "run.json").read_text())
        assert settings["tiles"] == {"": {"tile_size": 48, "overlap": 0.25, "tile_reference": "all"}}
        for image in expected:
            name = Path(image.image.name).name
            with np.load(tmp_path / output / "maps" / f"{name}.npz") as result:
                np.testing.assert_allclose(result["map"], image.anomaly.numpy(), rtol=1e-4, atol=1e-5)
                size = tuple(result["size"].tolist())
                assert place_map(torch.from_numpy(result["map"]), size, tuple(result["box"].tolist())).shape == (64, 96)
            assert Image.open(tmp_path / output / "overlays" / f"{name}.png").size == LARGE

    assert run("extract", bundle, images, "--reference", bank, "--output", tmp_path / "features") == 0
    levels = load_file(tmp_path / "features" / "2.png.safetensors")
    assert levels["boxes"].tolist() == [list(box) for box in tiles.windows(64, 96).boxes]
    assert levels["layer1"].shape == (len(levels["boxes"]), 32, 4, 4)

    assert run("extract", bundle, images, "--reference", bank, "--output", tmp_path / "npz", "--format", "npz") == 0
    with np.load(tmp_path / "npz" / "2.png.npz") as arrays:
        assert arrays["boxes"].tolist() == levels["boxes"].tolist() and arrays["boxes"].dtype == np.int64

    capsys.readouterr()
    added = ("reference", bundle, images, "--add-to", bank, "--output", tmp_path / "more.safetensors")
    assert run(*added) == 0
    more = ReferenceBank.load(tmp_path / "more.safetensors")
    assert (more.tiles, more.tile_reference, more.num_images) == (tiles, "all", 5)
    assert run(*added, "--tiles", "2x3") == 1
    assert "reference banks that differ cannot be added, got other values of tiles" in capsys.readouterr().err

    assert run("score", bundle, images, "--reference", bank, "--output", tmp_path / "other", "--tiles", "2x3") == 1
    assert "tiles=Tiles(rows=None, columns=None, tile_size=48" in capsys.readouterr().err
    assert run("score", bundle, images, "--reference", normal, "--output", tmp_path / "again", "--tiles", "2x3") == 1
    assert "holds results of other settings" in capsys.readouterr().err
    assert run("score", bundle, images, "--reference", normal, "--output", tmp_path / "x", "--tile-overlap", "0.1") == 1
    assert "expected --tiles or --tile-size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("reference", bundle, normal, "--output", bank, "--tiles", "2by3")
    assert "got '2by3', expected rows and columns, e.g. 2x3" in capsys.readouterr().err
    assert run("info", bank, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == {"tile_size": 48, "overlap": 0.25}


def test_actors_of_ray_follow_the_tiles(
    extractor: ADPretrainFeatureExtractor, bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from adpretrain_hf.integrations.ray import ADPretrainFeatures

    extractor.make_reference(folders[0], tiles=(2, 3)).save(tmp_path / "bank.safetensors")
    paths = [str(path) for path in list_images(folders[1])]
    expected = extractor.set_reference(tmp_path / "bank.safetensors").score(paths).scores.tolist()
    features = ADPretrainFeatures(bundle, tmp_path / "bank.safetensors", column="path", device="cpu", batch_size=4)
    done = features({"path": np.array([paths[0], "no/such.png", *paths[1:]])})
    assert done["score"][[0, 2, 3]].tolist() == pytest.approx(expected, abs=1e-5)
    assert np.isnan(done["score"][1]) and [level.shape for level in done["layer1"]][:2] == [
        (6, 32, 4, 4),
        (1, 32, 4, 4),
    ]
    assert done["boxes"][0].tolist() == [list(box) for box in Tiles(2, 3).windows(64, 96).boxes]
    assert done["boxes"][1].tolist() == [[-1, -1, -1, -1]]


# Large images


def test_of_large_images_a_few_windows_features_are_held(extractor: ADPretrainFeatureExtractor) -> None:
    """A line scan of 8192 x 1024 pixels, 25 MB, in more than 1,000 windows: pixels and maps are held, features not."""
    lines, tiles = random_image(1, 8192, 1024), Tiles(tile_size=84)
    extractor.set_reference([random_image(0, 256, 128)], tiles=tiles, tile_reference="all")
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(module: object, residuals: object, levels: list[Tensor]) -> None:
        made.append(weakref.ref(levels[0]))
        alive.append(sum(len(level) for known in made if (level := known()) is not None))

    extractor.projectors.register_forward_hook(note)
    with peak_memory() as peak:
        (result,) = extractor.score_stream([lines], batch_size=16, progress=False)
    assert result.full_size_map().shape == (1024, 8192)
    assert len(made) * 16 >= len(tiles.windows(1024, 8192)) > 1000
    assert max(alive) <= 32 and not peak.megabytes > 200


def test_of_images_in_tiles_few_are_read_ahead(
    extractor: ADPretrainFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch asks for many images ahead, but not for many large ones."""
    monkeypatch.setattr("adpretrain_hf.images.batches.THREADS", 2)
    asked = 0

    def images() -> Iterator[Image.Image]:
        nonlocal asked
        while True:
            asked += 1
            yield random_image(asked, *LARGE)

    batches = iter(PreparedBatches(images(), extractor.preprocess, 64, tiles={"": (Tiles(8, 8, overlap=0), ())}))
    for done in range(1, 12):
        assert len(next(batches)) == 64 and asked <= done + 4


def surface(seed: int) -> np.ndarray:
    """2000 x 1500 pixels of brick: the photographs that show no damage, side by side in any order, turned over."""
    random, folder = np.random.default_rng(seed), PHOTOS / "brick"
    paths = list_images(folder / "train" / "good") + list_images(folder / "test" / "good")
    photos = [np.asarray(Image.open(path).convert("L")) for path in paths]
    cells = [
        [np.flip(photos[random.integers(len(photos))], [a for a in (0, 1) if random.integers(2)]) for _ in range(20)]
        for _ in range(15)
    ]
    return np.block(cells)[:1500, :2000]


def with_dot(image: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A white dot of 12 px somewhere on the image, and where its centre is."""
    random = np.random.default_rng(1000 + seed)
    centre = np.array([random.integers(20, side - 20) for side in image.shape])
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    return np.where((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= 36, 255, image).astype(np.uint8), centre


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [224, 336])
def test_a_defect_of_twelve_pixels_is_found_with_tiles_alone(image_size: int) -> None:
    """``-s`` prints the scores that docs/images.md quotes."""
    extractor = ADPretrainFeatureExtractor.from_pretrained(BUNDLE, image_size=image_size)
    clean = [surface(100), surface(101)]
    damaged, centres = zip(*(with_dot(image, seed) for seed, image in enumerate(clean)), strict=True)
    found = {}
    for name, tiles in (("whole", {}), ("tiles", {"tiles": Tiles(tile_size=400), "tile_reference": "all"})):
        extractor.set_reference([surface(0)], **tiles)
        began = time.monotonic()
        maps, scores = extractor.score([*clean, *damaged])
        print(name, scores.tolist(), f"{(time.monotonic() - began) / 4:.1f} s an image")
        found[name] = bool(scores[2:].min() > scores[:2].max())
        places = [np.array(divmod(int(anomaly.argmax()), 2000)) for anomaly in maps[2:]]
        if tiles:
            assert all(np.abs(place - centre).max() < 20 for place, centre in zip(places, centres, strict=True))
    assert found == {"whole": False, "tiles": True}
