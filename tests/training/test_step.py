"""One step: the numbers of the public extractor, gradients for the projectors alone, and the projectors' start."""

from __future__ import annotations

import pytest
import torch

from adpretrain_hf import ADPretrainConfig, ADPretrainFeatureExtractor, ReferenceBank
from adpretrain_hf.images import normalize
from adpretrain_hf.matching import to_rows
from adpretrain_hf.projector import Projectors
from tests.conftest import make_extractor
from training.initialisation import initialise
from training.losses import angle_loss, norm_loss
from training.samples import Batch
from training.settings import PretrainSettings
from training.step import PretrainStep

SETTINGS = PretrainSettings(precision="float32", angle_weight=0.3)


@pytest.fixture
def scaled(tiny_folder) -> ADPretrainFeatureExtractor:
    extractor = make_extractor(tiny_folder)
    extractor.config = extractor.config.replace(residual_scale=(0.5, 1.0, 2.0, 3.0))
    return extractor


def make_batch(seed: int = 0, images: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(2, images, 4, 4, generator=generator) > 0.7
    pixels = torch.randint(256, (2, images, 3, 32, 32), generator=generator).to(torch.uint8)
    return Batch(pixels, labels[0], labels[1], list(range(images)), [])


def make_references(extractor: ADPretrainFeatureExtractor, images: int = 3) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    maps = [extractor.encode(torch.randn(2, 3, 32, 32, generator=generator)) for _ in range(images)]
    return [[to_rows(level) for level in own] for own in maps]


def centers(extractor: ADPretrainFeatureExtractor) -> list[torch.Tensor]:
    return [torch.full((32,), 0.01 * level) for level, _ in enumerate(extractor.layers)]


def test_loss_is_that_of_the_public_extractor(scaled):
    batch, references = make_batch(), make_references(scaled)
    banks = [ReferenceBank(patches) for patches in references]
    views = [scaled(normalize(view, scaled.mean, scaled.std), banks) for view in batch.views]
    angle, norm = 0.0, 0.0
    for name, center in zip(scaled.layers, centers(scaled), strict=True):
        first, second = (to_rows(view[name]) for view in views)
        angle += angle_loss(first, second, batch.angle_labels.flatten(), center=center)
        norm += norm_loss(first, batch.norm_labels.flatten()) + norm_loss(second, batch.norm_labels.flatten())
    loss = PretrainStep(scaled, scaled.projectors, centers(scaled), SETTINGS)(batch, references)
    torch.testing.assert_close(loss.angle, angle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.norm, norm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, 0.3 * angle + norm, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_projector_parameter_and_no_other(scaled):
    scaled.requires_grad_()
    step = PretrainStep(scaled, scaled.projectors, centers(scaled), SETTINGS)
    step(make_batch(), make_references(scaled)).total.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in scaled.projectors.parameters())
    assert all(parameter.grad is None for parameter in scaled.backbone.parameters())


def test_numbers_of_references_may_differ(scaled):
    references = make_references(scaled)
    references[1] = [torch.cat([level, level]) for level in references[1]]
    step = PretrainStep(scaled, scaled.projectors, centers(scaled), SETTINGS)
    doubled, single = step(make_batch(), references), step(make_batch(), make_references(scaled))
    assert torch.equal(doubled.total, single.total)


def test_learns_one_batch_by_heart(scaled):
    projectors = scaled.projectors.requires_grad_()
    step = PretrainStep(scaled, projectors, centers(scaled), SETTINGS)
    optimizer = torch.optim.Adam(projectors.parameters(), lr=1e-3)
    batch, references, losses = make_batch(), make_references(scaled), []
    for _ in range(80):
        loss = step(batch, references).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("labels", [False, True])
def test_batch_of_one_label_still_trains(scaled, labels):
    batch = make_batch()
    batch.angle_labels[:], batch.norm_labels[:] = labels, labels
    scaled.requires_grad_()
    loss = PretrainStep(scaled, scaled.projectors, centers(scaled), SETTINGS)(batch, make_references(scaled))
    loss.total.backward()
    assert loss.total.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in scaled.projectors.parameters())


def test_bfloat16_is_close(scaled):
    batch, references = make_batch(), make_references(scaled)
    exact = PretrainStep(scaled, scaled.projectors, centers(scaled), SETTINGS)(batch, references)
    settings = PretrainSettings(precision="bfloat16", angle_weight=0.3)
    rounded = PretrainStep(scaled, scaled.projectors, centers(scaled), settings)(batch, references)
    assert rounded.total.dtype == torch.float32
    assert 0 < abs(float(rounded.total - exact.total)) < 0.05 * abs(float(exact.total))


# The start of the projectors: the identity, the published one, or a share of it


CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1, 2), num_reference_tokens=500)


def start(scale: float) -> Projectors:
    torch.manual_seed(0)
    projectors = Projectors(CONFIG)
    initialise(projectors, scale)
    return projectors


def test_a_start_of_scale_zero_is_the_identity():
    residual = torch.randn(2, 32, 3, 3)
    assert all(torch.equal(level, residual) for level in start(0.0)([residual, residual]))


def test_a_start_of_scale_one_is_the_published_one():
    for level in start(1.0):
        bound = (6 / (32 + 32)) ** 0.5  # Xavier
        assert 0.9 * bound < level.attention.out_proj.weight.abs().max() <= bound
        bound = (1 / 128) ** 0.5  # PyTorch's default for 128 inputs
        assert 0.9 * bound < level.mlp.fc2.weight.abs().max() <= bound
        assert level.reference_tokens.std().item() == pytest.approx(1, abs=0.05)


def test_a_start_in_between_is_a_share_of_the_published_one():
    for whole, part in zip(start(1.0).parameters(), start(0.1).parameters(), strict=True):
        assert torch.equal(part, whole) or torch.allclose(part, 0.1 * whole)
    residual = torch.randn(2, 32, 3, 3)
    features = start(0.1)([residual, residual])[0]
    assert 0 < (features - residual).norm() < 0.3 * residual.norm()
