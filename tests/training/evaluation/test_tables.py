"""Means, paired gains and standard errors against numbers worked out by hand, in tables and in a model card."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from adpretrain_hf.bundle import card_text
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.errors import BundleError, InputError
from tests.conftest import BUNDLE
from tests.training.evaluation.made_up import made_up_cell, made_up_result, made_up_shown, result_of
from training.evaluation.report import export_card
from training.evaluation.store import METRICS, Result, save_result
from training.evaluation.tables import (
    METRIC_NAMES,
    Table,
    data_set_tables,
    decisions,
    defect_aurocs,
    latex_tables,
    latex_text,
    markdown_tables,
    markdown_text,
    misses,
    summary,
)

# By features and category, the values of seeds 0 and 1.
VALUES = {
    "raw": {"a": (0.5, 0.6), "b": (0.4, 0.4)},
    "residual": {"a": (0.7, 0.7), "b": (0.8, 0.8)},
    "pretrained": {"a": (0.8, 0.7), "b": (0.9, 0.9)},
}


def results(values: dict[str, dict[str, tuple[float, ...]]] = VALUES, **cell: Any) -> list[Result]:
    return [
        result_of(made_up_cell(features=features, category=category, seed=seed, **cell), value)
        for features, categories in values.items()
        for category, of_seeds in categories.items()
        for seed, value in enumerate(of_seeds)
    ]


def find(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return found


@pytest.fixture(scope="module")
def usual() -> list[dict[str, Any]]:
    return summary(results())


class TestSummary:
    def test_means_are_over_seeds_and_then_over_categories(self) -> None:
        values = {"raw": {"a": (0.5, 0.6, 0.7), "b": (0.2,)}}
        rows = summary(results(values))
        mean = find(rows, category=None)
        assert mean["image_auroc"] == pytest.approx(0.4) and mean["aupro"] == pytest.approx(0.4)
        assert (mean["categories"], mean["seeds"]) == (2, 3)
        first = find(rows, category="a")
        assert first["image_auroc"] == pytest.approx(0.6)
        assert (first["categories"], first["seeds"], first["variant"]) == (1, 3, "")

    def test_gains_are_paired_and_their_error_is_over_categories(self) -> None:
        row = find(summary(results()), category=None, features="pretrained")
        # a: 0.3 and 0.1, mean 0.2; b: 0.5. Their standard deviation is 0.2121, over the root of 2.
        assert row["aupro_over_raw"] == pytest.approx(0.35) and row["aupro_over_raw_error"] == pytest.approx(0.15)
        # a: 0.1 and 0, mean 0.05; b: 0.1.
        assert row["pixel_ap_over_residual"] == pytest.approx(0.075)
        assert row["pixel_ap_over_residual_error"] == pytest.approx(0.025)

    def test_only_pairs_of_one_detector_category_seed_and_settings_count(self) -> None:
        pretrained = made_up_cell(features="pretrained", category="a")
        others = [
            made_up_cell(category="a", detector="padim"),
            made_up_cell(category="b"),
            made_up_cell(category="a", shots=4),
            made_up_cell(category="a", noise=0.1),
            made_up_cell(category="a", fraction=0.5),
            made_up_cell(category="a", seed=1),
            made_up_cell(category="a", data_set="btad"),
        ]
        row = find(
            summary([result_of(pretrained, 0.9), *(result_of(one, 0.1) for one in others)]),
            category=None,
            features="pretrained",
        )
        assert row["image_auroc_over_raw"] is None and row["image_auroc_over_raw_error"] is None
        paired = summary([result_of(pretrained, 0.9), result_of(made_up_cell(category="a"), 0.5)])
        row = find(paired, category=None, features="pretrained")
        assert row["image_auroc_over_raw"] == pytest.approx(0.4)
        assert row["image_auroc_over_raw_error"] is None  # one category has none

    def test_there_are_no_gains_of_raw_features(self) -> None:
        assert find(summary(results()), category=None, features="residual")["aupro_over_raw"] is None

    def test_metrics_that_are_not_known_are_left_out_of_means(self) -> None:
        known = result_of(made_up_cell(category="a"), 0.8)
        half = result_of(made_up_cell(category="b"), 0.6, aupro=None)
        row = find(summary([known, half]), category=None)
        assert row["aupro"] == pytest.approx(0.8) and row["image_ap"] == pytest.approx(0.7)
        absent = replace(result_of(made_up_cell(), None), metrics={"image_ap": 0.25})
        row = find(summary([absent]), category=None)
        assert row["image_ap"] == 0.25 and row["pixel_f1"] is None

    def test_is_plain_json_in_the_papers_order(self) -> None:
        rows = summary(results() + results(detector="padim"))
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows
        means = [(row["detector"], row["features"]) for row in rows if row["category"] is None]
        kinds = ("raw", "residual", "pretrained")
        assert means == [(detector, kind) for detector in ("padim", "patchcore") for kind in kinds]

    def test_nothing_to_sum_up(self) -> None:
        with pytest.raises(InputError, match="no finished cells to sum up: run some first"):
            summary([])

    @settings(max_examples=10, deadline=None)
    @given(shuffled=st.permutations(results()))
    def test_order_does_not_matter(self, usual: list[dict[str, Any]], shuffled: list[Result]) -> None:
        assert summary(shuffled) == usual


class TestMarkdown:
    def test_the_papers_format(self) -> None:
        lines = markdown_tables(results()).splitlines()
        assert lines[0] == "## VisA"
        assert lines[2].startswith("In percent; AUPRO up to a false positive rate of 0.3. Means over 2 seeds. 8 refer")
        names = " | ".join(METRIC_NAMES.values())
        assert f"| detector | features | {names} |" in lines
        assert f"| PatchCore | raw | {' | '.join(['47.5'] * 7)} |" in lines
        assert f"| PatchCore | pretrained (angle) | {' | '.join(['**82.5**'] * 7)} |" in lines
        assert f"| PatchCore | pretrained (angle) | raw | {' | '.join(['+35.0 ± 15.0'] * 7)} |" in lines
        assert f"| PatchCore | pretrained (angle) | residual | {' | '.join(['+7.5 ± 2.5'] * 7)} |" in lines
        assert [line for line in lines if line.startswith("### ")] == [
            "### Mean of 2 classes",
            "### Gain of pretrained features, with its standard error over the classes",
            "### Overkill: normal ones that are rejected where 2, 5 and 10 % of the anomalous ones pass",
            "### a",
            "### b",
        ]

    def test_losses_are_told(self) -> None:
        text = markdown_tables(results({"raw": {"a": (0.9,)}, "pretrained": {"a": (0.8,)}}))
        assert f"| PatchCore | raw | {' | '.join(['**90.0**'] * 7)} |" in text
        assert f"| PatchCore | pretrained (angle) | raw | {' | '.join(['-10.0'] * 7)} |" in text

    def test_a_mean_of_fewer_classes_says_so_and_is_never_the_best(self) -> None:
        text = markdown_tables(results({"raw": {"a": (0.5,), "b": (0.5,)}, "residual": {"a": (0.9,)}}))
        assert f"| PatchCore | residual, 1 of 2 classes only | {' | '.join(['90.0'] * 7)} |" in text

    def test_what_is_not_measured(self) -> None:
        cells = [made_up_cell(features=features) for features in ("raw", "pretrained")]
        blank = dict.fromkeys(METRICS[3:])
        text = markdown_tables([result_of(cell, value, **blank) for cell, value in zip(cells, (0.5, 0.6), strict=True)])
        assert "| PatchCore | raw | 50.0 | 50.0 | 50.0 | - | - | - | - |" in text
        assert "| PatchCore | pretrained (angle) | raw | +10.0 | +10.0 | +10.0 | - | - | - | - |" in text

    def test_settings_are_columns_where_they_vary(self) -> None:
        text = markdown_tables(results() + results(shots=1) + results(noise=0.05))
        assert "| detector | features | shots | noise | image AUROC |" in text
        assert "| PatchCore | raw | 1 | 0 % | 47.5 |" in text
        assert "| PatchCore | raw | 8 | 5 % | 47.5 |" in text
        assert "| PatchCore | pretrained (angle) | 1 | 0 % | raw | +35.0 ± 15.0 |" in text
        assert "fraction" not in text and "reference images" not in text
        assert "1 reference image, 5 % anomalies" in markdown_tables(results(shots=1, noise=0.05))
        assert "10 % of the normal training images" in markdown_tables(results(fraction=0.1))

    def test_each_data_set_has_its_own(self) -> None:
        text = markdown_tables(results(data_set="mvtecad") + results(data_set="my|set", shots=4))
        assert re.findall("^## (.*)$", text, re.MULTILINE) == ["MVTecAD", r"my\|set"]
        assert "| shots |" not in text

    def test_names_cannot_break_out(self) -> None:
        text = markdown_tables([result_of(made_up_cell(category="<script>|`x\n# y"), 0.5)])
        assert r"### \<script\>\|\`x \# y" in text.splitlines()
        assert markdown_text("a_b*c") == r"a\_b\*c"


class TestDecisions:
    """Overkill at an escape, of images and of objects that are seen in several."""

    @staticmethod
    def of(scores: dict[str, tuple[float, bool]], data_set: str = "visa", seed: int = 0) -> Result:
        values, labels = zip(*scores.values(), strict=True)
        cell = made_up_cell(data_set=data_set, seed=seed)
        return Result(cell, {}, list(values), list(labels), list(scores), 1.0)

    def test_images(self) -> None:
        """Of 20 anomalous images, none may pass at 2 %, one at 5 % and two at 10 %."""
        damaged = {f"bad/{n}.png": (1.0 + n, True) for n in range(20)}
        good = {f"good/{n}.png": (score, False) for n, score in enumerate((0.5, 1.0, 1.5, 2.5))}
        numbers = decisions(self.of(damaged | good))
        assert numbers == {"overkill_2": 0.75, "overkill_5": 0.25, "overkill_10": 0.0}

    def test_objects_are_as_anomalous_as_their_worst_view(self) -> None:
        scores = {
            **{"nut/OK/S0001/C1.jpg": (0.1, False), "nut/OK/S0001/C2.jpg": (0.4, False)},
            **{"nut/OK/S0002/C1.jpg": (0.6, False), "nut/OK/S0002/C2.jpg": (0.2, False)},
            **{"nut/NG/AK/S0001/C1.jpg": (0.5, True), "nut/NG/AK/S0001/C2.jpg": (0.3, False)},
            **{"nut/NG/AK/S0002/C1.jpg": (0.9, True), "nut/NG/AK/S0002/C2.jpg": (0.1, False)},
        }
        result = self.of(scores, data_set="realiad")
        numbers = decisions(result)
        assert numbers["object_auroc"] == pytest.approx(0.75)
        assert numbers["object_overkill_10"] == 0.5 and numbers["overkill_10"] == pytest.approx(1 / 6)
        assert "object_auroc" not in decisions(self.of(scores))
        assert "object_auroc" not in decisions(replace(result, cell=replace(result.cell, view="C1")))

    def test_kinds_of_defects_and_what_passes(self) -> None:
        """Of four normal images one is rejected at 5 %: what is below it passes, the surest first."""
        scores = {
            **{f"good/{n}.png": (score, False) for n, score in enumerate((0.1, 0.2, 0.3, 0.6))},
            **{
                "cut/0.png": (0.9, True),
                "cut/1.png": (0.55, True),
                "stain/0.png": (0.25, True),
                "hole/0.png": (0.6, True),
            },
        }
        result = replace(self.of(scores), defects=[name.partition("/")[0] for name in scores])
        assert defect_aurocs(result) == {"cut": 0.875, "hole": 0.875, "stain": 0.5}
        assert misses(result) == ["stain/0.png", "cut/1.png"]
        assert defect_aurocs(self.of(scores)) == {}
        (tables,) = data_set_tables([result])
        assert tables.kinds["candle"].header == ("detector", "features", "cut", "hole", "stain")
        assert tables.kinds["candle"].rows == (("PatchCore", "raw", "87.5", "87.5", "50.0"),)

    def test_means_are_over_seeds_and_then_over_categories(self) -> None:
        seeds = [self.of({"a": (1.0, True), "b": (value, False)}, seed=n) for n, value in enumerate((0.5, 2))]
        more = [replace(one, cell=replace(one.cell, category="other")) for one in seeds[:1]]
        row = find(summary(seeds + more), category=None)
        assert row["overkill_2"] == 0.25 and (row["categories"], row["seeds"]) == (2, 2)
        assert row["object_auroc"] is None and find(summary(seeds), category="candle")["overkill_2"] == 0.5
        text = markdown_tables([self.of({"S1/a": (1.0, True), "S2/b": (2.0, False)}, data_set="realiad")])
        assert (
            "| detector | features | images at 2 % | images at 5 % | images at 10 % | object AUROC | objects at 2 % |"
            in text
        )
        assert f"| PatchCore | raw | {' | '.join(['100.0'] * 3)} | 0.0 | {' | '.join(['100.0'] * 3)} |" in text


class TestLatex:
    def test_structure(self) -> None:
        text = latex_tables(results() + results(shots=1) + results(data_set="btad"))
        environments = re.findall(r"\\(begin|end)\{(\w+)\}", text)
        assert environments == [("begin", "longtable"), ("end", "longtable")] * 10
        assert text.count(r"\begingroup") == text.count(r"\endgroup") == 10
        assert text.count("{") == text.count("}")
        for columns, body in re.findall(r"\\begin\{longtable\}\{(\w+)\}\n(.*?)\\end\{", text, re.DOTALL):
            rows = [line for line in body.splitlines() if "&" in line]
            assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}
            assert all(row.endswith(r" \\") for row in rows)
            assert [rule for rule in ("top", "mid", "bottom") if f"\\{rule}rule" not in body] == []

    def test_numbers(self) -> None:
        text = latex_tables(results())
        assert f"PatchCore & raw & {' & '.join(['47.5'] * 7)} \\\\" in text
        bold = " & ".join([r"\textbf{82.5}"] * 7)
        assert f"PatchCore & pretrained (angle) & {bold} \\\\" in text
        assert r"& raw & $+35.0 \pm 15.0$ &" in text
        assert "± " not in text

    def test_names_are_escaped(self) -> None:
        text = latex_tables(
            [result_of(made_up_cell(data_set="a_b\n\\input{x}", category="50% $x^2$ & {#1} ~<y>|"), 0.5)]
        )
        assert r"50\% \$x\textasciicircum{}2\$ \& \{\#1\} \textasciitilde{}\textless{}y\textgreater{}\textbar{}" in text
        assert r"\input" not in text and "% a\\_b \\textbackslash{}input\\{x\\}\n" in text

    @given(st.text())
    def test_no_special_character_gets_through(self, text: str) -> None:
        escaped = re.sub(r"\\text(backslash|ascii\w+|less|greater|bar)\{\}|\\[&%$#_{}]", "", latex_text(text))
        assert not set(escaped) & set("\\&%$#_{}~^<>|\n")


def test_the_tables_of_a_data_set() -> None:
    (tables,) = data_set_tables(results())
    assert (tables.data_set, tables.title, list(tables.classes)) == ("visa", "VisA", ["a", "b"])
    means, gains, _ = tables.overall
    assert means.labels == 2 and gains.labels == 3
    assert means.best == {(2, column) for column in range(2, 9)}


def test_equal_numbers_as_printed_are_all_the_best() -> None:
    (tables,) = data_set_tables(results({"raw": {"a": (0.70004,)}, "pretrained": {"a": (0.69996,)}}))
    assert tables.overall[0].best == {(row, column) for row in (0, 1) for column in range(2, 9)}


def test_a_table_in_both_forms() -> None:
    table = Table("t", ("x", "y"), (("a", "-1.0 ± 2.0"), ("b", "-")), labels=1, best=frozenset({(0, 1)}))
    assert table.markdown() == "| x | y |\n| --- | --: |\n| a | **-1.0 ± 2.0** |\n| b | - |\n"
    assert "a & \\textbf{$-1.0 \\pm 2.0$} \\\\\nb & - \\\\\n\\end{longtable}" in table.latex("caption")


# In a model card: what is claimed is what was measured, and the rest of the card stays as it was


SCORES = {"angle": {"img_auc": 0.98765, "pix_pro": 0.91}}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    shutil.copy(BUNDLE / "README.md", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def save_all(folder: Path, *results: Result) -> None:
    for result in results:
        save_result(folder, result, made_up_shown(result.cell, number=0))


def pretrained(value: float, **cell: Any) -> Result:
    return result_of(made_up_cell(features="pretrained", **cell), value)


def entries(bundle: Path) -> dict[str, float]:
    found = ModelCard((bundle / "README.md").read_text(encoding="utf-8")).data.eval_results
    return {f"{one.dataset_name}, {one.metric_name}": one.metric_value for one in found}


def test_a_card_has_means_over_classes_and_seeds(run: Path, bundle: Path) -> None:
    save_all(run, *(pretrained(v, category=c, seed=s) for c, s, v in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.8))))
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


def test_all_else_of_a_card_is_kept_and_the_hub_takes_it(run: Path, bundle: Path, hub) -> None:
    before = ModelCard((bundle / "README.md").read_text(encoding="utf-8"))
    save_all(run, pretrained(0.5))
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


def test_exporting_a_second_time_changes_nothing(run: Path, bundle: Path) -> None:
    save_all(run, pretrained(0.5), made_up_result(made_up_cell(features="raw")))
    export_card(run, bundle)
    first = (bundle / "README.md").read_bytes()
    export_card(run, bundle)
    assert (bundle / "README.md").read_bytes() == first


def test_newer_numbers_take_the_place_of_older_ones_on_the_same_data(tmp_path: Path, bundle: Path) -> None:
    save_all(tmp_path / "1", pretrained(0.5), pretrained(0.6, data_set="btad"), pretrained(0.1, detector="padim"))
    save_all(tmp_path / "2", pretrained(0.7), pretrained(0.8, data_set="mpdd"))
    export_card(tmp_path / "1", bundle)
    export_card(tmp_path / "2", bundle)
    found = {name.partition(", ")[0]: value for name, value in entries(bundle).items()}
    assert found == {"VisA": 0.7, "BTAD": 0.6, "MPDD": 0.8}
    assert len(entries(bundle)) == 21


def test_what_others_reported_stays_apart(run: Path, bundle: Path) -> None:
    config = ADPretrainConfig.preset("dinov2-large", reported_scores=SCORES)
    (bundle / "README.md").write_text(card_text(config), encoding="utf-8")
    (before,) = ModelCard(card_text(config)).data.to_dict()["model-index"]
    save_all(run, pretrained(0.5, data_set="mvtecad"))
    for _ in range(2):
        export_card(run, bundle)
        (after,) = ModelCard((bundle / "README.md").read_text(encoding="utf-8")).data.to_dict()["model-index"]
        assert after["name"] == before["name"]
        assert after["results"][0] == before["results"][0]
        assert len(after["results"]) == 2 and "source" not in after["results"][1]
        assert len(after["results"][1]["metrics"]) == 7


def test_only_pretrained_features_are_claimed_and_only_what_was_measured(run: Path, bundle: Path) -> None:
    no_masks = made_up_result(made_up_cell(features="pretrained", data_set="folder"), masks=False)
    save_all(run, no_masks, *(result_of(made_up_cell(features=kind), 0.9) for kind in ("raw", "residual")))
    export_card(run, bundle)
    found = entries(bundle)
    assert len(found) == 3
    assert all("image " in name and "pretrained (angle)" in name for name in found)


def test_other_line_ends_of_a_card_are_kept(run: Path, bundle: Path) -> None:
    text = (bundle / "README.md").read_bytes().replace(b"\n", b"\r\n")
    (bundle / "README.md").write_bytes(text)
    save_all(run, pretrained(0.5))
    export_card(run, bundle)
    after = (bundle / "README.md").read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") > text.count(b"\n")
    assert after.endswith(text.partition(b"\r\n---\r\n")[2])


def test_exporting_without_pretrained_features_is_refused(run: Path, bundle: Path) -> None:
    save_all(run, made_up_result(made_up_cell(features="raw")))
    before = (bundle / "README.md").read_bytes()
    with pytest.raises(InputError, match="no finished cells with pretrained features: run some, then export again"):
        export_card(run, bundle)
    assert (bundle / "README.md").read_bytes() == before


def test_exporting_without_a_card_is_refused(run: Path, tmp_path: Path) -> None:
    save_all(run, pretrained(0.5))
    with pytest.raises(BundleError, match=r"has no README\.md: expected the folder of a bundle, with its model card"):
        export_card(run, tmp_path)


@pytest.mark.parametrize("front", ["- a list", "model-index: 3", "a: [", "model-index:\n- name: x"])
def test_a_card_that_cannot_be_read_is_refused(run: Path, bundle: Path, front: str) -> None:
    (bundle / "README.md").write_text(f"---\n{front}\n---\n\n# Title\n", encoding="utf-8")
    save_all(run, pretrained(0.5))
    with pytest.raises(BundleError, match=r"the front matter of .*README\.md cannot be read.*Mend it, then export"):
        export_card(run, bundle)
