"""Runs that write shards: in one process or several, killed and started again, over images that change."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import build_parser, main
from adpretrain_hf.errors import InputError
from adpretrain_hf.results import FEATURES
from adpretrain_hf.shards import ShardedResults
from adpretrain_hf.write_shards import write_shards
from tests.conftest import ROOT, random_image

both_commands = pytest.mark.parametrize("command", ["extract", "score"])


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def files(output: Path) -> dict[str, bytes]:
    """All that a run has left, by relative path."""
    paths = (path for path in sorted(output.rglob("*")) if path.is_file())
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((output / "shards").glob("0*.safetensors"))}


def written_again(output: Path, before: dict[str, int]) -> list[str]:
    return [name for name, time in times(output).items() if time != before.get(name)]


def make_newer(image: Path) -> None:
    moment = image.stat().st_mtime_ns + 10**9
    os.utime(image, ns=(moment, moment))


@pytest.fixture(autouse=True)
def one_thread():
    """As torchrun has it: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def be_rank(monkeypatch: pytest.MonkeyPatch):
    """Makes this process one of several."""

    def become(rank: int, world_size: int) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images, of which one is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(11):
        random_image(number).save(folder / f"{number:02}.png")
    (folder / "05.png").write_bytes(b"broken")
    return folder


@pytest.fixture
def words(bundle: Path, bank: Path, images: Path) -> list[object]:
    """Of a run with four shards of three images, in batches of two."""
    return [bundle, images, "--reference", bank, "--shard-size", 3, "--batch-size", 2]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


# One process and several


def test_torchrun_leaves_the_same_bytes_as_one_process(
    words: list[object], tmp_path: Path, environment: dict[str, str]
) -> None:
    assert run("score", *words, "--output", tmp_path / "one") == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "adpretrain_hf.cli", "score", *map(str, words), "--output", str(tmp_path / "two")]
    done = subprocess.run([*torchrun, *program], env=environment, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and f"{tmp_path / 'two'}: 10 of 11 images\n" in done.stdout, done.stderr
    expected = files(tmp_path / "one")
    assert files(tmp_path / "two") == expected
    shards = [name for name in expected if name.startswith("shards/")]
    assert shards == [f"shards/{number:05}.safetensors" for number in range(4)]
    assert "index.json" in expected and "scores.csv" in expected


@both_commands
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_one_after_the_other(
    command: str, world_size: int, words: list[object], tmp_path: Path, be_rank, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, *words, "--output", tmp_path / "one") == 1
    output = tmp_path / "many"
    for rank in range(min(world_size, 4)):
        be_rank(rank, world_size)
        capsys.readouterr()
        code = run(command, *words, "--output", output)
        out, err = capsys.readouterr()
        if (left := 4 - len(times(output))) > 0:
            assert (code, out) == (0, "") and not (output / "index.json").exists()
            still_open = f"{left} shard{'s' if left > 1 else ''} of other ranks still open"
            assert f"rank {rank}: its part is done, {still_open}" in err
    assert (code, out) == (1, f"{output}: 10 of 11 images\n")
    assert files(output) == files(tmp_path / "one")


def test_each_rank_tells_its_own_failures_until_the_last(
    words: list[object], tmp_path: Path, be_rank, capsys: pytest.CaptureFixture[str]
) -> None:
    """05.png is in shard 1, which is rank 1's; an exit code would make torchrun stop the other ranks."""
    be_rank(1, 2)
    assert run("extract", *words, "--output", tmp_path / "out") == 0
    assert "1 image could not be used:\n" in capsys.readouterr().err
    be_rank(0, 2)
    assert run("extract", *words, "--output", tmp_path / "out") == 1
    assert "1 image could not be used:\n" in capsys.readouterr().err
    (tmp_path / "out" / "shards" / "00001.safetensors").unlink()
    assert run("extract", *words, "--output", tmp_path / "out") == 0
    assert "could not be used" not in capsys.readouterr().err


def test_bar_is_one_for_the_whole_part_and_only_on_rank_0(
    words: list[object], tmp_path: Path, be_rank, capfd: pytest.CaptureFixture[str]
) -> None:
    be_rank(1, 2)
    capfd.readouterr()
    run("score", *words, "--output", tmp_path / "out")
    assert "image/s" not in capfd.readouterr().err
    be_rank(0, 2)
    run("score", *words, "--output", tmp_path / "out")
    bars = [line for line in capfd.readouterr().err.split("\n") if "score: " in line]
    assert len(bars) == 1 and "6/6" in bars[0] and "image/s" in bars[0]
    (tmp_path / "out" / "shards" / "00002.safetensors").unlink()
    run("score", *words, "--output", tmp_path / "out")
    (bar,) = [line for line in capfd.readouterr().err.split("\n") if "score: " in line]
    assert "| 3/6 [" in bar and "6/6" in bar


def test_readme_commands_are_understood() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.startswith("torchrun ")]
    assert len(lines) == 2
    for line in lines:
        options, _, words = line.removeprefix("torchrun ").partition("-m adpretrain_hf.cli ")
        get_args_parser().parse_args([*shlex.split(options), "program"])
        build_parser().parse_args(shlex.split(words))


