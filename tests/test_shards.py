"""Shards as files: what is in them, when one counts as done, and how their results are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError, MissingPathError
from adpretrain_hf.results import FEATURES, SCORES
from adpretrain_hf.shards import ShardedResults, save_shard, shard_failures
from adpretrain_hf.write_shards import write_shards
from tests.conftest import random_image

GOOD = ["0.png", "1.png", "2.png", "sub/3.jpg", "sub/4.jpg"]
RESULTS = {"b": {"x": torch.arange(6.0).view(2, 3)}, "a/b": {"x": torch.zeros(1), "y": torch.tensor(2.5)}}
FAILURES = [{"image": "c", "error": "c is broken"}]


@pytest.fixture
def ready(extractor: ADPretrainFeatureExtractor) -> ADPretrainFeatureExtractor:
    """The tiny extractor with its reference set."""
    return extractor.set_reference([random_image(100), random_image(101)])


# Files


def test_shard_holds_a_tensor_for_every_name_and_key(tmp_path: Path) -> None:
    save_shard(tmp_path / "s.safetensors", "d", RESULTS, FAILURES)
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a/b/x", "a/b/y", "b/x"]
        assert torch.equal(file.get_tensor("b/x"), RESULTS["b"]["x"])
        assert len(file.metadata()) == 1


def test_same_results_make_the_same_bytes(tmp_path: Path) -> None:
    for name, results in (("1", RESULTS), ("2", dict(reversed(RESULTS.items())))):
        save_shard(tmp_path / name, "d", results, FAILURES)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_shard_without_a_result_is_a_shard(tmp_path: Path) -> None:
    save_shard(tmp_path / "s.safetensors", "d", {}, FAILURES)
    assert shard_failures(tmp_path / "s.safetensors", "d") == FAILURES


def test_shard_of_something_else_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    assert shard_failures(path, "d") is None
    save_shard(path, "d", RESULTS, [])
    assert shard_failures(path, "d") == []
    assert shard_failures(path, "e") is None


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_shard_does_not_count(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s.safetensors"
    save_shard(path, "d", RESULTS, [])
    path.write_bytes(path.read_bytes()[:keep])
    assert shard_failures(path, "d") is None


def test_other_safetensors_files_do_not_count(tmp_path: Path, ready: ADPretrainFeatureExtractor) -> None:
    ready.reference.save(tmp_path / "bank.safetensors")
    assert shard_failures(tmp_path / "bank.safetensors", "d") is None


# Reading


def test_results_are_those_of_the_extractor_in_order(
    ready: ADPretrainFeatureExtractor, image_folder: Path, tmp_path: Path
) -> None:
    write_shards(ready, image_folder, tmp_path / "out", FEATURES, shard_size=2)
    results = ShardedResults(tmp_path / "out")
    assert list(results) == GOOD and len(results) == 5 and results.failures == []
    expected = ready(image_folder / "sub" / "3.jpg")
    got = results["sub/3.jpg"]
    assert list(got) == list(ready.layers)
    torch.testing.assert_close(got, {layer: maps[0] for layer, maps in expected.items()}, rtol=0, atol=1e-5)
    torch.testing.assert_close(results.tensor("sub/3.jpg", "layer2"), got["layer2"], rtol=0, atol=0)


def test_scores_are_kept_with_what_places_their_maps(
    ready: ADPretrainFeatureExtractor, image_folder: Path, tmp_path: Path
) -> None:
    write_shards(ready, image_folder, tmp_path / "out", SCORES, shard_size=2)
    expected = list(ready.score_stream(image_folder, progress=False))
    for result, scored in zip(ShardedResults(tmp_path / "out").values(), expected, strict=True):
        torch.testing.assert_close(result["map"], scored.anomaly, rtol=0, atol=1e-5)
        assert result["score"].item() == pytest.approx(scored.score, abs=1e-5)
        assert result["score"].item() == result["map"].max().item()
        assert tuple(result["size"].tolist()) == scored.image.size
        assert tuple(result["box"].tolist()) == scored.image.box


def test_only_the_shards_that_are_asked_for_are_read(
    ready: ADPretrainFeatureExtractor, image_folder: Path, tmp_path: Path
) -> None:
    write_shards(ready, image_folder, tmp_path / "out", FEATURES, shard_size=2)
    for number in (0, 2):
        (tmp_path / "out" / "shards" / f"{number:05}.safetensors").unlink()
    results = ShardedResults(tmp_path / "out")
    assert results["2.png"].keys() == results["sub/3.jpg"].keys() == set(ready.layers)
    assert "0.png" in results  # the index says so
    with pytest.raises(InputError, match=r"00000.safetensors is missing or damaged .*: start the run again"):
        results["0.png"]


def test_open_shard_stays_open(ready: ADPretrainFeatureExtractor, image_folder: Path, tmp_path: Path) -> None:
    write_shards(ready, image_folder, tmp_path / "out", FEATURES, shard_size=2)
    results = ShardedResults(tmp_path / "out")
    first = results["0.png"]
    (tmp_path / "out" / "shards" / "00000.safetensors").unlink()
    assert results["1.png"].keys() == first.keys()


def test_unknown_names_and_keys(ready: ADPretrainFeatureExtractor, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "1.png").write_bytes(b"")
    write_shards(ready, image_folder, tmp_path / "out", FEATURES, shard_size=2)
    results = ShardedResults(tmp_path / "out")
    with pytest.raises(KeyError, match="no result of 'x.png' in .*out"):
        results["x.png"]
    with pytest.raises(KeyError, match=r"no result of '1.png' in .*out: .*1.png cannot be read as an image"):
        results["1.png"]
    with pytest.raises(KeyError, match=r"the result of 0.png has no 'layer9', only \['layer1', "):
        results.tensor("0.png", "layer9")
    assert "1.png" not in results and results.get("x.png") is None
    assert [failure["image"] for failure in results.failures] == ["1.png"]


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"no .*index.json: it is written when all shards are"):
        ShardedResults(tmp_path)


ODD_NAMES = ["Prüfling № 1.png", "a b/日本 語.jpg", "100%.PNG", "__metadata__.png", "layer1.png/layer1.png"]


def test_odd_names(ready: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    for number, name in enumerate(ODD_NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(number).save(folder / name)
    write_shards(ready, folder, tmp_path / "out", SCORES, shard_size=2)
    results = ShardedResults(tmp_path / "out")
    assert sorted(results) == sorted(ODD_NAMES)
    assert all(results[name]["score"] > 0 for name in ODD_NAMES)


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="file names are Unicode there")
def test_file_name_that_is_not_utf8(ready: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    folder = tmp_path / "latin"
    folder.mkdir()
    random_image(0).save(folder / "a.png")
    (folder / "a.png").rename(Path(os.fsdecode(bytes(folder) + b"/caf\xe9.png")))
    write_shards(ready, folder, tmp_path / "out", SCORES)
    results = ShardedResults(tmp_path / "out")
    assert [os.fsencode(name) for name in results] == [b"caf\xe9.png"]
    assert len(results[next(iter(results))]) == 4
