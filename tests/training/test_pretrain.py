"""Whole runs of the training program: to the end, stopped and resumed, killed, on two processes, pushed; its flags."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
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
from huggingface_hub import HfApi
from jsonargparse import ArgumentError, ArgumentParser
from safetensors.torch import load_file

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.cli import main as cli
from adpretrain_hf.errors import InputError
from tests.conftest import PHOTOS, ROOT
from tests.loopback_hub.hub_server import TOKENS
from tests.processes import kill, start
from tests.tiny import save_tiny
from tests.training.real_iad_tree import RealIADClass, pack_jsons
from training import synthetic
from training.pretrain import main
from training.run.state import TrainingState
from training.settings import PretrainSettings, differing, parse, settings_of

OWNER = next(iter(TOKENS))
VARIANTS = {"angle": "model.safetensors", "norm": "model.norm.safetensors"}


@pytest.fixture(scope="module")
def flags(synthetic_set, tiny_folder) -> list[str]:
    """A run of 2 epochs of 6 steps, in float32."""
    settings = {
        **{"--data": synthetic_set, "--resolution": 256, "--shots": 4, "--workers": 1},
        **{"--backbone": tiny_folder, "--image-size": 32, "--reference-tokens": 16},
        **{"--epochs": 2, "--batch-size": 8, "--learning-rate": 1e-3, "--precision": "float32", "--device": "cpu"},
    }
    return [str(word) for setting in settings.items() for word in setting]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["--output", str(run), *flags]) == 0
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    aliases = json.loads((run / "bundle" / "config.json").read_text())["variant_aliases"]
    names = {variant: name for variant, name in VARIANTS.items() if variant not in aliases}
    files = {variant: load_file(run / "bundle" / name) for variant, name in names.items()}
    return {f"{variant}.{name}": tensor for variant, file in files.items() for name, tensor in file.items()}


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def assert_same_bits(one: Path, other: Path) -> None:
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, other))
    assert first["best"] == second["best"]


def small_run(tiny_folder: Path, run: Path, *words: object) -> int:
    """An epoch on own images."""
    settings = {
        **{"--output": run, "--shots": 2, "--workers": 0, "--backbone": tiny_folder, "--image-size": 32},
        **{"--reference-tokens": 16, "--epochs": 1, "--batch-size": 4, "--precision": "float32", "--device": "cpu"},
    }
    return main([str(word) for word in (*(part for setting in settings.items() for part in setting), *words)])


def test_own_images_in_mvtecads_layout(tiny_folder, tmp_path):
    words = ("--data", PHOTOS, "--categories", "gravel", "--all-categories", "--max-steps", 2)
    assert small_run(tiny_folder, tmp_path / "run", *words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["epochs"][0]["validation"].keys() == metrics["baseline"].keys() == {"PatchCore", "FeatureNorm"}
    bundle = ADPretrainFeatureExtractor.from_pretrained(tmp_path / "run" / "bundle")
    bundle.set_reference(PHOTOS / "gravel" / "train" / "good").score(PHOTOS / "gravel" / "test")


def test_images_without_damage_alone(tiny_folder, tmp_path, caplog):
    """Defects are painted, nothing judges the epochs, and the last weights are kept."""
    words = ("--data", PHOTOS / "gravel" / "train" / "good", "--paint-defects", 0.5, "--image-size", 64)
    assert small_run(tiny_folder, tmp_path / "run", *words, "--epochs", 2) == 0
    assert "no category has anomalous images to judge epochs by" in caplog.text
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {variant: best["epoch"] for variant, best in metrics["best"].items()} == {"angle": 2, "norm": 2}
    card = (tmp_path / "run" / "bundle" / "README.md").read_text()
    assert "Nothing was measured: no category had anomalies to judge by." in card
    assert ADPretrainFeatureExtractor.from_pretrained(tmp_path / "run" / "bundle", variant="norm").variant == "norm"


def test_offline_with_data_that_it_draws(tiny_folder, tmp_path, monkeypatch):
    small = functools.partial(synthetic.generate, categories=2, normals=3)
    monkeypatch.setattr("training.synthetic.generate", small)
    run_on_drawn_data(tiny_folder, tmp_path / "run", "--shots", "2")


@pytest.mark.slow
def test_offline_with_all_the_data_that_it_draws_in_minutes(tiny_folder, tmp_path):
    start = time.monotonic()
    run_on_drawn_data(tiny_folder, tmp_path / "run")
    assert time.monotonic() - start < 180


def run_on_drawn_data(backbone: Path, run: Path, *more: str) -> None:
    words = [
        "--data",
        "synthetic",
        "--backbone",
        str(backbone),
        "--image-size",
        "64",
        "--reference-tokens",
        "16",
        *more,
    ]
    assert main(["--output", str(run), *words, "--epochs", "1", "--precision", "float32", *more]) == 0
    assert len(json.loads((run / "metrics.json").read_text())["epochs"]) == 1
    assert ADPretrainFeatureExtractor.from_pretrained(run / "bundle", variant="norm").variant == "norm"


def test_leaves_a_bundle_with_both_variants(whole, synthetic_set):
    for variant in VARIANTS:
        extractor = ADPretrainFeatureExtractor.from_pretrained(whole / "bundle", variant=variant)
        assert not extractor.projectors.are_identity()
        assert extractor.config.normalize_tokens
        assert min(extractor.config.residual_scale) > 0
        assert set(extractor.config.residual_scale) != {1.0}
    normal = min((synthetic_set / "realiad_256").iterdir()) / "OK"
    extractor.set_reference(normal / "S0001")
    assert extractor.score(normal / "S0002").scores.isfinite().all()


def test_notes_what_was_done(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert [record["epoch"] for record in metrics["epochs"]] == [1, 2]
    for record in metrics["epochs"]:
        assert 0 <= record["validation"]["FeatureNorm"]["image_auroc"] <= 1
        assert record["images_per_second"] > 0
    for variant, detector in {"angle": "PatchCore", "norm": "FeatureNorm"}.items():
        scores = [record["validation"][detector] for record in metrics["epochs"]]
        means = [(score["image_auroc"] + score["aupro"]) / 2 for score in scores]
        assert metrics["best"][variant]["epoch"] == 1 + means.index(max(means))
    (run,) = json.loads((whole / "run.json").read_text())
    assert run["versions"]["torch"] == version("torch")
    assert "--batch-size 8" in run["command"]
    card = (whole / "bundle" / "README.md").read_text()
    assert "--batch-size 8" in card
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
    assert extractor.config.resize_mode == "resize"  # trained on squares, used on whole images


def test_needs_resume_to_go_on(whole, flags, capsys):
    assert main(["--output", str(whole), *flags]) == 1
    assert "holds a run already: give --resume" in capsys.readouterr().err


def test_one_process_at_a_time_trains_in_a_folder(flags, tmp_path):
    """The other one has written nothing but its settings, and has data workers, which may outlive it."""
    words, errors = ["--output", str(tmp_path / "run"), *flags], tmp_path / "errors.txt"
    first = start(main, words)
    while not (tmp_path / "run" / "settings.json").exists() and first.is_alive():
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(main, words, stderr=errors)
    second.join()
    assert f"another process is training in {tmp_path / 'run'}" in errors.read_text()
    os.kill(first.pid, signal.SIGCONT)
    first.kill()
    first.join()
    assert main([*words, *resume(tmp_path / "run")]) == 0


def test_a_run_that_is_begun_anew_replaces_the_bundle(whole, flags, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoint.safetensors").unlink()
    (run / "bundle" / "notes.txt").touch()
    assert main(["--output", str(run), *flags, "--max-steps", "1", "--reference-tokens", "8"]) == 0
    assert ADPretrainFeatureExtractor.from_pretrained(run / "bundle").config.num_reference_tokens == 8
    assert "--reference-tokens 8" in (run / "bundle" / "README.md").read_text()
    assert not (run / "bundle" / "notes.txt").exists()


def test_goes_on_elsewhere(whole, flags, synthetic_set, tmp_path):
    """Other workers, another place of the data and of the run: the same bits."""
    run, moved = tmp_path / "run", shutil.copytree(synthetic_set, tmp_path / "moved")
    words = ["--output", str(run), *flags]
    stopper = threading.Thread(target=stop_after_checkpoint_of_epoch, args=(run, signal.SIGTERM))
    stopper.start()
    assert main(words) == 128 + signal.SIGTERM
    stopper.join()
    assert main([*words, "--resume", "--data", str(moved), "--workers", "0", "--no-cache-crops"]) == 0
    assert_same_bits(whole, run)


def test_does_not_go_on_with_other_data(whole, flags, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    other = synthetic.generate(tmp_path / "other", categories=2, normals=6, defects_per_family=1)
    assert main(["--output", str(run), "--resume", *flags, "--data", str(other)]) == 1
    assert f"the run in {run} was begun with other data than --data {other}" in capsys.readouterr().err


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
    run = tmp_path / "run"
    words = ["--output", str(run), *flags, "--checkpoint-minutes", "1e-9"]
    moments, killed = random.Random(0), 0
    while killed < 20:
        process = start(main, [*words, *resume(run)])
        process.join(moments.uniform(0.2, 1.2))
        if process.is_alive():
            kill(process)
            killed += 1
        else:  # it ended before: a new run takes its place
            assert process.exitcode == 0
            shutil.rmtree(run)
    assert main([*words, *resume(run)]) == 0
    assert_same_bits(whole, run)


def resume(run: Path) -> list[str]:
    return ["--resume"] if (run / "checkpoint.safetensors").exists() else []


def test_two_processes_do_what_one_does(whole, flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.pretrain", "--output", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((run / "metrics.json").read_text())["epochs"] for run in (whole, tmp_path / "run"))
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = []
    for run in (whole, tmp_path / "run"):
        extractor = ADPretrainFeatureExtractor.from_pretrained(run / "bundle", variant="norm")
        features.append(extractor.set_reference(images[:2])(images[2:]))
    for name, maps in features[0].items():
        torch.testing.assert_close(features[1][name], maps, rtol=1e-5, atol=1e-5 * float(maps.abs().max()))


def test_full_disk_leaves_the_last_checkpoint(flags, mount_disk, tmp_path):
    folder = mount_disk("6m")
    # Of two images a step, so that there are steps left to write a checkpoint after once the disk is full.
    words = ["--output", str(folder / "run"), *flags, "--checkpoint-minutes", "1e-9", "--batch-size", "2"]
    errors = tmp_path / "stderr.txt"
    (folder / "rest").touch()  # where a disk is full, no file can be made
    process = start(main, words, stderr=errors)
    while not (folder / "run" / "checkpoint.safetensors").exists() and process.is_alive():
        time.sleep(0.01)
    with (folder / "rest").open("ab", buffering=0) as rest:
        while process.is_alive() and "no checkpoint" not in errors.read_text():
            with contextlib.suppress(OSError):  # again and again: a checkpoint that fails leaves room for the next
                rest.write(b"x" * 2**16)
            time.sleep(0.001)
    process.join()
    assert "no checkpoint was written, the last one is intact: " in errors.read_text()
    assert "No space left" in errors.read_text()
    (folder / "rest").unlink()
    assert main([*words, "--resume"]) == 0


def test_of_a_repository_only_the_categories_of_the_run_are_downloaded(
    flags, whole, synthetic_set, tmp_path, hub, monkeypatch
):
    """The same bits as from a folder, whose images lie in zips here."""
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder, names = tmp_path / "real-iad", sorted(path.name for path in (synthetic_set / "realiad_256").iterdir())
    shutil.copytree(synthetic_set / "realiad_jsons", folder / "realiad_jsons")
    for name in names:
        root = synthetic_set / "realiad_256"
        shutil.make_archive(str(folder / "realiad_256" / name), "zip", root, name)
    RealIADClass("other").write_zip(folder, "256")
    RealIADClass("other").write_json(folder, "realiad_jsons")
    pack_jsons(folder, "realiad_jsons")
    api = HfApi(token=OWNER)
    api.create_repo("acme/real-iad-of-parts", repo_type="dataset")
    api.upload_folder(repo_id="acme/real-iad-of-parts", repo_type="dataset", folder_path=folder)
    words = ["--output", str(tmp_path / "run"), *flags, "--data", "acme/real-iad-of-parts", "--categories", *names]
    assert main(words) == 0
    fetched = {entry["path"].rpartition("/")[2] for entry in hub.log if "/resolve/" in entry["path"]}
    assert fetched == {"realiad_jsons.zip", *(f"{name}.zip" for name in names)}
    assert_same_bits(whole, tmp_path / "run")


def test_pushes_at_the_end_and_later(flags, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    words = ["--output", str(tmp_path / "run"), *flags, "--epochs", "1", "--push", "alice/at-the-end"]
    assert main(words) == 0
    assert "alice/at-the-end" in capsys.readouterr().out
    assert cli(["push", str(tmp_path / "run" / "bundle"), "alice/later", "--private"]) == 0
    for name in ("alice/at-the-end", "alice/later"):
        assert ADPretrainFeatureExtractor.from_pretrained(name, variant="norm").variant == "norm"


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (
            "hf_reader",
            "alice/new",
            "there is no repository alice/new, and the token, of alice, may not make it: its rights",
        ),
        ("hf_owner", "mallory/new", "its rights are 'write', in alice, acme. Use another name"),
        ("hf_reader", "acme/there", "the token may not do this with acme/there: use one with the rights for it"),
        ("hf_other", "acme/there", "there is no repository acme/there, and the token, of mallory, may not make it"),
        ("hf_owner", "acme/public", "acme/public is public, and a private repository was asked for"),
        ("hf_nobody", "acme/there", "no token, or one that the Hub does not accept"),
        ("hf_owner", "acme/two words", "acme/two words is no id of a repository, expected owner/name"),
    ],
)
def test_the_right_to_push_is_asked_for_before_anything_is_trained(
    flags, tmp_path, hub, capsys, monkeypatch, token, name, message
):
    api = HfApi(token="hf_owner")
    for repository, private in (("acme/there", True), ("acme/public", False)):
        api.create_repo(repository, private=private, exist_ok=True)
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["--output", str(tmp_path / "run"), *flags, "--push", name]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    if name.endswith("new"):
        assert f"models/{name}" not in hub.repos


def test_a_start_that_was_refused_leaves_no_trace(flags, tmp_path, capsys):
    words = ["--output", str(tmp_path / "run"), *flags, "--epochs", "1"]
    assert main([*words, "--levels", "99"]) == 1
    assert "99" in capsys.readouterr().err
    assert main(words) == 0
    (run,) = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "--levels" not in run["command"]
    assert "--levels" not in (tmp_path / "run" / "bundle" / "README.md").read_text()


def test_too_few_images_for_a_batch_are_refused(flags, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "run"), *flags, "--batch-size", "999"]) == 1
    assert re.search(r"\d+ training images do not fill one batch of 999: lower --batch-size", capsys.readouterr().err)


def test_levels_are_looked_at_before_data_are_drawn(tiny_folder, tmp_path, capsys):
    words = ["--data", "synthetic", "--backbone", str(tiny_folder), "--levels", "99"]
    assert main(["--output", str(tmp_path / "run"), *words]) == 1
    assert "99" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_left_out_wherever_it_is_met(flags, synthetic_set, tmp_path, caplog):
    data = shutil.copytree(synthetic_set, tmp_path / "data")
    for folder in sorted((data / "realiad_256").iterdir()):  # of training and of validation, reference or not
        path = min(folder.glob("OK/*/*.jpg"))
        path.write_bytes(path.read_bytes()[:100])
    assert main(["--output", str(tmp_path / "run"), *flags, "--data", str(data), "--epochs", "1"]) == 0
    (epoch,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"]
    assert len(epoch["unreadable"]) == 1
    assert "left out as a reference" in caplog.text
    assert "left out of the validation" in caplog.text


def test_ends_after_its_steps_or_its_time(flags, tmp_path):
    for name, *limit in (("steps", "--max-steps", "3"), ("time", "--time-budget", "1e-9")):
        assert main(["--output", str(tmp_path / name), *flags, *limit]) == 0
        assert len(json.loads((tmp_path / name / "metrics.json").read_text())["epochs"]) == 1
        assert ADPretrainFeatureExtractor.from_pretrained(tmp_path / name / "bundle", variant="norm").variant == "norm"
    card = (tmp_path / "steps" / "bundle" / "README.md").read_text()
    assert "3 steps of 8 images" in card


def test_with_more_time_a_run_does_all_that_is_left(whole, flags, tmp_path):
    words = ["--output", str(tmp_path / "run"), *flags]
    assert main([*words, "--time-budget", "1e-9"]) == 0
    assert main([*words, "--resume"]) == 0
    assert [epoch["epoch"] for epoch in metrics_of(tmp_path / "run")["epochs"]] == [1, 1, 2]
    one, other = (load_file(run / "checkpoint.safetensors") for run in (whole, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_in_the_last_step_leaves_a_bundle(flags, tmp_path, monkeypatch):
    agree = TrainingState.agree

    def agree_and_interrupt(state: TrainingState, stopping: bool, unreadable: list[str]) -> bool:
        return agree(state, stopping, unreadable) or state.is_done

    monkeypatch.setattr(TrainingState, "agree", agree_and_interrupt)
    assert main(["--output", str(tmp_path / "run"), *flags, "--max-steps", "2"]) == 0
    assert metrics_of(tmp_path / "run")["best"].keys() == VARIANTS.keys()


def test_training_goes_on_from_a_bundle(whole, flags, tmp_path, capsys):
    backbone = flags.index("--backbone")
    rest = [*flags[:backbone], "--init-from", str(whole / "bundle"), *flags[backbone + 6 :]]
    assert main(["--output", str(tmp_path / "run"), *rest, "--max-steps", "1", "--learning-rate", "1e-9"]) == 0
    before, after = (ADPretrainFeatureExtractor.from_pretrained(run / "bundle") for run in (whole, tmp_path / "run"))
    assert after.config.residual_scale == before.config.residual_scale
    for name, tensor in before.projectors.state_dict().items():
        torch.testing.assert_close(after.projectors.state_dict()[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-size", "56", "--paint-defects", "0.5"], "--image-size is 56, expected at least 64 px for --paint"),
        (["--tracker", "wandb"], "--tracker wandb needs its library: pip install wandb"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_encoded(words, message, flags, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "run"), *flags, *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_diverged_run_ends_and_keeps_its_last_checkpoint(flags, tmp_path, capsys):
    words = ["--output", str(tmp_path / "run"), *flags, "--learning-rate", "1e30", "--checkpoint-minutes", "1e-9"]
    assert main(words) == 1
    assert "the loss is not finite after some" in capsys.readouterr().err
    kept = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_printed_settings_are_a_file_of_them(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    with pytest.raises(SystemExit, match="0"):
        main(["--output", str(tmp_path / "run"), "--data", "a", "--seed", "7", "--print_config"])
    lists, text = "references:\n- 1\n- 4\n- 8\n", capsys.readouterr().out
    file.write_text(text.replace(lists, "references: 1,4\n"))
    assert lists in text
    parser = ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--push")
    parser.add_argument("--public", action="store_true")
    values = parse(PretrainSettings, parser, ["--config", str(file)])
    assert settings_of(PretrainSettings, values) == PretrainSettings(data=("a",), seed=7, references=(1, 4))
    assert values.output == str(tmp_path / "run") and (values.resume, values.public) == (False, False)
    file.write_text("data: a\npublic: no\nresume: yes\n")
    parser = ArgumentParser()
    for flag in ("--resume", "--public"):
        parser.add_argument(flag, action="store_true")
    values = parse(PretrainSettings, parser, ["--config", str(file)])
    assert (values.resume, values.public) == (True, False)


def test_untrained_residuals_stand_beside_every_epoch(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert set(metrics["baseline"]) == {"PatchCore", "FeatureNorm"}
    assert "| untrained | PatchCore |" in (whole / "bundle" / "README.md").read_text()


def test_all_categories_are_trained_on_and_the_card_says_so(flags, tmp_path):
    words = ["--output", str(tmp_path / "run"), *flags, "--max-steps", "1", "--all-categories"]
    assert main(words) == 0
    assert "They were trained on as well." in (tmp_path / "run" / "bundle" / "README.md").read_text()


def test_the_cache_of_a_run_ends_with_it(whole, flags, tmp_path):
    assert not (whole / "cache").exists()
    words = [*flags, "--max-steps", "1", "--cache-folder", str(tmp_path / "cache")]
    assert main(["--output", str(tmp_path / "run"), *words]) == 0
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()) == ["crops", "references"]


def test_errors_are_one_line(flags, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "run"), *flags, "--categories", "nothing"]) == 1
    assert "pretrain: error: --categories names ['nothing'], expected some of" in capsys.readouterr().err


# Settings: flags, JSON, and errors that name the flag


def read(*words: str) -> PretrainSettings:
    return settings_of(PretrainSettings, parse(PretrainSettings, ArgumentParser(exit_on_error=False), words))


def test_no_flags_are_the_defaults():
    assert read() == PretrainSettings()


def test_flags_of_every_kind():
    settings = read(
        "--data",
        "a",
        "synthetic",
        "--levels",
        "2",
        "4",
        "--no-normalize-tokens",
        "--learning-rate",
        "1e-3",
        "--seed",
        "7",
    )
    assert settings == PretrainSettings(
        data=("a", "synthetic"), levels=(2, 4), normalize_tokens=False, learning_rate=1e-3, seed=7
    )


def test_every_flag_has_help():
    parser = ArgumentParser()
    parse(PretrainSettings, parser, [])
    text = parser.format_help()
    for field in dataclasses.fields(PretrainSettings):
        assert f"--{field.name.replace('_', '-')}" in text


def test_a_yaml_file_holds_settings_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "resolution: 512\nlevels: [2, 4]\ndata: a\nnormalize-tokens: false\nlearning_rate: 1e-3\nepochs: 3\n"
    )
    expected = PretrainSettings(
        levels=(2, 4), data=("a",), normalize_tokens=False, learning_rate=1e-3, epochs=5, resolution="512"
    )
    assert read("--config", str(file), "--epochs", "5") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"run.yaml names \['epoch'\], which are no settings: expected some of \['accumulate'"),
        ("just text", "run.yaml holds 'just text', expected settings such as 'batch_size: 32'"),
        ("a: [", "run.yaml cannot be read as YAML"),
    ],
)
def test_a_yaml_file_with_mistakes_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: many", 'epochs".*int.*many'),
        ("epochs: 2.5", 'epochs".*int.*2.5'),
        ("balanced: 3", "not boolean: 3"),
        ("levels: [a]", 'levels".*int.*a'),
    ],
)
def test_values_of_another_kind_in_a_yaml_file_are_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        read("--config", str(tmp_path / "run.yaml"))


def test_settings_come_back_from_json():
    settings = PretrainSettings(data=("x", "y"), levels=(1, 2), references=(8,), validation_categories=("a",))
    assert PretrainSettings.from_json(json.dumps(dataclasses.asdict(settings))) == settings


@pytest.mark.parametrize("text", ["[]", "{", '{"no_such": 1}', "3"])
def test_json_that_holds_no_settings_is_refused(text):
    with pytest.raises(InputError, match="not the settings of a pretraining run"):
        PretrainSettings.from_json(text)


def test_settings_that_differ_name_their_flags():
    old, new = (
        PretrainSettings(),
        PretrainSettings(batch_size=8, levels=(1,), workers=7, device="cuda", data=("moved",)),
    )
    assert differing(old, new) == ["--levels () -> (1,)", "--batch-size 32 -> 8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs is 0, expected an integer >= 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0, expected a number > 0"),
        ({"workers": -1}, "--workers is -1, expected a number >= 0"),
        ({"references": (0, 4)}, r"--references is \(0, 4\), expected integers >= 1"),
        ({"references": ()}, "--references is"),
        ({"paint_defects": 1.5}, "--paint-defects is 1.5, expected a share from 0 to 1"),
        ({"precision": "float16"}, "--precision is 'float16', expected float32 or bfloat16"),
        ({"batch_size": 6, "accumulate": 4}, "--batch-size is 6, expected a multiple of accumulate=4"),
        ({"data": ()}, "--data is"),
        ({"ema": 1.0}, "--ema is 1.0, expected a number from 0 to below 1"),
        ({"patch_labels": "both"}, "--patch-labels is 'both', expected coverage or published"),
        ({"tracker": "none of these"}, "--tracker is .*, expected one of tensorboard, wandb, mlflow, none"),
        ({"init_from": "org/bundle", "levels": (1,), "image_size": 32}, "expected no --levels beside it"),
        ({"init_from": "org/bundle", "normalize_tokens": False}, "expected no --normalize-tokens beside it"),
        ({"seed": 2**64}, r"--seed is \d+, expected a number below 2\*\*64"),
        ({"pool_size": 1}, "--pool-size is 1, expected 0 or at least 2"),
    ],
)
def test_settings_out_of_range_name_their_flag(change, message):
    with pytest.raises(InputError, match=message):
        PretrainSettings(**change)
