"""Cells that are run for real: the numbers of other paths, the same again; their metrics and what is shown."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from tests.conftest import GOLDEN, random_image
from tests.training.evaluation.conftest import MakePlan
from training.evaluation.cells import Cell
from training.evaluation.data_sets import Sample
from training.evaluation.fitting import fit, predict, predict_likelihoods, seed
from training.evaluation.measure import Predicted, measure
from training.evaluation.plan import Plan
from training.evaluation.plan_cells import plan_cells
from training.evaluation.results import METRICS, Result, load_patches, load_results, load_shown
from training.evaluation.run import _model, run_cells
from training.evaluation.shared import Shared
from training.evaluation.shown import choose_shown, sample_patches


def run(plan: Plan) -> list[Result]:
    """Runs all cells of a plan."""
    shared = Shared(plan)
    for group in plan_cells(plan):
        run_cells(shared, group)
    return load_results(plan.output)


def without_time(results: list[Result]) -> list[tuple[object, ...]]:
    return [(one.cell, one.metrics, one.scores, one.is_anomalous, one.names) for one in results]


@pytest.mark.parametrize("detector", ["patchcore", "uniad"])
def test_raw_features_are_fitted_once_for_all_numbers_of_references(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    """Their cells are what each of them gives on its own."""
    fitted = []
    monkeypatch.setattr(
        "training.evaluation.run.fit", lambda model, *a, **k: fitted.append(model) or fit(model, *a, **k)
    )
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
    drawn = Shared(plan).draw(result.cell)
    extractor.set_reference([str(sample.image) for sample in drawn.references], batch_size=1)
    scored = list(extractor.score_stream([root / name for name in result.names], batch_size=1, progress=False))
    assert result.scores == [one.score for one in scored]
    shown = load_shown(plan.output, result.cell)
    assert len(shown.indices) == 4
    for place, anomaly in zip(shown.indices, shown.maps, strict=True):
        assert np.array_equal(anomaly, scored[place].anomaly.numpy().astype(np.float16))


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


@pytest.mark.parametrize("detector", ["patchcore", "padim"])
def test_detectors_score_as_without_memory(make_plan: MakePlan, detector: str) -> None:
    """The cell's scores are those of the model that anyone would write."""
    from adpretrain_hf.integrations.anomalib import ADPretrainPadim, ADPretrainPatchcore

    plan = make_plan(features="pretrained", categories="nut", detectors=detector)
    shared = Shared(plan)
    ((cell,),) = plan_cells(plan)
    run_cells(shared, (cell,))
    drawn = shared.draw(cell)
    seed(0)
    kind = {"patchcore": ADPretrainPatchcore, "padim": ADPretrainPadim}[detector]
    options = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
    model = kind(plan.bundle, **options)
    paths = [str(sample.image) for sample in drawn.references]
    model.set_reference(paths, paths)
    device = torch.device("cpu")
    fit(model, shared.images(drawn.train, plan.batch_size, shuffle=True), epochs=1, device=device)
    _, scores = predict(model, shared.images(drawn.test, plan.batch_size), device=device)
    (result,) = load_results(plan.output)
    assert result.scores == pytest.approx(scores.tolist(), rel=1e-4)


def test_the_same_plan_gives_the_same_numbers(make_plan: MakePlan, tmp_path: Path) -> None:
    detectors = ["featurenorm", "padim"]
    first = run(make_plan(detectors=detectors, categories="nut"))
    # Backwards, in other company: what is remembered and what is computed is another.
    plan = make_plan(detectors=detectors, categories="nut", output=str(tmp_path / "again"))
    shared = Shared(plan)
    for group in reversed(plan_cells(plan)):
        run_cells(shared, group)
    assert without_time(load_results(plan.output)) == without_time(first)


def test_seeds_draw_other_references(make_plan: MakePlan) -> None:
    zero, one = run(make_plan(features="residual", categories="nut", seeds=[0, 1]))
    assert zero.scores != one.scores


