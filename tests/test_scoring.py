"""FeatureNorm scores: the authors' map, the formulas it is made of, and its place in the image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import InputError
from adpretrain_hf.images import PreparedImage
from adpretrain_hf.scoring import (
    SIGMA,
    AnomalyScores,
    MapStack,
    ScoredImage,
    anomaly_map,
    feature_norm,
    gaussian_smooth,
    place_map,
    score_images,
)

QUICK = settings(max_examples=60, deadline=None, database=None)
sides = st.integers(1, 48)


def prepared(name: str, height: int = 24, width: int = 24) -> PreparedImage:
    return PreparedImage(torch.zeros(3, height, width), name, (height, width), (0, 0, height, width))


def scored(images: list[PreparedImage], maps: Tensor) -> list[ScoredImage]:
    return [result for result, _ in score_images([(images, [maps])], {})]


def features_of(batch: int, grid: tuple[int, int] = (3, 3), levels: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 8, *grid, generator=generator) for _ in range(levels)]


# The authors' map


def test_the_map_is_the_authors(golden: dict[str, Tensor]) -> None:
    features = [golden[f"projector.out.{level}"] for level in range(4)]
    side = int(golden["featurenorm.size"])
    anomaly = anomaly_map(features, (side, side))
    assert anomaly.dtype == torch.float32
    torch.testing.assert_close(anomaly, golden["featurenorm.map"], atol=1e-5, rtol=1e-5)


def test_the_scores_are_the_maxima_of_the_authors_map(golden: dict[str, Tensor]) -> None:
    features = [golden[f"projector.out.{level}"] for level in range(4)]
    side = int(golden["featurenorm.size"])
    results = scored([prepared(str(number), side, side) for number in range(3)], anomaly_map(features, (side, side)))
    for result, expected in zip(results, golden["featurenorm.map"], strict=True):
        torch.testing.assert_close(result.anomaly, expected, atol=1e-5, rtol=1e-5)
        assert result.score == pytest.approx(float(expected.max()), abs=1e-5)


# The norm


@QUICK
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=16))
def test_feature_norm_in_closed_form(values: list[float]) -> None:
    feature = torch.tensor(values).view(1, -1, 1, 1)
    expected = math.sqrt(math.sqrt(math.fsum(value * value for value in values)) + 1) - 1
    assert float(feature_norm(feature)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_feature_norm_is_per_patch() -> None:
    features = torch.zeros(2, 2, 1, 3)
    features[1, :, 0, 2] = torch.tensor([3.0, 4.0])
    expected = torch.zeros(2, 1, 3)
    expected[1, 0, 2] = math.sqrt(6) - 1
    torch.testing.assert_close(feature_norm(features), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_the_norm(dtype: torch.dtype) -> None:
    features = torch.full((1, 256, 1, 1), 6e4).to(dtype)
    norm = feature_norm(features)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(math.sqrt(float(features[0, 0]) * 16 + 1) - 1, rel=1e-4)


# The filter


@QUICK
@example(side=1, seed=0)
@example(side=2, seed=0)
@example(side=15, seed=0)
@example(side=16, seed=0)
@example(side=17, seed=0)
@example(side=300, seed=0)
@given(side=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_filter_is_scipys(side: int, seed: int) -> None:
    signal = np.random.default_rng(seed).normal(size=side)
    expected = gaussian_filter1d(signal, sigma=4, mode="reflect")
    assert SIGMA == 4
    maps = torch.from_numpy(signal)
    for dim, shape in ((1, (1, -1, 1)), (2, (1, 1, -1))):
        smooth = gaussian_smooth(maps.view(shape), dim)
        np.testing.assert_allclose(smooth.flatten().numpy(), expected, atol=1e-9)


@QUICK
@given(height=sides, width=sides)
def test_the_map_is_smoothed_as_scipy_does_it(height: int, width: int) -> None:
    features = features_of(2, grid=(2, 3))
    upsampled = [
        F.interpolate(feature_norm(level)[:, None], size=(height, width), mode="bilinear", align_corners=True)
        for level in features
    ]
    mean = torch.cat(upsampled, dim=1).mean(dim=1).numpy()
    expected = np.stack([gaussian_filter(one, sigma=4, mode="reflect") for one in mean])
    np.testing.assert_allclose(anomaly_map(features, (height, width)).numpy(), expected, atol=1e-5)


@QUICK
@given(height=sides, width=sides, norms=st.lists(st.floats(0, 1e3), min_size=1, max_size=4))
def test_the_map_of_constant_features_is_constant(height: int, width: int, norms: list[float]) -> None:
    direction = F.normalize(torch.ones(8), dim=0).view(1, 8, 1, 1)
    features = [(direction * norm).expand(2, 8, 3, 2) for norm in norms]
    expected = sum(math.sqrt(norm + 1) - 1 for norm in norms) / len(norms)
    anomaly = anomaly_map(features, (height, width))
    torch.testing.assert_close(anomaly, torch.full((2, height, width), expected), atol=1e-5, rtol=1e-5)


def test_levels_may_have_different_grids() -> None:
    anomaly = anomaly_map([torch.ones(1, 8, 2, 3), torch.ones(1, 8, 4, 6)], (16, 24))
    torch.testing.assert_close(anomaly, torch.full((1, 16, 24), math.sqrt(math.sqrt(8) + 1) - 1))


def test_a_feature_raises_the_map_where_it_is() -> None:
    features = torch.zeros(1, 8, 4, 6)
    features[0, :, 1, 4] = 5
    row, column = divmod(int(anomaly_map([features], (128, 192))[0].argmax()), 192)
    assert abs(row - 127 / 3) <= 2 and abs(column - 191 * 4 / 5) <= 2


# Under whatever mode it is called


def test_the_map_is_differentiable() -> None:
    features = [level.requires_grad_() for level in features_of(1)]
    anomaly_map(features, (24, 24)).sum().backward()
    for level in features:
        assert level.grad is not None and level.grad.isfinite().all() and level.grad.abs().sum() > 0


def test_the_map_is_differentiable_after_inference_mode() -> None:
    with torch.inference_mode():
        anomaly_map(features_of(1), (24, 24))
    features = [level.requires_grad_() for level in features_of(1)]
    anomaly_map(features, (24, 24)).sum().backward()
    assert features[0].grad is not None


def test_the_map_is_float32_under_autocast() -> None:
    expected = anomaly_map(features_of(1), (24, 24))
    with torch.autocast("cpu", torch.bfloat16):
        anomaly = anomaly_map(features_of(1), (24, 24))
    assert anomaly.dtype == torch.float32
    torch.testing.assert_close(anomaly, expected)


# Batches


def test_a_batch_is_scored_image_by_image() -> None:
    features = features_of(3, grid=(3, 4))
    images = [prepared(name, 24, 32) for name in ("a.png", "b.png", "c.png")]
    maps = anomaly_map(features, (24, 32))
    results = scored(images, maps)
    assert [result.image for result in results] == images
    for row, result in enumerate(results):
        assert isinstance(result, ScoredImage) and isinstance(result.score, float)
        torch.testing.assert_close(result.anomaly, maps[row])
        assert result.score == float(result.anomaly.max())
        alone = scored([images[row]], anomaly_map([level[row : row + 1] for level in features], (24, 32)))[0]
        torch.testing.assert_close(alone.anomaly, result.anomaly)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", [0, 1])
def test_a_score_that_is_not_finite_is_refused_by_name(value: float, level: int) -> None:
    features = features_of(3)
    features[level][1, 5, 2, 0] = value
    images = [prepared(name) for name in ("good.png", "bad.png", "other.png")]
    with pytest.raises(InputError, match=r"the score of bad\.png is (nan|inf): it holds NaN"):
        scored(images, anomaly_map(features, images[0].network_size))


def test_full_size_map() -> None:
    image = PreparedImage(torch.zeros(3, 8, 8), "a.png", (40, 60), (0, 10, 40, 40))
    full = ScoredImage(image, torch.ones(8, 8), 1.0).full_size_map()
    assert full.shape == (40, 60)
    torch.testing.assert_close(full[:, 10:50], torch.ones(40, 40))
    assert full[:, :10].count_nonzero() == full[:, 50:].count_nonzero() == 0


@QUICK
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    new=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    crop=st.booleans(),
)
def test_a_map_at_another_size_shows_the_same_part(size: tuple[int, int], new: tuple[int, int], crop: bool) -> None:
    (height, width), short = size, min(size)
    box = ((height - short) // 2, (width - short) // 2, short, short) if crop else (0, 0, height, width)
    placed = ScoredImage(PreparedImage(torch.zeros(3, 8, 8), "a.png", size, box), torch.ones(8, 8), 1.0).map_at(new)
    assert placed.shape == new
    for axis, (start, extent) in enumerate(((box[0], box[2]), (box[1], box[3]))):
        seen = placed.amax(1 - axis).nonzero()[:, 0]
        assert seen[0] == math.floor(start / size[axis] * new[axis] + 1e-9)
        assert seen[-1] + 1 == math.ceil((start + extent) / size[axis] * new[axis] - 1e-9)
        assert len(seen) == seen[-1] + 1 - seen[0]


@pytest.mark.parametrize("last", [(4, 6), (6, 4), (2, 3)])
def test_maps_of_one_size_are_one_tensor_and_others_a_list(last: tuple[int, int]) -> None:
    stack, maps = MapStack(), [torch.rand(4, 6), torch.rand(4, 6), torch.rand(last), torch.rand(4, 6)]
    for one in maps:
        stack.add(one)
    assert isinstance(stack.maps(), Tensor) == (last == (4, 6))
    assert all(torch.equal(*pair) for pair in zip(stack.maps(), maps, strict=True))


def test_anomaly_scores_unpack() -> None:
    maps, scores = AnomalyScores(torch.zeros(2, 4, 4), torch.zeros(2))
    assert maps.shape == (2, 4, 4) and scores.shape == (2,)


# Back to the image


@QUICK
@given(height=sides, width=sides)
def test_a_map_of_the_images_size_stays_as_it_is(height: int, width: int) -> None:
    anomaly = torch.rand(height, width)
    for box in (None, (0, 0, height, width)):
        torch.testing.assert_close(place_map(anomaly, (height, width), box), anomaly, atol=0, rtol=0)


@QUICK
@given(grid=st.tuples(sides, sides), size=st.tuples(sides, sides))
def test_a_map_of_the_whole_image_is_resized(grid: tuple[int, int], size: tuple[int, int]) -> None:
    anomaly = torch.rand(grid)
    placed = place_map(anomaly, size)
    assert placed.shape == size
    assert anomaly.min() - 1e-6 <= placed.min() and placed.max() <= anomaly.max() + 1e-6
    torch.testing.assert_close(place_map(torch.full(grid, 0.7), size), torch.full(size, 0.7))
    torch.testing.assert_close(place_map(anomaly, size, (0, 0, *size)), placed)


@QUICK
@given(
    grid=st.tuples(sides, sides),
    box=st.tuples(st.integers(0, 20), st.integers(0, 20), sides, sides),
    margin=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_outside_the_box_the_map_is_zero(
    grid: tuple[int, int], box: tuple[int, int, int, int], margin: tuple[int, int]
) -> None:
    top, left, height, width = box
    size = (top + height + margin[0], left + width + margin[1])
    anomaly = torch.rand(grid) + 0.1
    placed = place_map(anomaly, size, box)
    assert placed.shape == size
    torch.testing.assert_close(placed[top : top + height, left : left + width], place_map(anomaly, (height, width)))
    outside = torch.ones(size, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert (placed[outside] == 0).all()


def test_a_box_of_the_maps_size_is_shifted_only() -> None:
    anomaly = torch.arange(6.0).view(2, 3)
    expected = torch.zeros(4, 6)
    expected[1:3, 2:5] = anomaly
    torch.testing.assert_close(place_map(anomaly, (4, 6), (1, 2, 2, 3)), expected, atol=0, rtol=0)


def test_between_two_patches_the_map_is_linear() -> None:
    ramp = torch.arange(4.0).expand(4, 4)
    line = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(place_map(ramp, (8, 8)), line.expand(8, 8))
    torch.testing.assert_close(place_map(ramp.T, (8, 8)), line.expand(8, 8).T)


def test_corners_stay_corners() -> None:
    anomaly = torch.zeros(8, 8)
    anomaly[0, 0], anomaly[7, 7] = 1, 2
    placed = place_map(anomaly, (80, 80))
    assert placed[:5, :5].min() == 1 and placed[-5:, -5:].min() == 2
    assert placed[20:60, 20:60].max() == 0
