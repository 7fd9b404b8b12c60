"""The start of the projectors: the identity, the published one, or a share of it."""

from __future__ import annotations

import pytest
import torch

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.projector import Projectors
from training.initialisation import initialise

CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1, 2), num_reference_tokens=500)


def start(scale: float) -> Projectors:
    torch.manual_seed(0)
    projectors = Projectors(CONFIG)
    initialise(projectors, scale)
    return projectors


def test_zero_is_the_identity():
    residual = torch.randn(2, 32, 3, 3)
    assert all(torch.equal(level, residual) for level in start(0.0)([residual, residual]))


def test_one_is_the_published_start():
    for level in start(1.0):
        bound = (6 / (32 + 32)) ** 0.5  # Xavier
        assert 0.9 * bound < level.attention.out_proj.weight.abs().max() <= bound
        bound = (1 / 128) ** 0.5  # PyTorch's default for 128 inputs
        assert 0.9 * bound < level.mlp.fc2.weight.abs().max() <= bound
        assert level.reference_tokens.std().item() == pytest.approx(1, abs=0.05)


def test_in_between_is_a_share():
    for whole, part in zip(start(1.0).parameters(), start(0.1).parameters(), strict=True):
        assert torch.equal(part, whole) or torch.allclose(part, 0.1 * whole)
    residual = torch.randn(2, 32, 3, 3)
    features = start(0.1)([residual, residual])[0]
    assert 0 < (features - residual).norm() < 0.3 * residual.norm()