def test_torchrun_writes_shards_by_default(
    bundle: Path, bank: Path, image_folder: Path, tmp_path: Path, be_rank
) -> None:
    be_rank(0, 1)
    assert run("extract", bundle, image_folder, "--reference", bank, "--output", tmp_path / "out") == 0
    assert list(times(tmp_path / "out")) == ["00000.safetensors"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["shard_size"] == 256


def test_scores_are_those_of_a_file_for_every_image(
    bundle: Path, bank: Path, images: Path, tmp_path: Path, words: list[object]
) -> None:
    assert run("score", *words, "--output", tmp_path / "shards") == 1
    one_batch = ("--batch-size", 2)
    assert run("score", bundle, images, "--reference", bank, "--output", tmp_path / "each", *one_batch) == 1
    shards, each = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("shards", "each"))
    assert shards["settings"].pop("shard_size") == 3
    assert shards["failures"] == each["failures"] and shards["settings"] == each["settings"]
    assert [entry["image"] for entry in shards["scores"]] == [entry["image"] for entry in each["scores"]]
    for one, other in zip(shards["scores"], each["scores"], strict=True):  # in other batches
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)
    overlays = [name for name in files(tmp_path / "each") if name.startswith("overlays/")]
    assert [name for name in files(tmp_path / "shards") if name.startswith("overlays/")] == overlays
    assert len(overlays) == 10


def test_scores_are_the_same_text_where_the_batches_are_the_same(
    bundle: Path, bank: Path, images: Path, tmp_path: Path
) -> None:
    options = ("--reference", bank, "--batch-size", 1, "--no-overlays")
    run("score", bundle, images, *options, "--output", tmp_path / "each")
    run("score", bundle, images, *options, "--output", tmp_path / "shards", "--shard-size", 4)
    assert (tmp_path / "shards" / "scores.csv").read_bytes() == (tmp_path / "each" / "scores.csv").read_bytes()
    assert not (tmp_path / "shards" / "overlays").exists()


# Stopped and started again


@pytest.fixture
def slow_images(tmp_path: Path) -> Path:
    """60 names of one large image, which takes a while to decode."""
    folder = tmp_path / "slow"
    folder.mkdir()
    random_image(0, 900, 900).save(folder / "00.jpg")
    for number in range(1, 60):
        os.link(folder / "00.jpg", folder / f"{number:02}.jpg")
    return folder


