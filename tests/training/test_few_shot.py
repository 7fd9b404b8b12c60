"""The comparison of features: cells, features as the extractor makes them, scores, their means, and the command."""

from __future__ import annotations

import io
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank
from adpretrain_hf.errors import ImageError, InputError
from tests.conftest import make_extractor
from tests.training.real_iad_tree import RealIADClass
from training.few_shot import DETECTORS, FEATURES, evaluate_features, main, score_cells
from training.few_shot_cells import EncodedCell, encode_cells, find_cells
from training.few_shot_features import feature_maker
from training.few_shot_summary import markdown_table, summarise
from training.real_iad import load_real_iad

NAMES = ("nut", "bolt")
COLUMNS = ["category", "view", "seed", "features", "detector", "image_auroc", "pixel_auroc", "aupro"]


def encoded_picture(path: str, size: tuple[int, int]) -> bytes:
    """A photograph of the class's own texture, with a square hole where the file is of a defect; or the hole's mask."""
    random, data = np.random.default_rng(zlib.crc32(path.encode())), io.BytesIO()
    hole = np.zeros(size[::-1], dtype=bool)
    row, column = np.random.default_rng(zlib.crc32(path[:-4].encode())).integers(8, 20, 2)
    hole[row : row + 12, column : column + 12] = True
    if path.endswith(".png"):
        Image.fromarray(hole.astype(np.uint8)).save(data, "PNG")
        return data.getvalue()
    rows, columns = np.mgrid[: size[1], : size[0]]
    texture = 120 + 60 * np.sin(rows / 2.0) + 40 * np.cos(columns / 3.0) + random.normal(0, 4, hole.shape)
    pixels = np.repeat(texture[..., None], 3, axis=2)
    if "NG" in path and "_C3_" not in path:
        pixels[hole] = (250, 20, 20)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=95)
    return data.getvalue()


def write_tree(root: Path, *, normals: int = 7, size: tuple[int, int] = (48, 40)) -> Path:
    """Two classes of 3 views, the third of which shows no defect."""
    for name in NAMES:
        made = RealIADClass(name, normals=normals, samples=3)
        made.files = {path: encoded_picture(path, size) for path in made.files}
        made.write_folder(root)
        made.write_json(root)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("realiad"))


@pytest.fixture(scope="module")
def dataset(tree: Path) -> Dataset:
    return load_real_iad(tree)


def encode(extractor: ADPretrainFeatureExtractor, dataset: Dataset, seeds: Sequence[int] = (0, 1)) -> EncodedCell:
    (cell,) = (cell for cell in find_cells(dataset, ["nut"], 4) if cell.view == "C1")
    return next(encode_cells(extractor, dataset, [cell], seeds=seeds, shots=4))


def prepared(extractor: ADPretrainFeatureExtractor, dataset: Dataset, cell: EncodedCell, images: Tensor) -> Tensor:
    """Some of a cell's images, as the extractor takes them."""
    positions = cell.cell.normal + cell.cell.anomalous
    return extractor.preprocess([dataset[positions[image]]["image"]["path"] for image in images.tolist()])


