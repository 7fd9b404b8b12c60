"""References of a step: the same in any batch and process, of the image's own kind, never the image itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.matching import nearest_residual
from training import synthetic
from training.content_keys import content_keys
from training.reference_cache import ReferenceCache
from training.reference_encoding import ReferenceEncoder
from training.reference_pool import ReferencePool
from training.references import References
from training.samples import Samples
from training.settings import PretrainSettings
from training.training_data import TrainingData, load_training_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrainingData:
    folder = tmp_path_factory.mktemp("references") / "data"
    synthetic.generate(folder, categories=2, normals=4, progress=False)
    return load_training_data(PretrainSettings(data=(str(folder),), resolution="256"), Path("unused"))


def make(data: TrainingData, backbone: Path, **changes) -> tuple[References, ReferenceCache]:
    settings = PretrainSettings(**({"references": (1, 3), "seed": 5} | changes))
    extractor = ADPretrainFeatureExtractor.from_backbone(str(backbone), image_size=64, num_reference_tokens=8)
    samples = Samples(data.dataset, data.positions, extractor.config)
    columns = (data.dataset[name] for name in ("category", "view", "is_anomalous"))
    pool = ReferencePool(*columns, among=data.positions)
    encoder = ReferenceEncoder(extractor, samples.load_normal, dtype=torch.float32)
    cache = ReferenceCache(encoder, content_keys(data.dataset["image"]), memory_bytes=10**8)
    return References(data, pool, cache, settings), cache


def test_do_not_depend_on_the_rest_of_the_batch(data, tiny_folder):
    references, _ = make(data, tiny_folder)
    positions = data.positions[:6]
    together = references.draw(positions, 2, 7)
    for position, own in zip(positions, together, strict=True):
        (alone,) = make(data, tiny_folder)[0].draw([position], 2, 7)
        assert all(torch.equal(one, other) for one, other in zip(own, alone, strict=True))


def test_numbers_are_drawn_for_each_step_and_images_anew_for_each_epoch(data, tiny_folder):
    references, _ = make(data, tiny_folder)
    rows = [len(references.draw(data.positions[:1], 0, step)[0][0]) // 64 for step in range(20)]
    assert set(rows) == {1, 3}
    fixed, _ = make(data, tiny_folder, references=(3,))
    first, second = (fixed.draw(data.positions[:4], epoch, 0) for epoch in (0, 1))
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))


def test_are_normal_images_of_the_same_kind_and_never_the_image_itself(data, tiny_folder):
    references, cache = make(data, tiny_folder, references=(2,))
    rows = data.dataset.select(data.positions)
    for position, row in list(zip(data.positions, rows, strict=True))[:8]:
        kin = [
            other
            for other, its in zip(data.positions, rows, strict=True)
            if other != position and its["view"] == row["view"] and not its["is_anomalous"]
        ]
        allowed = [cache.get([other])[0] for other in kin]
        (own,) = references.draw([position], 0, 0)
        for part in own[0].chunk(2):
            assert any(torch.equal(part, patches) for patches in allowed)


def test_measured_scale_makes_normal_residuals_one_long(data, tiny_folder):
    references, cache = make(data, tiny_folder)
    centers, scale = references.measure()
    residuals = list(references.normal_residuals())
    for level, (factor, center) in enumerate(zip(scale, centers, strict=True)):
        rows = factor * torch.cat([residual[level][0, :, 0].T for residual in residuals])
        assert rows.norm(dim=1).mean().item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(rows.mean(dim=0), center, rtol=1e-4, atol=1e-5)
    unscaled = make(data, tiny_folder, scale_residuals=False)[0].measure()
    assert unscaled[1] == [1.0] * 4
    torch.testing.assert_close(unscaled[0][2] * scale[2], centers[2], rtol=1e-4, atol=1e-5)
    assert (
        nearest_residual(cache.get([data.positions[0]])[0].T[None, :, None], cache.get([data.positions[0]])[0])
        .eq(0)
        .all()
    )
