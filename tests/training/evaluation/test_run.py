"""Cells that are run for real: the numbers of other paths, the same again, and one model for all categories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from tests.training.evaluation.conftest import MakePlan
from training.evaluation.fitting import fit, predict, seed
from training.evaluation.plan import Plan
from training.evaluation.plan_cells import plan_cells
from training.evaluation.results import Result, load_patches, load_results, load_shown
from training.evaluation.run import run_cells
from training.evaluation.shared import Shared


def run(plan: Plan) -> list[Result]:
    """Runs all cells of a plan."""
    shared = Shared(plan)
    for group in plan_cells(plan):
        run_cells(shared, group)
    return load_results(plan.output)


def without_time(results: list[Result]) -> list[tuple[object, ...]]:
    return [(one.cell, one.metrics, one.scores, one.is_anomalous, one.names) for one in results]


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
    detectors = ["featurenorm", "patchcore", "padim"]
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


def test_references_may_be_listed(make_plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    listed = [str(tmp_path / f"tree/nut/train/good/00{number}.png") for number in (4, 1, 0)]
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


def test_without_masks_images_are_measured_alone(make_plan: MakePlan) -> None:
    plan = make_plan(features="raw", categories="nut")
    for masks in Path(plan.data["mvtecad"]).glob("*/ground_truth"):
        shutil.rmtree(masks)
    plan = make_plan(features="raw", categories="nut", data={"folder": plan.data["mvtecad"]})
    (result,) = run(plan)
    assert set(result.metrics) == {"image_auroc", "image_ap", "image_f1"}
    assert load_patches(plan.output) == []
    assert not load_shown(plan.output, result.cell).masks.any()


def test_an_error_names_the_cell(make_plan: MakePlan) -> None:
    plan = make_plan(features="raw", categories="nut")
    for image in Path(plan.data["mvtecad"], "nut/test/good").iterdir():
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


@pytest.mark.parametrize("detector", ["cflow", "glass"])
def test_trained_detectors_give_the_same_again(make_plan: MakePlan, tmp_path: Path, detector: str) -> None:
    settings = {"detectors": detector, "categories": "nut", "epochs": {detector: 1}, "batch_size": 6}
    first = run(make_plan(**settings))
    again = run(make_plan(**settings, output=str(tmp_path / "again")))
    assert without_time(first) == without_time(again)
    assert len(first) == 3
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
