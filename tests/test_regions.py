"""Where an image is anomalous, and the part of it that counts: regions, and regions of interest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import BundleError, ImageError, InputError, MissingPathError
from adpretrain_hf.overlays import outlined
from adpretrain_hf.reference import ReferenceBank
from adpretrain_hf.scoring import (
    AnomalyScores,
    Calibration,
    Judgement,
    Region,
    encode_region,
    find_regions,
    mark_regions,
)
from tests.conftest import random_image

RIGHT = [(24, 0), (47, 0), (47, 39), (24, 39)]


@pytest.fixture
def whole(extractor: ADPretrainFeatureExtractor) -> ADPretrainFeatureExtractor:
    """An extractor that sees all of an image."""
    return ADPretrainFeatureExtractor(
        extractor.config.replace(resize_mode="resize"), extractor.backbone, extractor.projectors
    )


def normals(number: int, first: int = 100) -> list[Image.Image]:
    return [random_image(first + seed) for seed in range(number)]


# Regions


def a_map() -> torch.Tensor:
    anomaly = torch.zeros(12, 20)
    anomaly[1:3, 2:5] = 2.0  # 2 x 3
    anomaly[2, 3] = 5.0
    anomaly[3, 5] = 3.0  # touches the first by a corner
    anomaly[8:11, 15:19] = 4.0  # 3 x 4
    anomaly[6, 0] = 1.5
    return anomaly


def test_regions_in_closed_form() -> None:
    first = Region((1, 2, 3, 4), 7, 5.0, (5 * 2.0 + 5.0 + 3.0) / 7)
    second, third = Region((8, 15, 3, 4), 12, 4.0, 4.0), Region((6, 0, 1, 1), 1, 1.5, 1.5)
    assert [first, second, third] == [
        Region(one.box, one.area, one.peak, pytest.approx(one.mean)) for one in find_regions(a_map(), 1.0)
    ]
    assert find_regions(a_map(), 1.0, min_area=8) == [second]
    assert [one.area for one in find_regions(a_map(), 1.0, at_most=2)] == [7, 12]
    assert [one.area for one in find_regions(a_map(), 1.5)] == [7, 12]  # above, not at
    assert find_regions(a_map(), 9.0) == []
    for options, areas in (({}, 20), ({"min_area": 8}, 12), ({"at_most": 2}, 19), ({"min_area": 99}, 0)):
        regions, pixels = mark_regions(a_map(), 1.0, **options)  # type: ignore[arg-type]
        assert pixels.shape == (12, 20) and pixels.sum() == sum(one.area for one in regions) == areas
    for options in ({"min_area": "a"}, {"min_area": 2.5}, {"at_most": -1}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is .*, expected an integer >= 1"):
            find_regions(a_map(), 1.0, **options)  # type: ignore[arg-type]


def test_results_have_regions_above_their_own_threshold() -> None:
    low, high = Calibration((1.0, 1.0), peaks=(1.4, 1.4)), Calibration((4.5,))
    result = AnomalyScores(torch.stack([a_map(), a_map()]), torch.tensor([5.0, 5.0]), [low, high])
    assert [[one.area for one in regions] for regions in result.regions()] == [[7, 12, 1], [1]]
    assert [len(regions) for regions in result.regions(min_area=2)] == [2, 0]
    with pytest.raises(InputError, match="a decision needs a calibrated reference"):
        AnomalyScores(torch.zeros(1, 2, 2), torch.zeros(1)).regions()


def test_outlines_are_drawn_along_the_edges_of_regions() -> None:
    picture = Image.new("RGB", (20, 12), (9, 9, 9))
    drawn = np.asarray(outlined(picture, mark_regions(a_map(), 3.5)[1]))
    white = (drawn == 255).all(axis=2)
    expected = np.zeros((12, 20), dtype=bool)
    expected[8:11, 15:19] = expected[2, 3] = True
    expected[9, 16:18] = False  # inside
    np.testing.assert_array_equal(white, expected)


# The region of interest


def defect(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    image = image.copy()
    image.paste((255, 0, 255), box)
    return image


def test_what_lies_outside_does_not_count(whole: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    """Images of 48 x 40 pixels, of which the left half counts."""
    mask = np.zeros((40, 48), dtype=bool)
    mask[:, :24] = True
    Image.fromarray(mask).save(tmp_path / "left.png")
    clean = random_image(1)
    bad = defect(clean, (36, 8, 48, 32))
    plain = whole.set_reference(normals(3)).score([clean, bad])
    bank = whole.make_reference(normals(3), region=tmp_path / "left.png")
    bank.save(tmp_path / "bank.safetensors")
    assert all(torch.equal(*pair) for pair in zip(bank.patches, whole.reference.patches, strict=True))  # type: ignore[union-attr]
    result = whole.set_reference(tmp_path / "bank.safetensors").score([clean, bad])
    for before, after in zip(plain.maps, result.maps, strict=True):
        assert torch.equal(after[:, 24:], torch.zeros(40, 24))
        torch.testing.assert_close(after[:, :20], before[:, :20])
        assert after[:, :24].min() > 0
    scored = list(whole.score_stream([clean, bad], progress=False))
    for one in scored:
        assert one.score == float(one.anomaly.max()) == float(one.anomaly[:, : one.anomaly.shape[1] // 2].max())


@pytest.mark.parametrize(
    "given",
    [
        {"region": [(0, 0), (23, 0), (23, 39), (0, 39)]},
        {"region": np.pad(np.ones((40, 24), np.uint8), ((0, 0), (0, 24)))},
        {"ignore": RIGHT},
        {"ignore": np.array(RIGHT)},
        {"ignore": np.array(RIGHT, np.int32)[:, None]},
        {"ignore": np.pad(np.ones((40, 24), np.uint16), ((0, 0), (24, 0)))},
        {"ignore": torch.arange(48).expand(40, 48) >= 24},
        {"region": Image.fromarray(np.pad(np.ones((40, 30), bool), ((0, 0), (0, 18)))), "ignore": RIGHT},
    ],
)  # fmt: skip
def test_regions_may_be_told_in_several_ways(given: dict[str, object]) -> None:
    left = np.pad(np.ones((40, 24), bool), ((0, 0), (0, 24)))
    assert encode_region(given.get("region"), given.get("ignore"), (40, 48)) == encode_region(left, None, (40, 48))


@pytest.mark.parametrize(
    ("mode", "inside", "outside"),
    [("1", 1, 0), ("L", 1, 0), ("I;16", 1, 0), ("P", 1, 0), ("RGB", (0, 0, 1), (0, 0, 0)),
     ("LA", (255, 255), (255, 0)), ("RGBA", (9, 9, 9, 255), (9, 9, 9, 0))],
)  # fmt: skip
def test_masks_count_by_their_stored_values(mode: str, inside: object, outside: object, tmp_path: Path) -> None:
    mask = Image.new(mode, (48, 40), outside)  # type: ignore[arg-type]
    for x, y in np.ndindex(24, 40):
        mask.putpixel((x, y), inside)  # type: ignore[arg-type]
    mask.save(tmp_path / "mask.png")
    left = np.pad(np.ones((40, 24), bool), ((0, 0), (0, 24)))
    for given in (mask, tmp_path / "mask.png"):
        assert encode_region(given, None, (40, 48)) == encode_region(left, None, (40, 48))


def test_a_mask_whose_palette_begins_with_white_counts_by_its_colours() -> None:
    mask = Image.new("P", (48, 40), 1)
    mask.putpalette((255, 255, 255, 0, 0, 0))
    mask.paste(0, (0, 0, 24, 40))
    left = np.pad(np.ones((40, 24), bool), ((0, 0), (0, 24)))
    assert encode_region(mask, None, (40, 48)) == encode_region(left, None, (40, 48))


def test_a_region_is_checked_before_the_images_are_read(whole: ADPretrainFeatureExtractor) -> None:
    def images() -> Iterator[Image.Image]:
        yield from normals(2)
        pytest.fail("all images were read")

    with pytest.raises(InputError, match="expected one mask"):
        whole.make_reference((pytest.fail("an image was read") for _ in range(2)), region=[1, 2])
    with pytest.raises(MissingPathError, match="no such image: mask.png"):
        whole.make_reference((pytest.fail("an image was read") for _ in range(2)), ignore="mask.png")
    with pytest.raises(InputError, match="is 4 x 4 pixels, the images 48 x 40"):
        whole.make_reference(images(), region=np.ones((4, 4), bool), batch_size=1)


def test_the_top_is_a_share_of_what_counts(whole: ADPretrainFeatureExtractor) -> None:
    mask = np.zeros((40, 48), dtype=bool)
    mask[:20] = True
    bank = whole.make_reference(normals(3), region=mask, image_score="top", top=0.25)
    (scored,) = whole.set_reference(bank).score_stream([random_image(1)], progress=False)
    inside = scored.anomaly[scored.anomaly > 0]
    assert inside.numel() == scored.anomaly.numel() / 2
    highest = inside.sort(descending=True).values[: round(0.25 * inside.numel())]
    assert scored.score == pytest.approx(float(highest.mean()))


def test_a_calibration_counts_only_what_is_inside(whole: ADPretrainFeatureExtractor) -> None:
    mask = np.zeros((40, 48), dtype=bool)
    mask[:, :24] = True
    bank = whole.make_reference(
        normals(3), region=mask, calibrate=[defect(one, (36, 8, 48, 32)) for one in normals(3, 200)]
    )
    calibration = bank.judgement.calibration
    plain = whole.make_reference(normals(3), calibrate=normals(3, 200)).judgement.calibration
    assert calibration is not None and plain is not None
    assert calibration.typical > 0 and max(calibration.scores) < max(plain.scores) * 1.2


def test_an_image_of_another_size_is_named(whole: ADPretrainFeatureExtractor) -> None:
    mask = np.ones((40, 48), dtype=bool)
    mask[0] = False
    whole.set_reference(whole.make_reference(normals(3), region=mask))
    images = [random_image(1), random_image(2, 40, 48), random_image(3)]
    with pytest.raises(ImageError, match="image 1 is 40 x 48 pixels, the region of interest 48 x 40"):
        whole.score(images)
    errors: list[str] = []
    scored = whole.score_stream(images, progress=False, on_error=lambda name, error: errors.append(name))
    assert [one.image.name for one in scored] == ["image 0", "image 2"] and errors == ["image 1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"region": np.ones((48, 40), np.uint8)}, r"interest \(the mask\) is 40 x 48 pixels, the images 48 x 40"),
        ({"ignore": np.ones((4, 4), np.uint8)}, r"the area to ignore \(the mask\) is 4 x 4 pixels, the images 48 x 40"),
        ({"region": np.zeros((40, 48), np.uint8)}, r"the region of interest \(the mask\) is empty"),
        ({"ignore": np.ones((40, 48), np.uint8)}, "the region of interest is empty"),
        ({"ignore": np.zeros((40, 48), np.uint8)}, r"the area to ignore \(the mask\) is empty"),
        ({"ignore": [(50, 0), (60, 0), (60, 9)]}, "the area to ignore is empty: it has no pixel of the images"),
        ({"region": [(0, 0), (3, 3)]}, r"is \(0, 0\), \(3, 3\): expected one mask, or at least 3 corners"),
        ({"region": [Path("a.png"), Path("b.png")]}, "is a.png, b.png: expected one mask, or at least 3 corners"),
        ({"region": [Path("a.png"), (1.0, 2.0)]}, "expected one mask, or at least 3 corners"),
        ({"region": [(0, 0), (math.nan, 9), (9, 9)]}, "corners .* of a polygon, all finite"),
        ({"region": [(0, 0), (math.inf, 9), (9, 9)]}, "corners .* of a polygon, all finite"),
        ({"region": [1, 2, 3, 4]}, "is 1, 2, 3, 4: expected one mask"),
        ({"region": [(1, 2, 3)] * 3}, "expected one mask, or at least 3 corners"),
        ({"ignore": [("a", "b")] * 3}, "area to ignore is .*: expected one mask, or at least 3 corners"),
        ({"region": np.zeros((40, 48, 5), np.uint8)}, r"of shape \(40, 48, 5\), expected a mask \(H, W\)"),
    ],
)  # fmt: skip
def test_bad_regions_are_refused(whole: ADPretrainFeatureExtractor, given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole.make_reference(normals(2), **given)


def test_a_region_needs_references_of_one_size(whole: ADPretrainFeatureExtractor) -> None:
    with pytest.raises(InputError, match="a region of interest needs images of one size"):
        whole.make_reference([random_image(1), random_image(2, 40, 48)], region=np.ones((40, 48), np.uint8))


def test_a_region_that_the_network_does_not_see_is_refused(extractor: ADPretrainFeatureExtractor) -> None:
    """The centre crop cuts the corners of 48 x 40 pixels off."""
    mask = np.zeros((40, 48), np.uint8)
    mask[:, :2] = 1
    extractor.set_reference(extractor.make_reference(normals(2), region=mask))
    with pytest.raises(InputError, match="has no pixel in the part of the image that is looked at"):
        extractor.score(random_image(1))


def test_a_damaged_region_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the region of interest is damaged"):
        Judgement(region="AAAA")
    bank = ReferenceBank(
        [torch.ones(2, 4)], judgement=Judgement(region=encode_region(np.ones((2, 2), bool), None, (2, 2)))
    )
    good = bank.judgement.region
    assert good is not None
    bank.save(tmp_path / "bank.safetensors")
    data = (tmp_path / "bank.safetensors").read_bytes()
    (tmp_path / "bank.safetensors").write_bytes(data.replace(good.encode(), b"B" * len(good)))
    with pytest.raises(BundleError, match="the region of interest is damaged"):
        ReferenceBank.load(tmp_path / "bank.safetensors")
