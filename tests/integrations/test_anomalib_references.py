"""The references of anomalib's detectors: from files or from the training data, and what becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError

pytest.importorskip("anomalib")
from adpretrain_hf.integrations.anomalib import ADPretrainFeatureNorm, ADPretrainPatchcore
from tests.integrations.anomalib_data import datamodule, engine, predict, texture, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


def make(detector, bundle, **settings):
    return detector(str(bundle), **{"evaluator": False, "visualizer": False, "references": 4} | settings)


@pytest.mark.parametrize("kind", ["folder", "bank"])
def test_training_images_that_are_references_do_not_find_themselves(kind, bundle, folder, tmp_path):
    source = folder / "train"
    if kind == "bank":
        extractor = ADPretrainFeatureExtractor.from_pretrained(bundle)
        extractor.make_reference(source).save(tmp_path / "good.safetensors")
        source = tmp_path / "good.safetensors"
    model = make(ADPretrainPatchcore, bundle, references=str(source), features="residual", coreset_sampling_ratio=1.0)
    engine(tmp_path).fit(model, datamodule=datamodule(folder))
    stored = model.model.memory_bank
    assert len(stored.unique(dim=0)) > 0.9 * len(stored)


def test_references_of_a_checkpoint_do_not_need_their_files(bundle, folder, tmp_path):
    references = shutil.copytree(folder / "train", tmp_path / "references")
    run = engine(tmp_path)
    model = make(ADPretrainFeatureNorm, bundle, references=str(references))
    run.fit(model, datamodule=datamodule(folder))
    maps, _ = predict(run, model, folder)
    checkpoint = run.trainer.checkpoint_callback.best_model_path
    shutil.rmtree(references)
    again = ADPretrainFeatureNorm.load_from_checkpoint(checkpoint)
    assert torch.equal(predict(engine(tmp_path), again, folder)[0], maps)


def test_saved_bank_serves_as_references(bundle, folder, tmp_path):
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle)
    extractor.make_reference(folder / "train").save(tmp_path / "bank.safetensors")
    sources = (folder / "train", tmp_path / "bank.safetensors")
    models = [make(ADPretrainFeatureNorm, bundle, references=str(one), post_processor=False) for one in sources]
    from_folder, from_bank = (predict(engine(tmp_path), model, folder)[0] for model in models)
    assert torch.equal(from_folder, from_bank)


def test_training_images_become_references_spread_over_the_data(bundle, folder, tmp_path):
    model = make(ADPretrainFeatureNorm, bundle)
    engine(tmp_path).fit(model, datamodule=datamodule(folder))
    names = [Path(name).name for name in model.features.names]
    assert names == ["0.png", "2.png", "4.png", "6.png"]
    assert model.features.extractor.reference.num_images == 4
    expected = model.features.extractor.make_reference([folder / "train" / name for name in names])
    for got, wanted in zip(model.features.extractor.reference.patches, expected.patches, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_more_references_than_images_are_all_images(bundle, folder, tmp_path, caplog):
    model = make(ADPretrainFeatureNorm, bundle, references=50)
    engine(tmp_path).fit(model, datamodule=datamodule(folder))
    assert model.features.extractor.reference.num_images == 8
    assert "50 references were asked for, the training data have 8 normal images" in caplog.text


@pytest.mark.parametrize("references", [0, -1, "", True, 2.5, None])
def test_wrong_references_are_refused(bundle, references):
    with pytest.raises(InputError, match="references is"):
        ADPretrainPatchcore(str(bundle), references=references)


def test_predicting_without_references_says_what_to_do(bundle, folder, tmp_path):
    with pytest.raises(InputError, match="no reference is set"):
        predict(engine(tmp_path), make(ADPretrainFeatureNorm, bundle), folder)


@pytest.mark.parametrize(
    ("detector", "all_patches"), [(ADPretrainFeatureNorm, {}), (ADPretrainPatchcore, {"coreset_sampling_ratio": 1.0})]
)
@pytest.mark.parametrize("reload", [False, True])
def test_a_second_training_is_as_if_it_were_the_first(detector, all_patches, reload, bundle, folder, tmp_path):
    other, root = write_images(tmp_path / "data"), tmp_path / "runs"
    for file in (other / "train").iterdir():
        texture(100 + int(file.stem)).save(file)
    (model, fresh), run = (make(detector, bundle, **all_patches) for _ in range(2)), engine(root)
    run.fit(model, datamodule=datamodule(other))
    if reload:
        model = detector.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    for one in (model, fresh):
        engine(root).fit(one, datamodule=datamodule(folder))
    assert model.features.names == fresh.features.names
    torch.testing.assert_close(predict(run, model, folder), predict(run, fresh, folder))


def test_a_training_that_goes_on_keeps_its_references(bundle, folder, tmp_path):
    model, run = make(ADPretrainFeatureNorm, bundle), engine(tmp_path)
    run.fit(model, datamodule=datamodule(folder))
    patches = model.features.extractor.reference.patches[0]
    again, other = make(ADPretrainFeatureNorm, bundle), write_images(tmp_path / "data")
    run = engine(tmp_path, max_epochs=2)
    run.fit(again, datamodule=datamodule(other), ckpt_path=model.trainer.checkpoint_callback.best_model_path)
    assert again.features.names == model.features.names
    assert torch.equal(again.features.extractor.reference.patches[0], patches)


def test_references_that_were_set_stay(bundle, folder, tmp_path):
    model = make(ADPretrainFeatureNorm, bundle)
    model.set_reference(str(folder / "defect"))
    engine(tmp_path).fit(model, datamodule=datamodule(folder))
    assert model.features.extractor.reference.num_images == 5
