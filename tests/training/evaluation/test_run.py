"""Cells that are run for real: the numbers of other paths, the same again; their metrics and what is shown."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from tests.conftest import GOLDEN, random_image
from tests.training.evaluation.conftest import MakePlan
from tests.training.real_iad_tree import RealIADClass
from training.data.table import Row
from training.evaluation import anomalib_models
from training.evaluation.anomalib_models import fit, image_batches, predict, predict_likelihoods
from training.evaluation.detectors import Padim, PatchCore
from training.evaluation.figures import choose_shown, sample_patches
from training.evaluation.metrics import measure
from training.evaluation.plan import Cell, Plan, plan_cells
from training.evaluation.run import Evaluation
from training.evaluation.store import METRICS, Result, load_failures, load_patches, load_results, load_shown
from training.evaluation.tables import summary

COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")  # of anomalib's models


def run(plan: Plan) -> list[Result]:
    """Runs all cells of a plan."""
    evaluation = Evaluation(plan)
    for group in plan_cells(plan):
        evaluation.run(group)
    evaluation.forget()
    return load_results(plan.output)


def without_time(results: list[Result]) -> list[tuple[object, ...]]:
    return [(one.cell, one.metrics, one.scores, one.is_anomalous, one.names) for one in results]


@pytest.mark.parametrize("detector", ["patchcore", "uniad"])
def test_raw_features_are_fitted_once_for_all_numbers_of_references(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    """Their cells are what each of them gives on its own."""
    fitted, fit_and_test = [], Evaluation._fit_and_test
    monkeypatch.setattr(Evaluation, "_fit_and_test", lambda *a: fitted.append(a) or fit_and_test(*a))
    plan = make_plan(detectors=detector, features=["raw", "residual"], shots=[1, 2, 3], epochs={"uniad": 1})
    results = run(plan)
    raw = [one for one in results if one.cell.features == "raw"]
    groups = {(one.cell.data_set, one.cell.category if detector == "patchcore" else "") for one in results}
    assert len(fitted) == len(groups) * (1 + 3)  # once raw, and residual for each number
    assert {one.cell.shots for one in raw} == {1, 2, 3}
    alone = run(replace(plan, output=f"{plan.output}-alone", features=("raw",), shots=(3,)))
    assert without_time(alone) == without_time([one for one in raw if one.cell.shots == 3])
    for one in raw:
        assert len(load_shown(plan.output, one.cell).indices)


@pytest.mark.parametrize("variant", ["angle", "norm"])
def test_feature_norm_is_what_the_extractor_scores(make_plan: MakePlan, variant: str) -> None:
    # One image at a time everywhere: in other company the last bit of a sum may differ.
    plan = make_plan(features="pretrained", variants=variant, categories="nut", batch_size=1)
    (result,) = run(plan)
    root = Path(plan.data["mvtecad"])
    extractor = ADPretrainFeatureExtractor.from_pretrained(plan.bundle, variant=variant)
    drawn = Evaluation(plan).draw(result.cell)
    extractor.set_reference([str(sample.image) for sample in drawn.references], batch_size=1)
    scored = list(extractor.score_stream([root / name for name in result.names], batch_size=1, progress=False))
    assert result.scores == [one.score for one in scored]
    shown = load_shown(plan.output, result.cell)
    assert len(shown.indices) == 4
    for place, anomaly in zip(shown.indices, shown.maps, strict=True):
        assert np.array_equal(anomaly, scored[place].anomaly.numpy().astype(np.float16))


def picture(path: str) -> bytes:
    """An image, or the mask of a square in it."""
    image, data = random_image(zlib.crc32(path.encode()), 40, 40), io.BytesIO()
    if path.endswith(".png"):
        image = Image.new("L", (40, 40))
        image.paste(255, (12, 12, 26, 26))
    image.save(data, "PNG" if path.endswith(".png") else "JPEG")
    return data.getvalue()


def test_few_shot_tests_each_view_on_all_its_images_but_the_references(make_plan: MakePlan, tmp_path: Path) -> None:
    made = RealIADClass("nut", normals=6, samples=3)  # its third view shows no defect
    made.files = {path: picture(path) for path in made.files}
    made.write_folder(tmp_path / "realiad")
    made.write_json(tmp_path / "realiad")
    data = {"realiad": str(tmp_path / "realiad")}
    plan = make_plan(data=data, protocol="few-shot", shots=[3], seeds=[0, 1], features="pretrained", batch_size=1)
    results = run(plan)
    assert [(one.cell.view, one.cell.seed) for one in results] == [("C1", 0), ("C2", 0), ("C1", 1), ("C2", 1)]
    extractor = ADPretrainFeatureExtractor.from_pretrained(plan.bundle, variant="norm")
    for result in results:
        drawn = Evaluation(plan).draw(result.cell)
        assert len(result.scores) == 6 - 3 + 3 and all(f"_{result.cell.view}_" in name for name in result.names)
        extractor.set_reference([sample.image for sample in drawn.references], batch_size=1)
        images = [tmp_path / "realiad" / name for name in result.names]
        scored = extractor.score_stream(images, batch_size=1, progress=False)
        assert result.scores == [one.score for one in scored]
    (means, of_class) = summary(results)
    assert means["image_auroc"] == pytest.approx(np.mean([one.metrics["image_auroc"] for one in results]))
    assert of_class["category"] == "nut" and of_class["seeds"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shots": [1, 4]}, "shots: the protocol few-shot takes each reference against the others, expected >= 2"),
        ({"references": "lists.json"}, "references: the protocol few-shot draws its own, by the seed"),
        ({"noise": [0.1]}, "noise and fraction are of training images, of which the protocol few-shot takes none"),
    ],
)
def test_few_shot_refuses_what_it_has_no_use_for(make_plan: MakePlan, changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(protocol="few-shot", **changed)


def test_a_cell_says_what_was_tested(make_plan: MakePlan) -> None:
    plan = make_plan(features="raw", categories="bolt")
    (result,) = run(plan)
    assert sum(result.is_anomalous) == 4
    assert [name.startswith("bolt/test/dent/") for name in result.names] == result.is_anomalous
    assert len(set(result.names)) == 7
    assert len(result.metrics) == 7
    assert result.seconds > 0
    (patches,) = load_patches(plan.output)
    assert patches.values.shape == (7 * 16, 64)
    assert 0 < patches.is_anomalous.sum() < 7 * 8


@pytest.mark.parametrize("detector", ["anomalib_patchcore", "anomalib_padim"])
def test_detectors_score_as_without_tokens_that_are_kept(make_plan: MakePlan, detector: str) -> None:
    """The cell's scores are those of the model that anyone would write."""
    from adpretrain_hf.integrations.anomalib import ADPretrainPadim, ADPretrainPatchcore

    plan = make_plan(features="pretrained", categories="nut", detectors=detector)
    evaluation = Evaluation(plan)
    ((cell,),) = plan_cells(plan)
    evaluation.run((cell,))
    drawn = evaluation.draw(cell)
    seed_everything(0, verbose=False)
    kind = {"anomalib_patchcore": ADPretrainPatchcore, "anomalib_padim": ADPretrainPadim}[detector]
    model = kind(plan.bundle, **dict.fromkeys(COMPONENTS, False))
    paths = [str(sample.image) for sample in drawn.references]
    model.set_reference(paths, paths)
    preprocess, device = evaluation.extractor.preprocess, torch.device("cpu")
    train = image_batches(drawn.train, preprocess, plan.batch_size, 0, shuffle=True)
    fit(model, train, epochs=1, device=device)
    _, scores = predict(model, image_batches(drawn.test, preprocess, plan.batch_size, 0), device=device)
    (result,) = load_results(plan.output)
    assert result.scores == pytest.approx(scores.tolist(), rel=1e-4)


