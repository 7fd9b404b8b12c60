"""anomalib for real: every detector on our features, from fitting to a checkpoint and an export."""

from __future__ import annotations

import inspect
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import BundleError, InputError
from tests.conftest import BUNDLE, PHOTOS, random_image

pytest.importorskip("anomalib")
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.models import AnomalibModule
from anomalib.models.components import KCenterGreedy

from adpretrain_hf.integrations.anomalib import (
    ADPretrainCflow,
    ADPretrainFeatureNorm,
    ADPretrainGlass,
    ADPretrainPadim,
    ADPretrainPatchcore,
    ADPretrainUniad,
)
from adpretrain_hf.integrations.anomalib.core_set import CoreSet
from tests.integrations.anomalib_data import datamodule, engine, predict, write_images
from tests.integrations.conftest import save_two_variants

# Small, for the tests; what is not named is the default.
DETECTORS = {
    ADPretrainPatchcore: {"coreset_sampling_ratio": 0.5},
    ADPretrainPadim: {"n_features": 20},
    ADPretrainCflow: {"coupling_blocks": 2, "fiber_batch_size": 16},
    ADPretrainGlass: {"step": 2, "discriminator_hidden": 16},
    ADPretrainUniad: {"hidden_dim": 32, "num_layers": 1},
    ADPretrainFeatureNorm: {},
}
each_detector = pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.__name__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def small_bundle(tiny_folder, tmp_path_factory):
    """Of two levels: an exporter's time is in proportion to the operations of the graph."""
    return save_two_variants(tiny_folder, tmp_path_factory.mktemp("small_bundle"), layers=(1, 2))


def make(detector, bundle, **settings):
    quiet = {"evaluator": False, "visualizer": False}
    return detector(str(bundle), **DETECTORS[detector] | quiet | {"references": 4} | settings)


@each_detector
def test_fits_tests_predicts_and_reloads_with_equal_scores(detector, bundle, folder, tmp_path):
    run = engine(tmp_path)
    drawn = detector is ADPretrainPatchcore  # all are drawn by the same code, which takes seconds
    model = make(detector, bundle, evaluator=True, visualizer=drawn)
    run.fit(model, datamodule=datamodule(folder))
    results = run.test(model, datamodule=datamodule(folder), verbose=False)
    assert 0 <= results[0]["image_AUROC"] <= 1 + 1e-6
    maps, scores = predict(run, model, folder)
    assert maps.shape == (9, 32, 32)
    assert maps.isfinite().all()
    assert maps.std() > 0
    checkpoint = run.trainer.checkpoint_callback.best_model_path
    again = detector.load_from_checkpoint(checkpoint)
    for model_again, settings in ((again, {}), (make(detector, bundle), {"ckpt_path": checkpoint})):
        maps_again, scores_again = predict(engine(tmp_path), model_again, folder, **settings)
        assert torch.equal(maps, maps_again)
        assert torch.equal(scores, scores_again)


@each_detector
@pytest.mark.parametrize("kind", ["raw", "residual"])
def test_other_features_are_one_argument(detector, kind, bundle, folder, tmp_path):
    model = make(detector, bundle, features=kind)
    run = engine(tmp_path)
    run.fit(model, datamodule=datamodule(folder))
    assert model.features.kind == kind
    assert predict(run, model, folder)[0].isfinite().all()


@each_detector
def test_hyperparameters_are_the_arguments(detector, bundle):
    """Anomalib's constructors have others, which ours could not be given back."""
    model = make(detector, bundle, levels=[2, 4], features="residual")
    given = {"bundle": str(bundle), "levels": [2, 4], "features": "residual", "references": 4} | DETECTORS[detector]
    assert given.items() <= model.hparams.items()
    own = set(inspect.signature(detector).parameters) - {"common"}
    assert set(model.hparams) == own | {"variant", "levels", "features", "references", "image_size", "resize_mode"}
    assert (model.hparams["image_size"], model.hparams["resize_mode"]) == (32, "crop")
    again = detector(**model.hparams, evaluator=False, visualizer=False)
    assert again.features.layers == ["layer2", "layer4"]
    assert again.hparams == model.hparams


