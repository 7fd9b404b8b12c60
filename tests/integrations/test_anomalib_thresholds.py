"""FeatureNorm's decisions in anomalib where no anomalies were given: by the calibration of its reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor

pytest.importorskip("anomalib")
from adpretrain_hf.integrations.anomalib import ADPretrainFeatureNorm
from tests.integrations.anomalib_data import datamodule, engine, normal_datamodule, texture, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and thirty more normal images."""
    root = write_images(tmp_path_factory.mktemp("data"))
    (root / "more").mkdir()
    for seed in range(100, 130):
        texture(seed).save(root / "more" / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def extractor(bundle, folder):
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, variant="norm")
    calibrate = [texture(seed) for seed in range(200, 240)]
    bank = extractor.make_reference(folder / "train", calibrate=calibrate, image_score="top", top=0.01)
    return extractor.set_reference(bank)


@pytest.fixture
def bank(extractor, tmp_path):
    """A calibrated one."""
    extractor.reference.save(tmp_path / "bank.safetensors")
    return tmp_path / "bank.safetensors"


def make(bundle, references):
    return ADPretrainFeatureNorm(str(bundle), references=references, evaluator=False, visualizer=False)


def predict(root, model, images) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Names, scores (N,) and labels (N,)."""
    batches = engine(root).predict(model, data_path=str(images))
    names = [path for batch in batches for path in batch.image_path]
    return names, *(torch.cat([getattr(batch, f"pred_{what}") for batch in batches]) for what in ("score", "label"))


def assert_sensible(root, model, folder):
    """Normal images are mostly normal, anomalous ones are not."""
    assert predict(root, model, folder / "more")[2].float().mean() <= 0.1
    assert predict(root, model, folder / "defect")[2].all()


def test_normal_images_to_validate_on_leave_the_banks_threshold(bundle, bank, extractor, folder, tmp_path):
    model, run, known = make(bundle, str(bank)), engine(tmp_path), extractor.reference.judgement.calibration
    run.fit(model, datamodule=normal_datamodule(folder))
    thresholds = model.post_processor.image_threshold, model.post_processor.pixel_threshold
    assert [float(one) for one in thresholds] == pytest.approx([known.threshold(), known.pixel_threshold()])
    assert_sensible(tmp_path, model, folder)
    bank.unlink()  # a checkpoint holds the bank, how it is judged, and the thresholds
    again = ADPretrainFeatureNorm.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    for got, expected in zip(predict(tmp_path, again, folder), predict(tmp_path, model, folder), strict=True):
        assert got == expected if isinstance(got, list) else torch.equal(got, expected)


def test_a_calibrated_bank_decides_without_a_fit(bundle, bank, extractor, folder, tmp_path):
    names, scores, labels = predict(tmp_path, make(bundle, str(bank)), folder)
    expected = extractor.score(names)
    others = torch.tensor([Path(name).parent.name != "train" for name in names])  # anomalib knows no references here
    assert torch.equal(labels[others], expected.is_anomalous()[others])
    assert 0 < labels.sum() < others.sum()
    threshold = extractor.reference.judgement.calibration.threshold()
    as_multiples = (expected.scores / threshold / 2).clamp(max=1)
    torch.testing.assert_close(scores[others], as_multiples[others], rtol=1e-4, atol=1e-5)


def test_references_of_a_folder_decide_by_leaving_each_out(bundle, folder, tmp_path):
    model = make(bundle, str(folder / "train"))
    assert_sensible(tmp_path, model, folder)
    known = model.features.calibration
    assert known.approximate and len(known.scores) == 8 and known.scores[0] > 0
    assert float(model.post_processor.image_threshold) == pytest.approx(known.threshold())


def test_normal_images_to_validate_on_are_more_than_references(bundle, folder, tmp_path):
    model = make(bundle, 4)
    engine(tmp_path).fit(model, datamodule=normal_datamodule(folder))
    assert len(model.features.calibration.scores) == 4
    assert float(model.post_processor.image_threshold) != pytest.approx(model.features.calibration.threshold())


def test_anomalies_to_validate_on_give_anomalibs_threshold(bundle, bank, extractor, folder, tmp_path):
    plain = tmp_path / "plain.safetensors"
    reference = extractor.reference
    reference.judged(reference.judgement.calibrated(None)).save(plain)
    models = [make(bundle, str(path)) for path in (bank, plain)]
    for model in models:
        engine(tmp_path).fit(model, datamodule=datamodule(folder))
    buffers = [dict(model.post_processor.named_buffers()) for model in models]
    for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        assert torch.equal(buffers[0][name], buffers[1][name])


def test_a_calibration_of_other_scores_is_left_aside(bundle, bank, tmp_path):
    of_angle = ADPretrainFeatureNorm(str(bundle), variant="angle", references=str(bank))
    of_residuals = ADPretrainFeatureNorm(str(bundle), features="residual", references=str(bank))
    of_one_level = ADPretrainFeatureNorm(str(bundle), levels=[2], references=str(bank))
    for model in (of_angle, of_residuals, of_one_level):
        model.set_reference(str(bank))
        assert model.post_processor.image_threshold.isnan()