@pytest.mark.parametrize(("detector", "kind"), [("patchcore", PatchCore), ("padim", Padim)])
def test_the_papers_detectors_are_the_published_ones(make_plan: MakePlan, detector: str, kind: type) -> None:
    plan = make_plan(features="pretrained", categories="nut", detectors=detector)
    (result,) = run(plan)
    drawn, root = Evaluation(plan).draw(result.cell), Path(plan.data["mvtecad"])
    extractor = ADPretrainFeatureExtractor.from_pretrained(plan.bundle, variant="angle")
    references = [str(sample.image) for sample in drawn.references]
    bank = extractor.set_reference(references).reference
    own = [references.index(path) if path in references else None for path in (str(s.image) for s in drawn.train)]
    tokens = extractor.encode(extractor.preprocess([sample.image for sample in drawn.train]))
    fitted = kind()
    with torch.no_grad():
        fitted.fit(extractor.projectors(extractor.residuals(tokens, bank, own=own)))
        features = extractor([root / name for name in result.names])
        _, scores = fitted.score(list(features.values()), (32, 32))
    assert result.scores == pytest.approx(scores.tolist(), rel=1e-3)


def test_the_same_plan_gives_the_same_numbers(make_plan: MakePlan, tmp_path: Path) -> None:
    detectors = ["featurenorm", "padim"]
    first = run(make_plan(detectors=detectors, categories="nut"))
    # Backwards, in other company: what is remembered and what is computed is another.
    plan = make_plan(detectors=detectors, categories="nut", output=str(tmp_path / "again"))
    evaluation = Evaluation(plan)
    for group in reversed(plan_cells(plan)):
        evaluation.run(group)
    assert without_time(load_results(plan.output)) == without_time(first)


