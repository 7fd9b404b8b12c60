"""Detectors: the authors' distances, the formulas they stand for, and that they find what is not normal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf.errors import InputError
from adpretrain_hf.scoring import anomaly_map, gaussian_smooth
from training.evaluation.detectors import (
    Detector,
    FeatureNorm,
    Padim,
    PatchCore,
    embed_patches,
    spread_out,
    squared_distances,
    to_image,
)

QUICK = settings(max_examples=40, deadline=None, database=None)
DETECTORS: list[Callable[[], Detector]] = [FeatureNorm, PatchCore, Padim]


def features_of(images: int, *, levels: int = 4, channels: int = 24, grid: tuple[int, int] = (5, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(images)
    return [torch.randn(images, channels, *grid, generator=generator) for _ in range(levels)]


# The authors' code


def test_patchcore_embeds_as_the_authors(golden: dict[str, Tensor]) -> None:
    embedding = embed_patches([golden[f"patchcore.in.{level}"] for level in range(3)], 128)
    assert embedding.shape == (2, 36, 128)
    torch.testing.assert_close(embedding.flatten(0, 1), golden["patchcore.embedding"], atol=1e-6, rtol=0)


def test_patchcore_distances_are_the_authors(golden: dict[str, Tensor]) -> None:
    nearest = squared_distances(golden["patchcore.embedding"], golden["patchcore.bank"]).amin(dim=1)
    torch.testing.assert_close(nearest.view(2, 6, 6), golden["patchcore.sq_distance"], atol=2e-5, rtol=0)


def test_padim_distances_are_the_authors(golden: dict[str, Tensor]) -> None:
    padim = Padim()
    padim.fit([golden["padim.train"]])
    torch.testing.assert_close(padim.distances([golden["padim.test"]]), golden["padim.distance"], atol=1e-5, rtol=0)


# The formulas


@QUICK
@given(
    channels=st.integers(1, 20),
    levels=st.integers(1, 3),
    width=st.integers(1, 200),
    height=st.integers(1, 4),
    breadth=st.integers(1, 4),
)
def test_embedding_is_pooling_twice(channels: int, levels: int, width: int, height: int, breadth: int) -> None:
    features = features_of(2, levels=levels, channels=channels, grid=(height, breadth))
    rows = [F.unfold(level, 3, padding=1).transpose(1, 2).flatten(0, 1) for level in features]
    pooled = torch.cat([F.adaptive_avg_pool1d(level[:, None], width)[:, 0] for level in rows], dim=1)
    expected = F.adaptive_avg_pool1d(pooled[:, None], width)[:, 0]
    torch.testing.assert_close(embed_patches(features, width).flatten(0, 1), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("images", "channels"), [(2, 30), (8, 30), (40, 10)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_padim_is_the_mahalanobis_distance(images: int, channels: int, scale: float) -> None:
    normal, test = ([scale * level for level in features_of(n, channels=channels, grid=(2, 3))] for n in (images, 3))
    padim = Padim()
    padim.fit(normal)
    expected = np.zeros((3, 2, 3))
    for (image, row, column), _ in np.ndenumerate(expected):
        for fitted, level in zip(normal, test, strict=True):
            patches, patch = (maps[..., row, column].double().numpy() for maps in (fitted, level))
            covariance = np.cov(patches, rowvar=False) + 0.01 * np.eye(channels)
            offset = patch[image] - patches.mean(axis=0)
            expected[image, row, column] += np.sqrt(offset @ np.linalg.solve(covariance, offset)) / len(normal)
    np.testing.assert_allclose(padim.distances(test).numpy(), expected, rtol=1e-5)


@QUICK
@given(points=st.integers(1, 30), dimensions=st.integers(1, 5), number=st.integers(1, 30), seed=st.integers(0, 99))
def test_each_chosen_point_is_the_farthest(points: int, dimensions: int, number: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-3, 4, (points, dimensions), generator=generator).float()  # many are equal
    first, number = seed % points, min(number, points)
    chosen = spread_out(drawn, number, first).tolist()
    assert chosen[0] == first and len(set(chosen)) == number
    for place in range(1, number):
        distances = torch.cdist(drawn, drawn[chosen[:place]]).amin(dim=1)
        assert distances[chosen[place]] == pytest.approx(distances.max().item(), abs=1e-5)


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (224, 224)), ((4, 7), (32, 56)), ((1, 3), (8, 24))])
def test_maps_are_up_sampled_and_smoothed(grid: tuple[int, int], size: tuple[int, int]) -> None:
    patches = features_of(1, channels=3, grid=grid)[0][0]
    maps = F.interpolate(patches[None], size=size, mode="bilinear", align_corners=False)[0]
    expected = gaussian_smooth(gaussian_smooth(maps, dim=1), dim=2)
    torch.testing.assert_close(to_image(patches, size), expected, atol=1e-5, rtol=1e-5)


def test_patchcore_keeps_a_tenth_and_takes_the_last_three_levels() -> None:
    normal, test = features_of(8), features_of(2)
    detector = PatchCore(width=16, seed=3)
    detector.fit(normal)
    maps, scores = detector.score(test, (40, 48))
    bank, patches = (embed_patches(features[1:], 16) for features in (normal, test))
    rows = bank.flatten(0, 1)
    distances = torch.cdist(patches[0], rows).square()
    chosen = detector._bank
    assert chosen is not None and chosen.shape == (24, 16)  # of 8 x 30 patches
    assert all((rows == row).all(dim=1).any() for row in chosen)
    nearest = torch.cdist(patches[0], chosen).square().amin(dim=1)
    torch.testing.assert_close(maps[0], to_image(nearest.view(1, 5, 6), (40, 48))[0], atol=1e-4, rtol=1e-4)
    assert (nearest >= distances.amin(dim=1) - 1e-4).all()
    assert scores[0] == pytest.approx(float(nearest.max()), rel=1e-4)  # of the patches: a map is smoothed
    assert scores[0] > maps[0].max()


def test_feature_norm_is_the_extractors_map() -> None:
    features, detector = features_of(2), FeatureNorm()
    detector.fit(features_of(8))
    torch.testing.assert_close(detector.score(features, (40, 48))[0], anomaly_map(features, (40, 48)))


# All of them


@pytest.mark.parametrize("make", DETECTORS)
def test_an_abnormal_patch_stands_out(make: Callable[[], Detector]) -> None:
    normal, test = features_of(8), features_of(3)
    for level in test:
        level[1, :, 2, 4] += 5
    detector = make()
    detector.fit(normal)
    maps, _ = detector.score(test, (50, 60))
    assert maps.shape == (3, 50, 60) and maps.dtype == torch.float32
    assert maps.amax(dim=(1, 2)).argmax() == 1
    row, column = divmod(int(maps[1].argmax()), 60)
    assert 15 <= row < 35 and 35 <= column < 55


@pytest.mark.parametrize("make", DETECTORS)
def test_the_memory_layout_makes_no_difference(make: Callable[[], Detector]) -> None:
    def maps_of(normal: list[Tensor], test: list[Tensor]) -> Tensor:
        detector = make()
        detector.fit(normal)
        return detector.score(test, (20, 24))[0]

    normal, test = features_of(4), features_of(2)
    strided = [[level.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for level in one] for one in (normal, test)]
    torch.testing.assert_close(maps_of(*strided), maps_of(normal, test), atol=1e-5, rtol=1e-5)


def test_padim_needs_two_images() -> None:
    with pytest.raises(InputError, match="got 1 normal image, expected at least 2"):
        Padim().fit(features_of(1))
