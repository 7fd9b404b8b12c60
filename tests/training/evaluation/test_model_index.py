"""Results in a model card: what is claimed is what was measured, and the rest of the card stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.model_card import card_text
from tests.conftest import BUNDLE
from tests.training.evaluation.made_up import made_up_cell, made_up_result, made_up_shown, result_of
from training.evaluation.model_index import export_card
from training.evaluation.results import Result, save_result

SCORES = {"angle": {"img_auc": 0.98765, "pix_pro": 0.91}}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    shutil.copy(BUNDLE / "README.md", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def save(folder: Path, *results: Result) -> None:
    for result in results:
        save_result(folder, result, made_up_shown(result.cell, number=0))


def pretrained(value: float, **cell: Any) -> Result:
    return result_of(made_up_cell(features="pretrained", **cell), value)


def entries(bundle: Path) -> dict[str, float]:
    found = ModelCard((bundle / "README.md").read_text(encoding="utf-8")).data.eval_results
    return {f"{one.dataset_name}, {one.metric_name}": one.metric_value for one in found}


def test_means_over_classes_and_seeds(run: Path, bundle: Path) -> None:
    save(run, *(pretrained(v, category=c, seed=s) for c, s, v in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.8))))
    export_card(run, bundle)
    card = ModelCard((bundle / "README.md").read_text(encoding="utf-8"))
    assert card.data.model_name == "adpretrain-dinov2-small"
    assert len(card.data.eval_results) == 7
    first, *_, last = card.data.eval_results
    assert (first.task_type, first.task_name) == ("image-feature-extraction", "Image anomaly detection")
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("visa", "VisA", "test")
    assert (first.metric_type, first.metric_value, first.verified) == ("roc_auc", 0.7, False)
    assert first.metric_name == (
        "image AUROC, PatchCore, pretrained (angle) features, 8 reference images, 0 % anomalies among the training "
        "images, 100 % of the normal training images, mean of 2 classes and 2 seeds (measured by training.evaluate)"
    )
    assert (last.metric_type, last.metric_name.partition(",")[0]) == ("aupro", "AUPRO")
    kinds = ["roc_auc", "average_precision", "f1"]
    assert [one.metric_type for one in card.data.eval_results] == [*kinds, *kinds, "aupro"]


def test_all_else_is_kept_and_the_hub_takes_it(run: Path, bundle: Path, hub) -> None:
    before = ModelCard((bundle / "README.md").read_text(encoding="utf-8"))
    save(run, pretrained(0.5))
    export_card(run, bundle)
    text = (bundle / "README.md").read_bytes().decode()
    after = ModelCard(text)
    after.validate()
    assert [entry["status"] for entry in hub.log] == [200]
    assert str(after) == text
    assert after.text == before.text
    old, new = before.data.to_dict(), after.data.to_dict()
    assert {name: new[name] for name in old} == old
    assert set(new) - set(old) == {"model-index"}


def test_a_second_time_changes_nothing(run: Path, bundle: Path) -> None:
    save(run, pretrained(0.5), made_up_result(made_up_cell(features="raw")))
    export_card(run, bundle)
    first = (bundle / "README.md").read_bytes()
    export_card(run, bundle)
    assert (bundle / "README.md").read_bytes() == first


def test_newer_numbers_take_the_place_of_older_ones_on_the_same_data(tmp_path: Path, bundle: Path) -> None:
    save(tmp_path / "1", pretrained(0.5), pretrained(0.6, data_set="btad"), pretrained(0.1, detector="padim"))
    save(tmp_path / "2", pretrained(0.7), pretrained(0.8, data_set="mpdd"))
    export_card(tmp_path / "1", bundle)
    export_card(tmp_path / "2", bundle)
    found = {name.partition(", ")[0]: value for name, value in entries(bundle).items()}
    assert found == {"VisA": 0.7, "BTAD": 0.6, "MPDD": 0.8}
    assert len(entries(bundle)) == 21


def test_what_others_reported_stays_apart(run: Path, bundle: Path) -> None:
    config = ADPretrainConfig.preset("dinov2-large", reported_scores=SCORES)
    (bundle / "README.md").write_text(card_text(config), encoding="utf-8")
    (before,) = ModelCard(card_text(config)).data.to_dict()["model-index"]
    save(run, pretrained(0.5, data_set="mvtecad"))
    for _ in range(2):
        export_card(run, bundle)
        (after,) = ModelCard((bundle / "README.md").read_text(encoding="utf-8")).data.to_dict()["model-index"]
        assert after["name"] == before["name"]
        assert after["results"][0] == before["results"][0]
        assert len(after["results"]) == 2 and "source" not in after["results"][1]
        assert len(after["results"][1]["metrics"]) == 7


def test_only_pretrained_features_are_claimed_and_only_what_was_measured(run: Path, bundle: Path) -> None:
    no_masks = made_up_result(made_up_cell(features="pretrained", data_set="folder"), masks=False)
    save(run, no_masks, *(result_of(made_up_cell(features=kind), 0.9) for kind in ("raw", "residual")))
    export_card(run, bundle)
    found = entries(bundle)
    assert len(found) == 3
    assert all("image " in name and "pretrained (angle)" in name for name in found)


def test_other_line_ends_are_kept(run: Path, bundle: Path) -> None:
    text = (bundle / "README.md").read_bytes().replace(b"\n", b"\r\n")
    (bundle / "README.md").write_bytes(text)
    save(run, pretrained(0.5))
    export_card(run, bundle)
    after = (bundle / "README.md").read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") > text.count(b"\n")
    assert after.endswith(text.partition(b"\r\n---\r\n")[2])


def test_without_pretrained_features(run: Path, bundle: Path) -> None:
    save(run, made_up_result(made_up_cell(features="raw")))
    before = (bundle / "README.md").read_bytes()
    with pytest.raises(InputError, match="no finished cells with pretrained features: run some, then export again"):
        export_card(run, bundle)
    assert (bundle / "README.md").read_bytes() == before


def test_without_a_card(run: Path, tmp_path: Path) -> None:
    save(run, pretrained(0.5))
    with pytest.raises(BundleError, match=r"has no README\.md: expected the folder of a bundle, with its model card"):
        export_card(run, tmp_path)


@pytest.mark.parametrize("front", ["- a list", "model-index: 3", "a: [", "model-index:\n- name: x"])
def test_a_card_that_cannot_be_read(run: Path, bundle: Path, front: str) -> None:
    (bundle / "README.md").write_text(f"---\n{front}\n---\n\n# Title\n", encoding="utf-8")
    save(run, pretrained(0.5))
    with pytest.raises(BundleError, match=r"the front matter of .*README\.md cannot be read.*Mend it, then export"):
        export_card(run, bundle)