def test_killed_rank_is_made_up_for_by_any_number(
    bundle: Path, bank: Path, slow_images: Path, tmp_path: Path, environment: dict[str, str], be_rank
) -> None:
    words = ["extract", bundle, slow_images, "--reference", bank, "--shard-size", 4, "--output"]
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "adpretrain_hf.cli", *map(str, words), str(killed)]
    rank_1 = environment | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with subprocess.Popen(command, env=rank_1, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(times(killed)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = times(killed)
    assert list(before) == [f"{number:05}.safetensors" for number in range(1, 2 * len(before), 2)]
    assert 2 <= len(before) < 7 and not (killed / "index.json").exists()
    be_rank(0, 1)
    assert run(*words, tmp_path / "undisturbed") == 0
    for world_size in (1, 2, 3):
        output = shutil.copytree(killed, tmp_path / f"by {world_size}")
        for rank in range(world_size):
            be_rank(rank, world_size)
            assert run(*words, output) == 0
        assert not set(before) & set(written_again(output, before))
        assert files(output) == files(tmp_path / "undisturbed")


def test_finished_run_writes_no_shard_again(words: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run("score", *words, "--output", output) == 1
    before, expected = times(output), files(output)
    (output / "scores.csv").unlink()  # as if stopped after the index
    assert run("score", *words, "--output", output) == 1
    assert written_again(output, before) == [] and files(output) == expected


@pytest.mark.parametrize("damage", ["truncate", "empty", "header", "missing", "other"])
def test_damaged_shard_is_done_again(damage: str, words: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run("extract", *words, "--output", output) == 1
    before, expected = times(output), files(output)
    shard = output / "shards" / "00002.safetensors"
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        other = (output / "shards" / "00001.safetensors").read_bytes()
        broken = {"truncate": whole[:-1], "empty": b"", "header": b"\0" * 100 + whole[100:], "other": other}
        shard.write_bytes(broken[damage])
    assert run("extract", *words, "--output", output) == 1
    assert written_again(output, before) == ["00002.safetensors"] and files(output) == expected


def test_replaced_image_redoes_its_shard(words: list[object], images: Path, tmp_path: Path, be_rank) -> None:
    output = tmp_path / "out"
    assert run("score", *words, "--output", output) == 1
    before = times(output)
    random_image(30).save(images / "05.png")
    make_newer(images / "05.png")
    be_rank(0, 2)  # not its shard
    assert run("score", *words, "--output", output) == 0
    assert written_again(output, before) == []
    be_rank(1, 2)
    assert run("score", *words, "--output", output) == 0
    assert written_again(output, before) == ["00001.safetensors"]
    assert len(ShardedResults(output)) == 11


def test_index_is_gone_while_a_shard_is_written(
    extractor: ADPretrainFeatureExtractor, bank: Path, images: Path, tmp_path: Path
) -> None:
    extractor.set_reference(bank)
    output = tmp_path / "out"
    assert write_shards(extractor, images, output, FEATURES, shard_size=3).open_shards == 0
    make_newer(images / "00.png")
    make_newer(images / "10.png")
    outcome = write_shards(extractor, images, output, FEATURES, shard_size=3, rank=1, world_size=2)
    assert outcome.open_shards == 1 and not (output / "index.json").exists()
    assert write_shards(extractor, images, output, FEATURES, shard_size=3).open_shards == 0
    assert (output / "index.json").is_file()


def test_surplus_shards_of_a_longer_list_are_removed(words: list[object], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run("extract", *words, "--output", output) == 1
    for number in (7, 8, 9, 10):
        (images / f"{number:02}.png").unlink()
    assert run("extract", *words, "--output", output) == 1
    assert list(times(output)) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert run("extract", *words, "--output", tmp_path / "fresh") == 1
    assert files(output) == files(tmp_path / "fresh")


def test_block_without_a_usable_image(words: list[object], images: Path, tmp_path: Path) -> None:
    for number in (6, 7, 8):
        (images / f"{number:02}.png").write_bytes(b"")
    assert run("score", *words, "--output", tmp_path / "out") == 1
    before = times(tmp_path / "out")
    assert len(before) == 4
    assert run("score", *words, "--output", tmp_path / "out") == 1
    assert written_again(tmp_path / "out", before) == []
    results = ShardedResults(tmp_path / "out")
    assert [failure["image"] for failure in results.failures] == [f"{number:02}.png" for number in (5, 6, 7, 8)]
    assert len(results) == 7


def test_no_image_can_be_used(words: list[object], images: Path, tmp_path: Path) -> None:
    for image in images.iterdir():
        image.write_bytes(b"")
    assert run("score", *words, "--output", tmp_path / "out") == 1
    assert (tmp_path / "out" / "scores.csv").read_text() == "image,score\n"


# What is refused


@pytest.mark.parametrize("changed", [["--shard-size", 4], ["--dtype", "bfloat16"], ["--image-size", 64], "each"])
def test_other_settings_are_refused(
    changed: list[object], bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [bundle, images, "--reference", images / "00.png", "--output", tmp_path / "out"]
    assert run("extract", *words, "--shard-size", 3) == 1
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert run("extract", *words, *([] if changed == "each" else ["--shard-size", 3, *changed])) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"adpretrain: error: {tmp_path / 'out'} holds results of other settings")
    assert files(tmp_path / "out") == before


def test_other_reference_is_refused(extractor: ADPretrainFeatureExtractor, images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no reference is set: call set_reference\(images\)"):
        write_shards(extractor, images, tmp_path / "out", FEATURES)
    assert not (tmp_path / "out").exists()
    extractor.set_reference(images / "00.png")
    write_shards(extractor, images, tmp_path / "out", FEATURES)
    extractor.set_reference(images / "01.png")
    with pytest.raises(InputError, match="holds results of other settings"):
        write_shards(extractor, images, tmp_path / "out", FEATURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard_size is 0, expected an integer >= 1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2 processes: expected 0 <= rank < world size"),
        ({"image_column": "image"}, r"an image column \('image'\) was given, but the images are files"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict, message: str, extractor: ADPretrainFeatureExtractor, image_folder: Path, tmp_path: Path
) -> None:
    extractor.set_reference(image_folder)
    with pytest.raises(InputError, match=message):
        write_shards(extractor, image_folder, tmp_path / "out", FEATURES, **options)


def test_images_of_another_kind_are_refused(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    extractor.set_reference([random_image(0)])
    with pytest.raises(InputError, match=r"got Tensor as images, expected a folder, paths or a datasets\.Dataset"):
        write_shards(extractor, torch.zeros(1, 3, 32, 32), tmp_path / "out", FEATURES)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("extract", ["--format", "npz", "--shard-size", 3], "--format npz is for one file for each image"),
        ("score", ["--image-column", "photo"], "--image-column photo is for a data set, and the images are files"),
        (
            "score",
            ["--image-column", "photo", "--shard-size", 3],
            "an image column ('photo') was given, but the images",
        ),
    ],
)
def test_options_that_do_not_go_together(
    command: str, options: list[object], message: str, bundle: Path, bank: Path, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [bundle, images, "--reference", bank, "--output", tmp_path / "out"]
    assert run(command, *words, *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
