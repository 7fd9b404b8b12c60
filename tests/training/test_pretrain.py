"""Whole runs of the training program: to the end, stopped and resumed, killed, on two processes, pushed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adpretrain_hf import ADPretrainFeatureExtractor
from tests.conftest import ROOT
from tests.loopback_hub.hub_server import TOKENS
from tests.tiny import save_tiny
from training import synthetic
from training.pretrain import main
from training.push import main as push

OWNER = next(iter(TOKENS))
VARIANTS = {"angle": "model.safetensors", "norm": "model.norm.safetensors"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "data"
    return synthetic.generate(folder, categories=3, normals=10, defects_per_family=1, progress=False)


@pytest.fixture
def flags(data, tiny_folder) -> list[str]:
    """A run of 3 epochs of 8 steps, in float32."""
    words = [
        "--data",
        data,
        "--resolution",
        256,
        "--backbone",
        tiny_folder,
        "--image-size",
        64,
        "--reference-tokens",
        16,
    ]
    words += ["--epochs", 3, "--batch-size", 16, "--learning-rate", 1e-3, "--precision", "float32", "--device", "cpu"]
    return [*map(str, words), "--workers", "1"]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> dict[str, Path]:
    return {}


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = {variant: load_file(run / "bundle" / name) for variant, name in VARIANTS.items()}
    return {f"{variant}.{name}": tensor for variant, file in files.items() for name, tensor in file.items()}


def assert_same_bits(one: Path, other: Path) -> None:
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, other))
    assert first["best"] == second["best"]


@pytest.fixture
def whole(flags, finished, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    if "whole" not in finished:
        finished["whole"] = tmp_path_factory.mktemp("whole") / "run"
        assert main(["--output", str(finished["whole"]), *flags]) == 0
    return finished["whole"]


def test_offline_with_data_that_it_draws(tiny_folder, tmp_path):
    words = ["--data", "synthetic", "--backbone", str(tiny_folder), "--image-size", "64", "--reference-tokens", "16"]
    start = time.monotonic()
    assert main(["--output", str(tmp_path / "run"), *words, "--epochs", "1", "--precision", "float32"]) == 0
    assert time.monotonic() - start < 180
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["epochs"]) == 1
    assert ADPretrainFeatureExtractor.from_pretrained(tmp_path / "run" / "bundle", variant="norm").variant == "norm"


def test_leaves_a_bundle_with_both_variants(whole, data):
    for variant in VARIANTS:
        extractor = ADPretrainFeatureExtractor.from_pretrained(whole / "bundle", variant=variant)
        assert not extractor.projectors.are_identity()
        assert extractor.config.normalize_tokens
        assert min(extractor.config.residual_scale) > 0
        assert set(extractor.config.residual_scale) != {1.0}
    normal = min((data / "realiad_256").iterdir()) / "OK"
    extractor.set_reference(normal / "S0001")
    assert extractor.score(normal / "S0002").scores.isfinite().all()


def test_notes_what_was_done(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert [record["epoch"] for record in metrics["epochs"]] == [1, 2, 3]
    for record in metrics["epochs"]:
        assert 0 <= record["validation"]["FeatureNorm"]["image_auroc"] <= 1
        assert record["images_per_second"] > 0
    for variant, detector in {"angle": "PatchCore", "norm": "FeatureNorm"}.items():
        scores = [record["validation"][detector] for record in metrics["epochs"]]
        means = [(score["image_auroc"] + score["aupro"]) / 2 for score in scores]
        assert metrics["best"][variant]["epoch"] == 1 + means.index(max(means))
    (run,) = json.loads((whole / "run.json").read_text())
    assert run["versions"]["torch"] == version("torch")
    assert "--batch-size 16" in run["command"]
    card = (whole / "bundle" / "README.md").read_text()
    assert "--batch-size 16" in card
    assert "## Training" in card


def test_tensorboard_has_the_losses_and_scores(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(whole / "tensorboard"))
    log.Reload()
    assert {"train/loss", "train/angle", "train/norm", "validation/PatchCore/aupro"} <= set(log.Tags()["scalars"])


@pytest.mark.parametrize("family", ["clip_vision_model", "dinov3_vit"])
def test_other_backbones_sizes_and_levels_are_flags(flags, tmp_path, family):
    backbone = save_tiny(tmp_path / "backbone", family)
    words = ["--output", str(tmp_path / "run"), *flags, "--backbone", str(backbone), "--image-size", "48"]
    assert main([*words, "--levels", "2", "3", "--epochs", "1", "--accumulate", "2"]) == 0
    extractor = ADPretrainFeatureExtractor.from_pretrained(tmp_path / "run" / "bundle")
    assert (extractor.layers, extractor.image_size) == (("layer2", "layer3"), 48)


def test_needs_resume_to_go_on(whole, flags, capsys):
    assert main(["--output", str(whole), *flags]) == 1
    assert "holds a run already: give --resume" in capsys.readouterr().err


def test_refuses_to_go_on_with_other_settings(whole, flags, capsys):
    assert main(["--output", str(whole), "--resume", *flags, "--seed", "4"]) == 1
    assert "has other settings, so it cannot go on: --seed 0 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_ends_with_the_same_bits(whole, flags, tmp_path, capsys, number):
    words = ["--output", str(tmp_path / "run"), *flags]
    stopper = threading.Thread(target=stop_after_checkpoint_of_epoch, args=(tmp_path / "run", number))
    stopper.start()
    assert main(words) == 128 + number
    stopper.join()
    assert not (tmp_path / "run" / "bundle").exists()
    assert main([*words, "--resume"]) == 0
    assert_same_bits(whole, tmp_path / "run")


def stop_after_checkpoint_of_epoch(run: Path, number: int) -> None:
    """Sends this process a signal soon after the first epoch's checkpoint: in the middle of the second."""
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(os.getpid(), number)