def test_references_may_be_listed(make_plan: MakePlan, small_tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    listed = [str(small_tree / f"nut/train/good/00{number}.png") for number in (4, 1, 0)]
    file.write_text(json.dumps({"nut": listed}))
    plan = make_plan(references=str(file), shots=2, features="residual")
    shared = Shared(plan)
    (bolt,), (nut,) = plan_cells(plan)
    drawn = shared.draw(nut)
    assert [str(sample.image) for sample in drawn.references] == listed[:2]
    assert shared.references(drawn.references).names == tuple(listed[:2])
    with pytest.raises(InputError, match="lists.json lists no references for the category bolt"):
        run_cells(shared, (bolt,))


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


def test_an_error_names_the_cell(make_plan: MakePlan, small_tree: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(small_tree, tmp_path / "tree")
    plan = make_plan(features="raw", categories="nut", data={"mvtecad": str(tree)})
    for image in (tree / "nut/test/good").iterdir():
        image.write_bytes(b"torn")
    with pytest.raises(InputError, match=r"mvtecad__nut__featurenorm__raw__-__3__0.0__1.0__0: .*\.png"):
        run(plan)
    assert load_results(plan.output) == []


def test_interruptions_come_through_lightning(make_plan: MakePlan) -> None:
    from training.evaluation.fitting import quietly

    def exit_as_lightning_does() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    with pytest.raises(KeyboardInterrupt), quietly():
        exit_as_lightning_does()
    with pytest.raises(SystemExit), quietly():
        raise SystemExit(1)


def test_likelihoods_in_batches_are_those_of_one_batch(make_plan: MakePlan) -> None:
    """anomalib's own scores of all test images at once, whatever is in a batch here."""
    plan = make_plan(detectors="cflow", features="raw", categories="nut")
    shared = Shared(plan)
    ((cell,),) = plan_cells(plan)
    drawn = {cell: shared.draw(cell)}
    model, samples, cpu = _model(shared, cell, drawn), drawn[cell].test, torch.device("cpu")
    fit(model, shared.images(drawn[cell].train, plan.batch_size), epochs=1, device=cpu)
    whole = predict(model, shared.images(samples, len(samples)), device=cpu)
    for size in (1, 3):
        batched = predict_likelihoods(model, shared.images(samples, size), device=cpu)
        for got, expected in zip(batched, whole, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    again = predict(model, shared.images(samples, len(samples)), device=cpu)
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


def predicted(golden: dict[str, Tensor]) -> Predicted:
    maps, masks = golden["metrics.scores"].numpy(), golden["metrics.masks"].bool().numpy()
    return Predicted(maps, maps.max(axis=(1, 2)), golden["metrics.labels"].bool().numpy(), masks)


def test_the_metrics_of_a_cell_are_the_authors(golden: dict[str, Tensor]) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
    got = measure(predicted(golden))
    assert tuple(got) == METRICS
    names = {name: name.replace("_f1", "_f1max") for name in METRICS if name != "aupro"}
    assert got == pytest.approx(
        {one: expected[name] for one, name in names.items()} | {"aupro": got["aupro"]}, abs=6e-6
    )
    assert got["aupro"] == pytest.approx(expected["aupro30"], abs=0.02)


def test_without_masks_there_are_no_metrics_of_pixels(golden: dict[str, Tensor]) -> None:
    whole = predicted(golden)
    got = measure(Predicted(whole.maps, whole.scores, whole.is_anomalous, None))
    assert got == {name: value for name, value in measure(whole).items() if name.startswith("image")}
    assert len(got) == 3


def test_forty_maps_take_seconds() -> None:
    random = np.random.default_rng(0)
    masks = random.random((40, 256, 256)) > 0.97
    maps = (random.random(masks.shape) + 0.3 * masks).astype(np.float32)
    labels = np.arange(40) < 20
    began = time.process_time()
    measure(Predicted(maps, maps.mean(axis=(1, 2)), labels, masks))
    assert time.process_time() - began < 8


def test_maps_that_are_not_finite_are_refused(golden: dict[str, Tensor]) -> None:
    whole = predicted(golden)
    maps = np.where(whole.masks, np.nan, whole.maps)
    with pytest.raises(InputError, match="NaN or infinite"):
        measure(Predicted(maps, whole.scores, whole.is_anomalous, whole.masks))


# What is shown


@pytest.fixture
def eight_images(tmp_path: Path) -> list[Sample]:
    """Two normal and six anomalous images, 48 x 40 px."""
    kept = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        random_image(number).save(path)
        kept.append(Sample(path, path if number > 1 else None, number > 1, "crack" if number > 1 else "good"))
    return kept


def of_quality(qualities: list[float]) -> Predicted:
    """Maps that find the anomaly of an image as well as its quality says; those without one are normal."""
    masks = np.zeros((len(qualities), SIDE, SIDE), dtype=bool)
    maps = np.random.default_rng(0).random(masks.shape).astype(np.float32)
    for place, quality in enumerate(qualities):
        if not np.isnan(quality):
            masks[place, :8, :8] = True
            maps[place, :8, :8] = quality
    return Predicted(maps, maps.max(axis=(1, 2)), ~np.isnan(qualities), masks)


def test_the_two_best_and_the_two_worst_are_shown(
    extractor: ADPretrainFeatureExtractor, eight_images: list[Sample]
) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1, 0.3, 0.7, 0.4])
    shown = choose_shown(whole, eight_images, extractor.preprocess)
    assert shown.indices.tolist() == [3, 6, 5, 4]
    assert whole.masks is not None
    assert np.array_equal(shown.masks, whole.masks[shown.indices])
    assert np.array_equal(shown.maps, whole.maps[shown.indices].astype(np.float16))
    crop = extractor.preprocess.crop(Image.open(eight_images[6].image))
    assert np.array_equal(shown.images[1], np.array(crop))


def test_all_are_shown_where_there_are_few_and_one_that_is_cut_off_is_not(
    extractor: ADPretrainFeatureExtractor, eight_images: list[Sample]
) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1])
    assert whole.masks is not None
    whole.masks[2] = False
    shown = choose_shown(whole, eight_images, extractor.preprocess)
    assert shown.indices.tolist() == [3, 4]
    whole.masks[:] = False
    assert len(choose_shown(whole, eight_images, extractor.preprocess).images) == 0


def test_without_masks_the_scores_say_which_are_found(
    extractor: ADPretrainFeatureExtractor, eight_images: list[Sample]
) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9, 0.1, 0.3, 0.7, 0.4])
    scores = np.array([9, 9, 1, 2, 3, 4, 5, 6], dtype=np.float32)
    shown = choose_shown(Predicted(whole.maps, scores, whole.is_anomalous, None), eight_images, extractor.preprocess)
    assert shown.indices.tolist() == [7, 6, 3, 2]
    assert not shown.masks.any()


def test_values_beyond_float16_stay_finite(extractor: ADPretrainFeatureExtractor, eight_images: list[Sample]) -> None:
    whole = of_quality([np.nan, np.nan, 0.5, 0.9])
    huge = Predicted(whole.maps * 1e6, whole.scores, whole.is_anomalous, whole.masks)
    assert np.isfinite(choose_shown(huge, eight_images, extractor.preprocess).maps).all()


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
