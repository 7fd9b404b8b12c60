"""What only a GPU shows: the authors' numbers on it, the order of results, and training that never waits for it.

``make test-gpu`` runs these; without a GPU they are skipped.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.bundle import convert
from adpretrain_hf.matching import nearest_reference
from tests.benchmarks.random_models import random_extractor
from tests.conftest import GOLDEN, ROOT
from tests.tiny import save_tiny
from training import synthetic
from training.pretrain import begin, main, train
from training.references import nearest_residuals
from training.run.folder import RunFolder
from training.run.graph import graphed
from training.run.reporting import Reporter
from training.settings import PretrainSettings, parse, settings_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Float32 as on the CPU."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float().cpu() - expected).norm() / expected.norm())


def test_the_authors_numbers(golden, tmp_path):
    convert(str(GOLDEN / "dinov2_tiny"), {"angle": GOLDEN / "checkpoints_pro_angle.pth"}, tmp_path, layers=(1, 2, 3, 4))
    extractor = ADPretrainFeatureExtractor.from_pretrained(tmp_path, dtype=torch.float32, device="cuda")
    with torch.inference_mode():
        extractor.set_reference(golden["e2e.references"])
        features = extractor(golden["e2e.images"])
        maps = extractor.score(golden["e2e.images"]).maps
    for number, level in enumerate(features.values()):
        assert error(level, golden[f"e2e.features.{number}"]) < 1e-5
    assert error(torch.as_tensor(maps), golden["e2e.map"]) < 1e-5


def test_results_come_in_the_order_of_the_images():
    extractor = random_extractor("small", "cuda")
    images = torch.randn(70, 3, 224, 224)
    extractor.set_reference(torch.randn(2, 3, 224, 224))
    for row, features in enumerate(extractor.extract(images, batch_size=8, progress=False)):
        if row % 23 == 0:
            alone = extractor(images[row : row + 1])
            for name, level in features.items():
                assert error(level, alone[name][0].cpu()) < 1e-3


def test_half_precision_finds_what_float32_finds():
    queries, references = torch.randn(4, 512, 384, device="cuda"), torch.randn(4, 2048, 384, device="cuda").half()
    got = nearest_residuals(queries, references).cpu()
    exact = nearest_residuals(queries.half().cpu(), references.cpu())
    same = (queries.cpu() - got - (queries.half().cpu().float() - exact)).abs().amax(dim=2) < 1e-2
    assert same.float().mean() > 0.999  # the others are ties to float16's rounding


def test_half_precision_matches_as_float32_does():
    queries, references = (torch.randn(n, 384, device="cuda").bfloat16() for n in (5000, 70_000))
    got = nearest_reference(queries, references)
    exact = nearest_reference(queries.float().cpu(), references.float().cpu()).cuda()
    assert (got == exact).float().mean() > 0.999
    chosen, nearest = (torch.cosine_similarity(queries.float(), references[index].float()) for index in (got, exact))
    assert (nearest - chosen).abs().max() < 1e-3


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A small run of 20 steps on data that the program draws."""
    folder = tmp_path_factory.mktemp("data")
    data = synthetic.generate(folder / "images", categories=3, normals=10, size=256)
    settings = {
        **{"--data": data, "--resolution": 256, "--shots": 4, "--workers": 4, "--device": "cuda"},
        **{"--backbone": save_tiny(folder / "backbone"), "--image-size": 64, "--reference-tokens": 16},
        **{"--epochs": 4, "--max-steps": 20, "--batch-size": 16, "--learning-rate": 1e-3, "--tracker": "none"},
    }
    return [str(word) for setting in settings.items() for word in setting]


def losses(run: Path) -> list[float]:
    return [epoch["loss"] for epoch in json.loads((run / "metrics.json").read_text())["epochs"]]


def test_training_lowers_the_loss(flags, tmp_path):
    for name, rate in (("learning", "5e-3"), ("standing", "1e-9")):
        assert main(["--output", str(tmp_path / name), *flags, "--learning-rate", rate]) == 0
    assert losses(tmp_path / "learning")[-1] < 0.97 * losses(tmp_path / "standing")[-1]