def test_killed_at_random_moments_resumes_every_time(whole, flags, tmp_path):
    """The helper forks a process for each attempt, so that the libraries are imported once; see its docstring."""
    words = ["--output", str(tmp_path / "run"), *flags, "--checkpoint-minutes", "1e-9"]
    subprocess.run([sys.executable, "-m", "tests.training.kill_runs", "20", *words], check=True, cwd=ROOT, timeout=500)
    resume = ["--resume"] if (tmp_path / "run" / "checkpoint.safetensors").exists() else []
    assert main([*words, *resume]) == 0
    assert_same_bits(whole, tmp_path / "run")


def test_two_processes_do_what_one_does(whole, flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.pretrain", "--output", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((run / "metrics.json").read_text())["epochs"] for run in (whole, tmp_path / "run"))
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = []
    for run in (whole, tmp_path / "run"):
        extractor = ADPretrainFeatureExtractor.from_pretrained(run / "bundle", variant="norm")
        features.append(extractor.set_reference(images[:2])(images[2:]))
    for name, maps in features[0].items():
        torch.testing.assert_close(features[1][name], maps, rtol=1e-5, atol=1e-5 * float(maps.abs().max()))


def test_full_disk_leaves_the_last_checkpoint(flags, mount_disk):
    folder = mount_disk("3m")
    words = ["--output", str(folder / "run"), *flags, "--checkpoint-minutes", "1e-9"]
    command = [sys.executable, "-m", "training.pretrain", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        while not (folder / "run" / "checkpoint.safetensors").exists() and run.poll() is None:
            time.sleep(0.01)
        (folder / "rest").write_bytes(b"x" * shutil.disk_usage(folder).free)
        _, errors = run.communicate(timeout=300)
    assert "no checkpoint was written, the last one is intact: " in errors
    assert "No space left" in errors
    (folder / "rest").unlink()
    assert main([*words, "--resume"]) == 0


def test_pushes_at_the_end_and_later(flags, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    words = ["--output", str(tmp_path / "run"), *flags, "--epochs", "1", "--push", "alice/at-the-end"]
    assert main(words) == 0
    assert "alice/at-the-end" in capsys.readouterr().out
    assert push([str(tmp_path / "run"), "alice/later"]) == 0
    for name in ("alice/at-the-end", "alice/later"):
        assert ADPretrainFeatureExtractor.from_pretrained(name, variant="norm").variant == "norm"


def test_push_of_an_unfinished_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert push([str(tmp_path / "run"), "me/none"]) == 1
    assert "is not finished: there is no bundle yet" in capsys.readouterr().err


def test_errors_are_one_line(flags, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "run"), *flags, "--categories", "nothing"]) == 1
    assert "pretrain: error: --categories names ['nothing'], expected some of" in capsys.readouterr().err