def test_another_size_and_whole_images_are_arguments_that_are_kept(bundle, tmp_path):
    for place in range(3):
        random_image(place, 96, 48).save(tmp_path / f"{place}.png")
    model = make(ADPretrainFeatureNorm, bundle, references=str(tmp_path), image_size=48, resize_mode="resize")
    batches = engine(tmp_path / "run").predict(model, data_path=str(tmp_path))
    assert {batch.anomaly_map.shape[-2:] for batch in batches} == {(48, 96)}
    assert (model.hparams["image_size"], model.hparams["resize_mode"]) == (48, "resize")


@each_detector
def test_unknown_arguments_are_refused(detector, bundle):
    expected = rf"{detector.__name__}.__init__\(\) got an unexpected keyword argument 'backbone'"
    with pytest.raises(TypeError, match=expected):
        make(detector, bundle, backbone="resnet18")


def test_anomalibs_configuration_files_name_a_detector(bundle, tmp_path):
    arguments = {"bundle": str(bundle), "levels": [2, 4], "num_neighbors": 2, "visualizer": False}
    model = {"class_path": "adpretrain_hf.integrations.anomalib.ADPretrainPatchcore", "init_args": arguments}
    (tmp_path / "model.yaml").write_text(json.dumps({"model": model}))
    detector = AnomalibModule.from_config(tmp_path / "model.yaml")
    assert detector.features.layers == ["layer2", "layer4"]
    assert (detector.model.num_neighbors, detector.visualizer, detector.hparams.references) == (2, None, 8)


def test_defaults_are_the_published_protocol(bundle):
    four = [1, 2, 3, 4]
    expected = {
        ADPretrainPatchcore: ("angle", four[-3:]),
        ADPretrainPadim: ("angle", four),
        ADPretrainCflow: ("norm", four[-3:]),
        ADPretrainGlass: ("norm", four[-2:]),
        ADPretrainUniad: ("norm", four),
        ADPretrainFeatureNorm: ("norm", four),
    }
    for detector, (variant, levels) in expected.items():
        model = detector(str(bundle), **DETECTORS[detector])
        assert model.features.extractor.variant == variant
        assert model.features.layers == [f"layer{level}" for level in levels]
    assert ADPretrainPatchcore(str(bundle)).coreset_sampling_ratio == 0.1


def test_feature_norm_scores_are_the_extractors(bundle, folder, tmp_path):
    model = ADPretrainFeatureNorm(str(bundle), references=str(folder / "train"), post_processor=False, visualizer=False)
    maps, scores = predict(engine(tmp_path), model, folder)
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, variant="norm").set_reference(folder / "train")
    files = sorted(folder.glob("defect/*")) + sorted(folder.glob("normal_test/*"))
    expected = list(extractor.score_stream(files, progress=False))
    torch.testing.assert_close(maps, torch.stack([one.anomaly for one in expected]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, torch.tensor([one.score for one in expected]), atol=1e-5, rtol=1e-4)


def write_awkward(folder: Path) -> Path:
    """One picture as files that readers take differently."""
    picture = random_image(5, 64, 64)
    grey, folder = picture.convert("L"), folder / "awkward"
    folder.mkdir()
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "16bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif, quality=95)
    picture.quantize(16).save(folder / "palette.png")
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tri(64, dtype=np.uint8) * 255))
    clear.save(folder / "clear.png")
    picture.convert("CMYK").save(folder / "cmyk.tif")
    picture.save(folder / "plain.png")
    grey.save(folder / "grey.bmp")
    return folder


def test_files_are_read_as_score_reads_them(bundle, folder, tmp_path):
    awkward, references = write_awkward(tmp_path), str(folder / "train")
    model = make(ADPretrainFeatureNorm, bundle, references=references, post_processor=False)
    batches = engine(tmp_path).predict(model, data_path=str(awkward))
    got = {
        Path(path).name: float(score) for b in batches for path, score in zip(b.image_path, b.pred_score, strict=True)
    }
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, variant="norm").set_reference(folder / "train")
    for name, score in got.items():
        assert score == pytest.approx(float(extractor.score(awkward / name).scores), rel=1e-4), name
    assert len(got) == len(list(awkward.iterdir()))