def test_a_recorded_function_gives_what_it_gives_unrecorded():
    def scaled(images: torch.Tensor, factors: torch.Tensor) -> list[torch.Tensor]:
        return [images.float() * factors[:, None], images.sum(dim=1)]

    recorded = graphed(scaled)
    for width in (8, 5, 8, 5, 8):
        images, factors = torch.randint(255, (4, width), device="cuda").byte(), torch.randn(4, device="cuda")
        for got, expected in zip(recorded(images, factors), scaled(images, factors), strict=True):
            assert torch.equal(got, expected)


def test_references_in_a_file_give_the_same_losses(flags, tmp_path):
    for name, gigabytes in (("file", "1e-6"), ("memory", "0")):
        assert main(["--output", str(tmp_path / name), *flags, "--cache-gb", gigabytes]) == 0
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "memory"), rel=0.02)


def test_a_stopped_run_goes_on(flags, tmp_path):
    class Stopping(Reporter):
        steps = 0

        def step(self, losses: torch.Tensor, images: int) -> None:
            super().step(losses, images)
            self.steps += 1
            if self.steps == 3:
                signal.raise_signal(signal.SIGTERM)

    assert main(["--output", str(tmp_path / "whole"), *flags]) == 0
    run = RunFolder(tmp_path / "stopped")
    settings = settings_of(PretrainSettings, parse(PretrainSettings, ArgumentParser(), flags))
    parts, state = begin(settings, run)
    run.note_start(settings, "")
    with Stopping(run.path, total=100) as reporter:
        assert train(parts, state, reporter) == signal.SIGTERM
    assert state.progress.steps_done < 20
    assert main(["--output", str(run.path), "--resume", *flags]) == 0
    assert losses(run.path)[1:] == pytest.approx(losses(tmp_path / "whole")[1:], rel=0.02)


def test_two_processes(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.pretrain", "--output", str(tmp_path / "two"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["--output", str(tmp_path / "one"), *flags]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.02)


@pytest.mark.parametrize("more", [[], ["--precision", "float32"], ["--ema", "0.9", "--patch-labels", "published"]])
def test_no_step_waits_for_the_device(flags, tmp_path, more):
    class Watched(Reporter):
        """Looks for synchronisation from the third step of an epoch to its end."""

        def begin_epoch(self) -> None:
            super().begin_epoch()
            self.steps = 0

        def step(self, losses: torch.Tensor, images: int) -> None:
            super().step(losses, images)
            self.steps += 1
            if self.steps > 2:
                torch.cuda.set_sync_debug_mode("warn")

        def end_steps(self) -> None:
            torch.cuda.set_sync_debug_mode("default")
            super().end_steps()

    one_shape = ["--references", "4"]  # and so one recording
    settings = settings_of(PretrainSettings, parse(PretrainSettings, ArgumentParser(), [*flags, *more, *one_shape]))
    run = RunFolder(tmp_path / "run")
    parts, state = begin(settings, run)
    with warnings.catch_warnings(record=True) as caught, Watched(run.path, total=100) as reporter:
        warnings.simplefilter("always")
        assert train(parts, state, reporter) == 0
    assert state.progress.steps_done == 20
    waits = {f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)}
    assert not waits


def test_compiled_training(flags, tmp_path):
    words = [*flags, "--compile", "--precision", "float32"]
    assert main(["--output", str(tmp_path / "compiled"), *words]) == 0
    assert main(["--output", str(tmp_path / "plain"), *flags, "--precision", "float32"]) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


def test_compiled_features(tmp_path):
    extractor = random_extractor("small", "cuda")
    images = torch.randn(4, 3, 224, 224)
    extractor.set_reference(images[:2])
    plain = extractor(images)
    extractor.backbone.compile()
    for name, level in extractor(images).items():
        assert error(level, plain[name].cpu()) < 1e-3