def test_seeds_draw_other_references(make_plan: MakePlan) -> None:
    zero, one = run(make_plan(features="residual", categories="nut", seeds=[0, 1]))
    assert zero.scores != one.scores


def test_references_may_be_listed(make_plan: MakePlan, small_tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    listed = [str(small_tree / f"nut/train/good/00{number}.png") for number in (4, 1, 0)]
    file.write_text(json.dumps({"nut": listed}))
    plan = make_plan(references=str(file), shots=2, features="residual")
    evaluation = Evaluation(plan)
    (bolt,), (nut,) = plan_cells(plan)
    drawn = evaluation.draw(nut)
    assert [str(sample.image) for sample in drawn.references] == listed[:2]
    with pytest.raises(InputError, match="lists.json lists no references for the category bolt"):
        evaluation.run((bolt,))


def test_lists_go_by_data_set_where_two_have_a_category(make_plan: MakePlan, small_tree: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(small_tree, tmp_path / "tree")
    file, own = tmp_path / "lists.json", [str(tree / f"nut/train/good/00{number}.png") for number in (4, 1)]
    values = {"references": str(file), "shots": [1, 2], "features": "residual", "categories": "nut"}
    values["data"] = {"mvtecad": str(small_tree), "mpdd": str(tree)}
    file.write_text(json.dumps({"nut": own}))
    with pytest.raises(InputError, match="for nut, which mpdd and mvtecad have: name them mpdd/nut and so on"):
        run(make_plan(**values))
    file.write_text(json.dumps({"mpdd/nut": own, "mvtecad/nut": [str(small_tree / "nut/train/good/000.png")]}))
    with pytest.raises(InputError, match="mvtecad__nut__.*__2__.* has 1 references, fewer than 2 shots"):
        run(make_plan(**values))  # after the cell of one shot, which the list is long enough for
    done = [(one.cell.data_set, one.cell.shots) for one in load_results(make_plan(**values).output)]
    assert done == [("mpdd", 1), ("mpdd", 2), ("mvtecad", 1)]
    file.write_text(json.dumps({"mpdd/nut": own, "mvtecad/nut": own}))
    assert len(run(make_plan(**values, output=str(tmp_path / "other")))) == 4


def test_images_of_one_shape_need_not_be_square(make_plan: MakePlan, tmp_path: Path) -> None:
    for name in ("train/good/0", "train/good/1", "test/good/0", "test/bad/0"):
        (tmp_path / "tree/nut" / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(len(name), 40, 60).save(tmp_path / "tree/nut" / f"{name}.png")
    data = {"folder": str(tmp_path / "tree")}
    plan = make_plan(data=data, features="raw", shots=[2], image_size=64, resize_mode="resize")
    (result,) = run(plan)
    assert load_shown(plan.output, result.cell).images.shape == (1, 96, 64, 3)


def test_a_training_batch_leaves_no_trace_in_features_of_several_categories(two_variants: Path) -> None:
    from adpretrain_hf.integrations.anomalib import DetectorFeatures

    extractor = ADPretrainFeatureExtractor.from_pretrained(two_variants)
    images = torch.randn(4, 3, 32, 32)
    bank, names = extractor.make_reference(images[:3]), ["a.png", "b.png", "c.png"]
    own = DetectorFeatures(extractor, "residual")
    features = anomalib_models.CategoryFeatures(own, dict.fromkeys(names, (bank, names)))
    features.set_reference(bank, names)
    before = features(images[3:])
    features.note_own(names)
    trained = features(images[:3])
    features.note_own([])
    for name, level in features(images[3:]).items():
        assert torch.equal(level, before[name])
    assert all(level.abs().amax() > 0.1 for level in trained.values())  # each was compared with the others
    assert all(level.abs().amax() < 1e-5 for level in features(images[:3]).values())


def test_the_scale_of_residuals_decides(make_plan: MakePlan) -> None:
    evaluation = Evaluation(make_plan())
    before = evaluation.identity([])
    scale = tuple(2 * one for one in evaluation.extractor.config.residual_scale)
    evaluation.extractor.config = evaluation.extractor.config.replace(residual_scale=scale)
    assert evaluation.identity([]) != before


def test_references_may_lie_elsewhere(make_plan: MakePlan, small_tree: Path, tmp_path: Path) -> None:
    """Of every number of shots all are encoded, whichever is run first."""
    for number in range(2):
        shutil.copy(small_tree / f"nut/train/good/00{number}.png", tmp_path / f"{number}.png")
    (tmp_path / "lists.json").write_text(json.dumps({"nut": ["0.png", "1.png"]}))
    values = {"references": str(tmp_path / "lists.json"), "features": "residual", "categories": "nut"}
    elsewhere = run(make_plan(shots=[1, 2], **values))
    (tmp_path / "lists.json").write_text(
        json.dumps({"nut": [str(small_tree / f"nut/train/good/00{number}.png") for number in range(2)]})
    )
    own = run(make_plan(shots=[1, 2], output=str(tmp_path / "own"), **values))
    assert [one.cell.shots for one in elsewhere] == [1, 2]
    assert [one.scores for one in elsewhere] == [one.scores for one in own]


def test_finished_cells_are_left_alone(make_plan: MakePlan) -> None:
    plan = make_plan(features="raw")
    run(plan)
    files = {file: file.stat().st_mtime_ns for file in Path(plan.output).rglob("*") if file.is_file()}
    run(make_plan(features=["raw", "residual"]))
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert len(load_results(plan.output)) == 4


def test_without_masks_images_are_measured_alone(make_plan: MakePlan, small_tree: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(small_tree, tmp_path / "tree", ignore=shutil.ignore_patterns("ground_truth"))
    plan = make_plan(features="raw", categories="nut", data={"folder": str(tree)})
    (result,) = run(plan)
    assert set(result.metrics) == {"image_auroc", "image_ap", "image_f1"}
    assert load_patches(plan.output) == []
    assert not load_shown(plan.output, result.cell).masks.any()


def test_an_image_that_cannot_be_used_costs_the_cells_of_its_category(
    make_plan: MakePlan, small_tree: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(small_tree, tmp_path / "tree")
    plan = make_plan(features="raw", data={"mvtecad": str(tree)})
    for image in (tree / "bolt/test/good").iterdir():
        image.write_bytes(b"torn")
    run(plan)
    assert [result.cell.category for result in load_results(plan.output)] == ["nut"]
    ((cell, reason),) = load_failures(plan.output).items()
    assert cell.category == "bolt" and re.search(r"^ImageError: .*bolt/test/good/00\d\.png cannot be read", reason)


def test_why_a_cell_failed_names_the_settings_that_it_had(make_plan: MakePlan) -> None:
    plan = make_plan(detectors="uniad", features="raw", set={"uniad": {"jitter_scale": "abc"}})
    run(plan)
    assert all(
        reason.endswith("(with the settings {'jitter_scale': 'abc'})") for reason in load_failures(plan.output).values()
    )
    assert len(load_failures(plan.output)) == 2


def test_each_seed_has_a_core_set_of_its_own(make_plan: MakePlan) -> None:
    plan = make_plan(detectors="patchcore", features="raw", categories="nut", seeds=[0, 1])
    run(plan)
    first, second = load_results(plan.output)
    assert first.scores != second.scores


def test_interruptions_come_through_lightning(make_plan: MakePlan) -> None:
    from training.evaluation.anomalib_models import quietly

    def exit_as_lightning_does() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    with pytest.raises(KeyboardInterrupt), quietly():
        exit_as_lightning_does()
    with pytest.raises(SystemExit), quietly():
        raise SystemExit(1)


def test_glass_paints_with_textures_of_the_other_categories(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[Path]] = []
    give = anomalib_models.give_textures
    monkeypatch.setattr(
        anomalib_models, "give_textures", lambda model, images: given.append(images) or give(model, images)
    )
    plan = make_plan(detectors="glass", features="raw", categories="nut", epochs={"glass": 1})
    run(plan)
    (images,) = given
    assert images == [Path(plan.data["mvtecad"]).absolute() / f"bolt/train/good/{place:03}.png" for place in range(6)]


def test_textures_are_of_categories_and_formats_that_can_be_read(
    make_plan: MakePlan, small_tree: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(small_tree, tmp_path / "tree")
    (tree / "empty" / "test" / "good").mkdir(parents=True)
    image = tree / "bolt/train/good/000.png"
    Image.open(image).save(image.with_suffix(".bmp"))
    image.unlink()
    data = {"mvtecad": str(tree)}
    (result,) = run(make_plan(data=data, detectors="glass", features="raw", categories="nut", epochs={"glass": 1}))
    assert len(result.scores) == 7


def test_textures_do_not_replace_those_that_were_chosen(two_variants: Path, tmp_path: Path) -> None:
    from adpretrain_hf.integrations.anomalib import ADPretrainGlass

    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        random_image(0, 40, 40).save(tmp_path / name / "0.png")
    chosen, without = (
        ADPretrainGlass(str(two_variants), anomaly_source_path=one) for one in (str(tmp_path / "own"), None)
    )
    for model, expected in ((chosen, "own"), (without, "other")):
        anomalib_models.give_textures(model, [tmp_path / "other" / "0.png"])
        (generator,) = (one for one in model.modules() if isinstance(one, PerlinAnomalyGenerator))
        assert generator.anomaly_source_paths == [tmp_path / expected / "0.png"]


def test_likelihoods_in_batches_are_those_of_one_batch(make_plan: MakePlan) -> None:
    """anomalib's own scores of all test images at once, whatever is in a batch here."""
    from adpretrain_hf.integrations.anomalib import ADPretrainCflow

    plan = make_plan(detectors="cflow", features="raw", categories="nut")
    evaluation = Evaluation(plan)
    ((cell,),) = plan_cells(plan)
    drawn = {cell: evaluation.draw(cell)}
    samples, cpu = drawn[cell].test, torch.device("cpu")
    seed_everything(0, verbose=False)
    model = ADPretrainCflow(plan.bundle, features="raw", **dict.fromkeys(COMPONENTS, False))
    model.set_reference([str(sample.image) for sample in drawn[cell].references])
    preprocess = evaluation.extractor.preprocess
    fit(model, image_batches(drawn[cell].train, preprocess, plan.batch_size, 0), epochs=1, device=cpu)
    whole = predict(model, image_batches(samples, preprocess, len(samples), 0), device=cpu)
    for size in (1, 3):
        batched = predict_likelihoods(model, image_batches(samples, preprocess, size, 0), device=cpu)
        for got, expected in zip(batched, whole, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    again = predict(model, image_batches(samples, preprocess, len(samples), 0), device=cpu)
    assert np.array_equal(again[0], whole[0])  # anomalib's maps are back in place


@pytest.mark.parametrize("detector", ["cflow", "glass"])
def test_trained_detectors_give_the_same_again(make_plan: MakePlan, tmp_path: Path, detector: str) -> None:
    settings = {"detectors": detector, "categories": "nut", "features": "pretrained"}
    settings |= {"epochs": {detector: 1}, "batch_size": 6}
    first = run(make_plan(**settings))
    again = run(make_plan(**settings, output=str(tmp_path / "again")))
    assert without_time(first) == without_time(again)
    assert len(first[0].metrics) == 7


def test_one_model_serves_all_categories(make_plan: MakePlan, tmp_path: Path) -> None:
    settings = {"detectors": "uniad", "features": ["residual"], "epochs": {"uniad": 2}}
    plan = make_plan(**settings)
    first = run(plan)
    assert [one.cell.category for one in first] == ["bolt", "nut"]
    assert {name.split("/")[0] for name in first[1].names} == {"nut"}
    # Where one cell is missing, the model is fitted on all categories again.
    cells = Path(plan.output, "cells")
    for file in cells.glob("*nut*"):
        file.unlink()
    assert without_time(run(plan)) == without_time(first)


# Metrics of a cell: the authors', and the images that are shown are the best and the worst


CELL = Cell("folder", "nut", "patchcore", "raw", "", 8, 0.0, 1.0, 0)
SIDE = 32


Predicted = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # maps, scores, labels, masks


def predicted(golden: dict[str, Tensor]) -> Predicted:
    maps, masks = golden["metrics.scores"].numpy(), golden["metrics.masks"].bool().numpy()
    return maps, maps.max(axis=(1, 2)), golden["metrics.labels"].bool().numpy(), masks


def test_the_metrics_of_a_cell_are_the_authors(golden: dict[str, Tensor]) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
    got = measure(*predicted(golden))
    assert tuple(got) == METRICS
    names = {name: name.replace("_f1", "_f1max") for name in METRICS if name != "aupro"}
    assert got == pytest.approx(
        {one: expected[name] for one, name in names.items()} | {"aupro": got["aupro"]}, abs=6e-6
    )
    assert got["aupro"] == pytest.approx(expected["aupro30"], abs=0.02)


def test_without_masks_there_are_no_metrics_of_pixels(golden: dict[str, Tensor]) -> None:
    whole = predicted(golden)
    got = measure(*whole[:3], None)
    assert got == {name: value for name, value in measure(*whole).items() if name.startswith("image")}
    assert len(got) == 3


def test_forty_maps_take_seconds() -> None:
    random = np.random.default_rng(0)
    masks = random.random((40, 256, 256)) > 0.97
    maps = (random.random(masks.shape) + 0.3 * masks).astype(np.float32)
    labels = np.arange(40) < 20
    began = time.process_time()
    measure(maps, maps.mean(axis=(1, 2)), labels, masks)
    assert time.process_time() - began < 8


def test_maps_that_are_not_finite_are_refused(golden: dict[str, Tensor]) -> None:
    maps, scores, labels, masks = predicted(golden)
    maps = np.where(masks, np.nan, maps)
    with pytest.raises(InputError, match="NaN or infinite"):
        measure(maps, scores, labels, masks)


# What is shown


@pytest.fixture
def eight_images(tmp_path: Path) -> list[Row]:
    """Two normal and six anomalous images, 48 x 40 px."""
    kept = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        random_image(number).save(path)
        mask, kind = (str(path), "crack") if number > 1 else (None, "good")
        kept.append(Row(str(path), mask, "nut", "", kind, number > 1, number <= 1, path.stem))
    return kept


def of_quality(qualities: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps that find the anomaly of an image as well as its quality says; those without one are normal."""
    masks = np.zeros((len(qualities), SIDE, SIDE), dtype=bool)
    maps = np.random.default_rng(0).random(masks.shape).astype(np.float32)
    for place, quality in enumerate(qualities):
        if not np.isnan(quality):
            masks[place, :8, :8] = True
            maps[place, :8, :8] = quality
    return maps, maps.max(axis=(1, 2)), masks


def test_the_two_best_and_the_two_worst_are_shown(
    extractor: ADPretrainFeatureExtractor, eight_images: list[Row]
) -> None:
    maps, scores, masks = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1, 0.3, 0.7, 0.4])
    shown = choose_shown(maps, scores, masks, eight_images, extractor.preprocess)
    assert shown.indices.tolist() == [3, 6, 5, 4]
    assert np.array_equal(shown.masks, masks[shown.indices])
    assert np.array_equal(shown.maps, maps[shown.indices].astype(np.float16))
    crop = extractor.preprocess.seen(Image.open(eight_images[6].image))
    assert np.array_equal(shown.images[1], np.array(crop))


def test_all_are_shown_where_there_are_few_and_one_that_is_cut_off_is_not(
    extractor: ADPretrainFeatureExtractor, eight_images: list[Row]
) -> None:
    maps, scores, masks = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1])
    masks[2] = False
    few = eight_images[:5]
    assert choose_shown(maps, scores, masks, few, extractor.preprocess).indices.tolist() == [3, 4]
    masks[:] = False
    assert len(choose_shown(maps, scores, masks, few, extractor.preprocess).images) == 0


def test_without_masks_the_scores_say_which_are_found(
    extractor: ADPretrainFeatureExtractor, eight_images: list[Row]
) -> None:
    maps, _, _ = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1, 0.3, 0.7, 0.4])
    scores = np.array([9, 9, 1, 2, 3, 4, 5, 6], dtype=np.float32)
    shown = choose_shown(maps, scores, None, eight_images, extractor.preprocess)
    assert shown.indices.tolist() == [7, 6, 3, 2]
    assert not shown.masks.any()


def test_values_beyond_float16_stay_finite(extractor: ADPretrainFeatureExtractor, eight_images: list[Row]) -> None:
    maps, scores, masks = of_quality([np.nan, np.nan, 0.5, 0.9])
    shown = choose_shown(maps * 1e6, scores, masks, eight_images[:4], extractor.preprocess)
    assert np.isfinite(shown.maps).all()


def test_patches_are_labelled_and_drawn_by_the_seed() -> None:
    features = torch.arange(4 * 16, dtype=torch.float32).view(4, 1, 4, 4).repeat(1, 3, 1, 1)
    masks = np.zeros((4, SIDE, SIDE), dtype=bool)
    masks[1, :8, :8] = masks[2, 24:, 8:16] = True  # patches of 8 px
    got = sample_patches(CELL, features, masks, patch_size=8)
    assert got.values[got.is_anomalous, 0].tolist() == [16, 32 + 13]
    assert sorted(got.values[:, 2].tolist()) == list(range(64))
    many = features.repeat(50, 1, 1, 1)
    some = sample_patches(CELL, many, masks.repeat(50, axis=0), patch_size=8)
    assert (~some.is_anomalous).sum() == 300
    assert some.is_anomalous.sum() == 100
    again = sample_patches(CELL, many, masks.repeat(50, axis=0), patch_size=8)
    assert np.array_equal(some.values, again.values)
