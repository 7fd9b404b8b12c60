"""Centres: the mean of all patches however they come in batches, and what has no mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adpretrain_hf.errors import InputError
from training.centers import normal_statistics

QUICK = settings(max_examples=40, deadline=None, database=None)


def residuals(images: int, channels: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * (1 + torch.randn(images, channels, 3, 4, generator=generator))).to(dtype) for scale in (0.1, 1.0, 30.0)
    ]


@QUICK
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), channels=st.integers(1, 6))
def test_statistics_do_not_depend_on_the_batches(sizes: list[int], channels: int) -> None:
    levels = residuals(sum(sizes), channels)
    batches = zip(*(level.split(sizes) for level in levels), strict=True)
    statistics = normal_statistics(batches)
    assert statistics.mean_norms.shape == (3,) and len(statistics.centers) == 3
    for level, center, norm in zip(levels, *statistics, strict=True):
        rows = level.double().permute(0, 2, 3, 1).reshape(-1, channels)
        assert center.dtype == torch.float32
        torch.testing.assert_close(center, rows.mean(0).float(), atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(norm, rows.norm(dim=1).mean(), atol=0, rtol=1e-6)


def test_scaled_residuals_have_length_one_on_average() -> None:
    levels = residuals(3)
    scale = normal_statistics([levels]).residual_scale()
    assert len(scale) == 3 and all(isinstance(one, float) for one in scale)
    for level, factor in zip(levels, scale, strict=True):
        assert (factor * level).norm(dim=1).mean().item() == pytest.approx(1, abs=1e-6)


def test_many_half_precision_batches_add_up_without_drift() -> None:
    level = torch.full((1, 2, 16, 16), 0.1, dtype=torch.bfloat16)
    statistics = normal_statistics([level] for _ in range(3000))
    assert torch.equal(statistics.centers[0], level[0, :, 0, 0].float())
    assert statistics.mean_norms.item() == pytest.approx(level[0, :, 0, 0].float().norm().item(), rel=1e-6)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(InputError, match="no residuals were given: expected those of at least one normal image"):
        normal_statistics([])


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_residuals_without_a_length_are_refused(value: float, text: str) -> None:
    levels = residuals(2)
    levels[1] = torch.full_like(levels[1], value)
    with pytest.raises(InputError, match=rf"level 1 are {text} long on average, expected a finite length > 0"):
        normal_statistics([levels])