def close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal but for the float16 of the tokens."""
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=4e-3 * other.norm(dim=1).max().item(), rtol=0)


# Cells


def test_cells_are_categories_by_views(dataset: Dataset) -> None:
    cells = find_cells(dataset, ["nut", "bolt"], 4)
    assert [(cell.category, cell.view) for cell in cells] == [(n, v) for n in ("nut", "bolt") for v in ("C1", "C2")]
    for cell in cells:
        assert (len(cell.normal), len(cell.anomalous)) == (7, 3)
        for position in cell.normal + cell.anomalous:
            row = dataset[position]
            assert (row["category"], row["view"]) == (cell.category, cell.view)
            assert row["is_anomalous"] == (position in cell.anomalous)


def test_a_view_without_a_defect_is_left_out_and_said_so(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        find_cells(dataset, ["nut"], 4)
    assert caplog.messages == ["nut C3 is left out: it has 10 normal and 0 anomalous images"]


def test_categories_that_cannot_be_measured_are_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match=r"the categories \['screw'\] have no view with .* of \['bolt', 'nut'\]"):
        find_cells(dataset, ["nut", "screw"], 4)
    with pytest.raises(InputError, match=r"\['nut'\] have no view with an anomalous image and more than 7 normal ones"):
        find_cells(dataset, ["nut"], 7)
    with pytest.raises(InputError, match="have no view"):
        find_cells(dataset, [], 4)


def test_too_few_shots_or_seeds_are_refused(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    with pytest.raises(
        InputError, match="got 1 shots, expected at least 2: each reference is taken against the others"
    ):
        find_cells(dataset, ["nut"], 1)
    with pytest.raises(InputError, match="got no seeds, expected at least one"):
        encode(extractor, dataset, seeds=[])


def test_references_are_drawn_from_the_normal_images(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    cell = encode(extractor, dataset, seeds=range(20))
    for seed, draw in cell.draws.items():
        assert len(set(draw.tolist())) == 4 and draw.max() < 7
        test = cell.test_images(seed)
        assert sorted(test.tolist() + draw.tolist()) == list(range(10))
        assert cell.is_anomalous(test).tolist() == [False] * 3 + [True] * 3
    assert {tuple(draw.tolist()) for draw in cell.draws.values()} > {tuple(cell.draws[0].tolist())}
    assert set(cell.references.tolist()) == {image for draw in cell.draws.values() for image in draw.tolist()}


def test_draws_do_not_depend_on_what_else_is_measured(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    alone = encode(extractor, dataset, seeds=[1])
    cells = find_cells(dataset, ["bolt", "nut"], 4)
    among = list(encode_cells(extractor, dataset, cells, seeds=[0, 1], shots=4))[2]
    assert alone.cell == among.cell and torch.equal(alone.draws[1], among.draws[1])
    assert not torch.equal(among.draws[0], among.draws[1])


def test_masks_are_what_the_network_sees(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    cell = encode(extractor, dataset)
    assert cell.masks.shape == (10, 32, 32) and not cell.masks[:7].any()
    pixels = prepared(extractor, dataset, cell, torch.arange(7, 10))
    red = pixels[:, 0] - pixels[:, 2] > 2
    assert (red == cell.masks[7:]).float().mean() > 0.97 and (cell.masks[7:].float().mean(dim=(1, 2)) > 0.08).all()


def test_a_mask_of_another_size_is_refused(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    rows = [dataset[position] for position in range(len(dataset))]
    data = io.BytesIO()
    Image.new("L", (10, 20), 1).save(data, "PNG")
    for row in rows:
        row["mask"] = row["mask"] and {"bytes": data.getvalue(), "path": "small.png"}
    changed = Dataset.from_list(rows, features=dataset.features)
    with pytest.raises(ImageError, match=r"the mask small.png has 10 x 20 pixels, its image .* 48 x 40"):
        encode(extractor, changed)


# Features


@pytest.mark.parametrize("normalize_tokens", [True, False])
def test_features_are_the_extractors(tiny_folder: Path, dataset: Dataset, normalize_tokens: bool) -> None:
    extractor = make_extractor(tiny_folder, normalize_tokens=normalize_tokens, residual_scale=(1, 2, 0.5, 3))
    cell = encode(extractor, dataset)
    for seed in cell.draws:
        draw, test = cell.draws[seed], cell.test_images(seed)
        bank = extractor.make_reference(prepared(extractor, dataset, cell, draw))
        images = prepared(extractor, dataset, cell, test)
        close(feature_maker("pretrained", extractor)(cell, seed, test), list(extractor(images, bank).values()))
        residual = "unit residual" if normalize_tokens else "residual"
        close(feature_maker(residual, extractor)(cell, seed, test), bank.residuals(extractor.encode(images)))
        raw = "unit raw" if normalize_tokens else "raw"
        close(feature_maker(raw, extractor)(cell, seed, test), extractor.encode(images))


def test_a_reference_is_taken_against_the_others(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    cell = encode(extractor, dataset)
    draw = cell.draws[0]
    got = feature_maker("residual", extractor)(cell, 0, draw)
    for place in range(4):
        own = prepared(extractor, dataset, cell, draw[place : place + 1])
        others = extractor.backbone(prepared(extractor, dataset, cell, draw[torch.arange(4) != place]))
        expected = ReferenceBank.from_features(others).residuals(extractor.backbone(own))
        close([level[place : place + 1] for level in got], expected)
        assert all(level[place].norm(dim=0).min() > 0 for level in got)


def test_unit_features_have_unit_length(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    cell = encode(extractor, dataset)
    raw, unit = (feature_maker(kind, extractor)(cell, 0, cell.draws[0]) for kind in ("raw", "unit raw"))
    close(unit, [F.normalize(level, dim=1) for level in raw])


def test_images_of_any_aspect_are_measured(tiny_folder: Path, dataset: Dataset) -> None:
    extractor = make_extractor(tiny_folder, resize_mode="resize", image_size=24)
    cell = encode(extractor, dataset)
    assert cell.grid == (3, 4) and cell.masks.shape == (10, 24, 32)
    assert len(score_cells(extractor, [cell])) == 2 * 14


def test_unknown_features_and_detectors_are_refused(extractor: ADPretrainFeatureExtractor) -> None:
    with pytest.raises(InputError, match="unknown features 'cooked': expected some of raw, residual, unit raw"):
        score_cells(extractor, [], features=["cooked"])
    with pytest.raises(InputError, match=r"unknown detectors \['CFLOW'\]: expected some of PatchCore, PaDiM"):
        score_cells(extractor, [], detectors=["CFLOW"])


def test_diverged_weights_are_named(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    extractor.projectors[2].mlp.fc2.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="features of nut C1 hold NaN or infinite values: have the weights diverged?"):
        score_cells(extractor, [encode(extractor, dataset)], features=["pretrained"])


# Scores


def test_every_cell_seed_kind_and_detector_has_a_row(tiny_folder: Path, dataset: Dataset) -> None:
    extractor = ADPretrainFeatureExtractor.from_backbone(
        str(tiny_folder), image_size=32, num_heads=4, num_reference_tokens=8
    )  # its projectors are the identity
    rows = evaluate_features(extractor, dataset, NAMES, seeds=(0, 3), shots=4, progress=False)
    assert all(list(row) == COLUMNS for row in rows)
    keys = [tuple(row[name] for name in COLUMNS[:5]) for row in rows]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * (len(FEATURES) * len(DETECTORS) - 1)
    assert not any(key[3:] == ("unit raw", "FeatureNorm") for key in keys)
    by_key = dict(zip(keys, rows, strict=True))
    for key in keys:
        if key[3] == "pretrained":
            unit = by_key[(*key[:3], "unit residual", key[4])]
            assert [by_key[key][name] for name in COLUMNS[5:]] == pytest.approx([unit[name] for name in COLUMNS[5:]])
    assert np.mean([row["image_auroc"] for row in rows if row["features"] == "unit residual"]) > 0.9
    assert rows == evaluate_features(extractor, dataset, NAMES, seeds=(0, 3), shots=4, progress=False)


def test_cells_that_are_kept_give_the_same_scores(extractor: ADPretrainFeatureExtractor, dataset: Dataset) -> None:
    cells = list(encode_cells(extractor, dataset, find_cells(dataset, NAMES, 4), seeds=(1,), shots=4))
    expected = evaluate_features(
        extractor, dataset, NAMES, seeds=(1,), features=("pretrained",), shots=4, progress=False
    )
    for _ in range(2):
        assert score_cells(extractor, cells, features=("pretrained",)) == expected
    assert len(expected) == 4 * 3


def test_many_images_are_scored_in_parts(
    monkeypatch: pytest.MonkeyPatch, extractor: ADPretrainFeatureExtractor, dataset: Dataset
) -> None:
    cells = [encode(extractor, dataset)]
    whole = score_cells(extractor, cells)
    monkeypatch.setattr("training.few_shot._IMAGES", 2)
    for one, other in zip(score_cells(extractor, cells), whole, strict=True):
        assert [one[name] for name in COLUMNS[5:]] == pytest.approx([other[name] for name in COLUMNS[5:]], abs=0.02)


# The command


def test_the_command_writes_results_and_prints_a_table(
    tmp_path: Path, tree: Path, extractor: ADPretrainFeatureExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, output = tmp_path / "bundle", tmp_path / "new" / "results.json"
    extractor.save_pretrained(bundle)
    torch.nn.init.constant_(extractor.projectors[3].mlp.fc2.bias, 0.5)
    extractor.variant = "norm"
    extractor.save_pretrained(bundle)
    options = ["--data", str(tree), "--categories", "nut, bolt", "--variants", "angle,norm"]
    assert main([str(bundle), *options, "--seeds", "0", "--shots", "4", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "| features | PatchCore | PaDiM | FeatureNorm | mean |" in printed and "mean of 2 categories" in printed
    results = json.loads(output.read_text())
    pretrained = {(row["features"], row["detector"]) for row in results["rows"] if "pretrained" in row["features"]}
    assert pretrained == {
        ("pretrained angle", "PatchCore"),
        ("pretrained angle", "PaDiM"),
        ("pretrained norm", "FeatureNorm"),
    }
    norm = ADPretrainFeatureExtractor.from_pretrained(bundle, variant="norm")
    expected = evaluate_features(
        norm, load_real_iad(tree), ["nut", "bolt"], seeds=[0], features=["pretrained"], shots=4, progress=False
    )
    got = [row["aupro"] for row in results["rows"] if row["features"] == "pretrained norm"]
    assert got == pytest.approx([row["aupro"] for row in expected if row["detector"] == "FeatureNorm"])
    assert {row["detector"] for row in results["summary"]} == {*DETECTORS, "mean"}


def test_without_variants_the_default_one_is_compared(tmp_path: Path, tree: Path, bundle: Path) -> None:
    output = tmp_path / "results.json"
    assert main([str(bundle), "--data", str(tree), "--categories", "nut", "--shots", "4", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["detector"] for row in rows if row["features"] == "pretrained angle"} == set(DETECTORS)
    assert {row["seed"] for row in rows} == {0, 1, 2}


def test_the_command_says_what_is_wrong(
    tmp_path: Path, tree: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(tree), "--output", str(tmp_path / "results.json"), "--categories"]
    assert main([str(bundle), *options, "nut"]) == 1
    assert "few_shot: error: the categories ['nut'] have no view" in capsys.readouterr().err  # 8 references by default
    assert main([str(bundle), *options, "screw"]) == 1
    assert "screw" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(bundle), *options, "nut", "--variants", "a,b,c"])
    assert "got 'a,b,c', expected one or two names" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


# Means, paired gains and standard errors, against numbers worked out by hand


def row(features: str, detector: str, category: str, score: float, view: str = "C1", seed: int = 0) -> dict[str, Any]:
    metrics = {"image_auroc": score, "pixel_auroc": score / 2, "aupro": score / 4}
    return {"category": category, "view": view, "seed": seed, "features": features, "detector": detector} | metrics


def find(summary: list[dict[str, Any]], features: str, detector: str) -> dict[str, Any]:
    (found,) = (one for one in summary if (one["features"], one["detector"]) == (features, detector))
    return found


def test_cells_and_seeds_of_a_category_are_averaged_first() -> None:
    rows = [row("unit residual", "PaDiM", "a", 0.4), row("unit residual", "PaDiM", "b", 0.6)]
    # Category a has three cells, b one: they count alike.
    rows += [row("raw", "PaDiM", "a", score, f"C{score}") for score in (0.5, 0.6, 0.7)]
    rows += [row("raw", "PaDiM", "b", 0.9, seed=seed) for seed in (0, 1)]
    got = find(summarise(rows), "raw", "PaDiM")
    assert got["categories"] == 2
    assert got["image_auroc"] == pytest.approx(0.75) and got["aupro"] == pytest.approx(0.75 / 4)
    # Gains of 0.2 and 0.3: a standard deviation of 0.0707, over the root of 2.
    assert got["image_auroc_gain"] == pytest.approx(0.25) and got["image_auroc_error"] == pytest.approx(0.05)
    assert got["pixel_auroc_gain"] == pytest.approx(0.125) and got["pixel_auroc_error"] == pytest.approx(0.025)


def test_gains_are_taken_under_the_same_detector() -> None:
    rows = [row("unit residual", "PaDiM", "a", 0.4), row("raw", "PaDiM", "a", 0.5), row("raw", "PatchCore", "a", 0.5)]
    summary = summarise(rows)
    assert find(summary, "raw", "PaDiM")["image_auroc_gain"] == pytest.approx(0.1)
    assert find(summary, "raw", "PaDiM")["image_auroc_error"] is None  # one category
    assert find(summary, "raw", "PatchCore")["image_auroc_gain"] is None
    assert find(summary, "unit residual", "PaDiM")["image_auroc_gain"] is None
    json.dumps(summary, allow_nan=False)


def test_the_mean_of_the_detectors_is_paired_too() -> None:
    scores = {"unit residual": (0.4, 0.6), "pretrained angle": (0.6, None), "pretrained norm": (None, 0.7)}
    rows = [
        row(features, detector, category, score + shift)
        for features, pair in scores.items()
        for detector, score in zip(("PaDiM", "FeatureNorm"), pair, strict=True)
        for category, shift in (("a", 0.0), ("b", 0.1 if features != "unit residual" else 0.0))
        if score is not None
    ]
    summary = summarise([*rows, row("raw", "PaDiM", "a", 0.5)])
    mean = find(summary, "pretrained", "mean")
    assert mean["image_auroc"] == pytest.approx(0.7)
    assert mean["image_auroc_gain"] == pytest.approx(0.2) and mean["image_auroc_error"] == pytest.approx(0.05)
    assert not any(one["features"] == "raw" and one["detector"] == "mean" for one in summary)


def test_the_table_of_a_comparison() -> None:
    rows = [
        row(features, "PaDiM", category, score)
        for features, pair in {"unit residual": (0.4, 0.6), "pretrained angle": (0.6, 0.72)}.items()
        for category, score in zip("ab", pair, strict=True)
    ]
    rows.append(row("raw", "PatchCore", "a", 0.84))
    lines = markdown_table(summarise(rows)).splitlines()
    assert "| features | PaDiM | PatchCore |" in lines
    assert "| unit residual | 50.0 / 25.0 / 12.5 | - |" in lines
    assert "| raw | - | 84.0 / 42.0 / 21.0 |" in lines
    assert "| pretrained angle | +16.0 ± 4.0 / +8.0 ± 2.0 / +4.0 ± 1.0 |" in lines