def test_a_relative_bundle_is_found_from_elsewhere(bundle, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(bundle).parent)
    model = make(ADPretrainFeatureNorm, Path(bundle).name)
    assert model.hparams["bundle"] == str(Path(bundle).resolve())
    run = engine(tmp_path)
    run.fit(model, datamodule=datamodule(folder))
    path = run.trainer.checkpoint_callback.best_model_path
    monkeypatch.chdir(tmp_path)
    assert ADPretrainFeatureNorm.load_from_checkpoint(path).hparams["bundle"] == str(Path(bundle).resolve())


def test_a_bundle_of_one_variant_serves_every_detector(tiny_folder, tmp_path, caplog):
    ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), image_size=32, num_reference_tokens=8).save_pretrained(
        tmp_path / "new"
    )
    model = make(ADPretrainFeatureNorm, tmp_path / "new")
    assert model.features.extractor.variant == model.hparams["variant"] == "angle"
    assert "has no variant 'norm', which is published for ADPretrainFeatureNorm: taking 'angle'" in caplog.text
    with pytest.raises(BundleError, match="has no variant 'norm'"):
        make(ADPretrainFeatureNorm, tmp_path / "new", variant="norm")


def test_bundle_must_be_a_string(extractor):
    with pytest.raises(InputError, match="expected the id of a repository or a folder, as a string"):
        ADPretrainPatchcore(extractor)


@pytest.mark.parametrize(
    ("detector", "setting", "expected"),
    [
        (ADPretrainPadim, {"n_features": 129}, "a number from 1 to the levels' 128 channels"),
        (ADPretrainPadim, {"n_features": "x"}, "a number from 1 to the levels' 128 channels"),
        (ADPretrainPatchcore, {"coreset_sampling_ratio": 7}, r"a number in \(0, 1\]"),
        (ADPretrainPatchcore, {"num_neighbors": 0}, "an integer >= 1"),
        (ADPretrainCflow, {"lr": "abc"}, "a number > 0"),
        (ADPretrainCflow, {"condition_vector": 6}, "a multiple of 4"),
        (ADPretrainGlass, {"discriminator_hidden": 1.5}, "an integer >= 1"),
        (ADPretrainGlass, {"svd": 2}, "0 or 1"),
        (ADPretrainUniad, {"lr": float("nan")}, "a number > 0"),
    ],
)
def test_settings_out_of_their_range_are_refused(detector, setting, expected, bundle):
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"^{name} is {value!r}, expected {expected}$"):
        detector(str(bundle), **setting)


def test_padim_of_one_image_says_what_it_needs(bundle, folder, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in ("normal_test", "defect", "mask"):
        shutil.copytree(folder / name, tmp_path / "data" / name)
    shutil.copy(folder / "train" / "0.png", tmp_path / "data" / "train")
    with pytest.raises(InputError, match="got 1 training image, expected at least 2: a covariance needs them"):
        engine(tmp_path).fit(make(ADPretrainPadim, bundle), datamodule=datamodule(tmp_path / "data"))


def test_glass_learns_from_normalised_images(bundle, folder, tmp_path):
    """Its centre is the mean embedding of the images as the network sees them."""
    model = make(ADPretrainGlass, bundle, references=str(folder / "train"))
    engine(tmp_path, limit_train_batches=0).fit(model, datamodule=datamodule(folder))
    seen = []
    original = model.model.generate_embeddings
    model.model.generate_embeddings = lambda images, **rest: seen.append(images) or original(images, **rest)
    run = engine(tmp_path)
    run.fit(model, datamodule=datamodule(folder, train_batch_size=8))
    expected = model.features.extractor.preprocess(sorted((folder / "train").iterdir()))
    assert sorted(seen[0].sum(dim=(1, 2, 3)).tolist()) == pytest.approx(sorted(expected.sum(dim=(1, 2, 3)).tolist()))


def test_glass_scales_embeddings_of_any_length_to_one(bundle, folder, tmp_path):
    """So that its noise and distances, which are absolute, mean the same for all features; a checkpoint keeps it."""
    for features in ("raw", "pretrained"):
        model = make(ADPretrainGlass, bundle, features=features)
        engine(tmp_path / features).fit(model, datamodule=datamodule(folder))
        model.features.note_own([str(path) for path in sorted((folder / "train").iterdir())])
        prepared = model.features.extractor.preprocess(sorted((folder / "train").iterdir()))
        embeddings, _ = model.model.generate_embeddings(prepared, evaluation=True)
        assert embeddings.square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)
        assert "model.forward_modules.preadapt_aggregator.1.factor" in model.state_dict()


def test_the_core_set_is_anomalibs_and_its_memory_does_not_grow():
    patches, chosen = torch.randn(200, 300), []
    for kind in (KCenterGreedy, CoreSet):
        torch.manual_seed(0)
        np.random.seed(0)
        sampler = kind(patches, 0.5)
        chosen.append(sampler.select_coreset_idxs())
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 100
    before = sampler.min_distances.data_ptr(), sampler._differences.data_ptr()
    sampler.update_distances(torch.tensor(3))
    assert (sampler.min_distances.data_ptr(), sampler._differences.data_ptr()) == before


@pytest.mark.parametrize(
    "detector",
    [pytest.param(one, marks=[] if one is ADPretrainPatchcore else pytest.mark.slow) for one in DETECTORS],
    ids=[one.__name__ for one in DETECTORS],
)
def test_exports_to_onnx(detector, small_bundle, folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run, model, images, expected = _fitted(detector, small_bundle, folder, tmp_path)
    file = str(run.export(model, ExportType.ONNX, export_root=tmp_path / "onnx"))
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map, atol=2e-4)
    np.testing.assert_allclose(outputs["pred_score"], expected.pred_score, atol=2e-4)
    if detector is ADPretrainPatchcore and find_spec("openvino"):
        _assert_openvino_agrees(file, images, expected)


@each_detector
def test_exports_to_torch(detector, small_bundle, folder, tmp_path):
    run, model, images, expected = _fitted(detector, small_bundle, folder, tmp_path)
    file = run.export(model, ExportType.TORCH, export_root=tmp_path / "torch")
    with torch.no_grad():
        again = torch.load(file, weights_only=False)["model"].eval()(images)
    assert torch.equal(again.anomaly_map, expected.anomaly_map)


@pytest.mark.slow  # OpenVINO agrees with the ONNX file, see above
@pytest.mark.parametrize("detector", [ADPretrainFeatureNorm, ADPretrainPatchcore])
def test_exports_to_openvino(detector, small_bundle, folder, tmp_path):
    pytest.importorskip("openvino")
    run, model, images, expected = _fitted(detector, small_bundle, folder, tmp_path)
    file = run.export(model, ExportType.OPENVINO, export_root=tmp_path / "openvino")
    _assert_openvino_agrees(file, images, expected)


def _fitted(detector, bundle, folder, tmp_path):
    """An engine, a fitted model, images (3, 3, 32, 32), and what the model says of them."""
    run, model = engine(tmp_path), make(detector, bundle)
    run.fit(model, datamodule=datamodule(folder))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return run, model.eval(), images, model(images)


def _assert_openvino_agrees(file, images, expected):
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = {output.get_any_name(): values for output, values in compiled(images.numpy()).items()}
    np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map, atol=2e-4)


def test_photographs_are_told_apart(tmp_path):
    """The embedded bundle under PatchCore, on the bricks: the defects score above the normal images."""
    torch.manual_seed(0)  # the coreset is drawn at random
    root = PHOTOS / "brick"
    data = Folder(
        name="brick",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=["test/crack", "test/scratch", "test/stain"],
        mask_dir=["ground_truth/crack", "ground_truth/scratch", "ground_truth/stain"],
        val_split_mode="same_as_test",
        num_workers=0,
    )
    run = engine(tmp_path, limit_val_batches=0)
    model = ADPretrainPatchcore(str(BUNDLE), image_size=224, visualizer=False)
    run.fit(model, datamodule=data)
    results = run.test(model, datamodule=data, verbose=False)[0]
    assert results["image_AUROC"] > 0.9
    assert results["pixel_AUROC"] > 0.9
