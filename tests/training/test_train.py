"""The loop: the numbers of the public extractor, which weights change and which do not, and the projectors' start."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.matching import to_rows
from adpretrain_hf.projector import Projectors
from tests.training.patch_losses import angle_loss, norm_loss
from training.data.augment import augment
from training.losses import level_losses
from training.pretrain import Parts, begin, load_batches, train
from training.references import match
from training.run.folder import RunFolder
from training.run.reporting import Reporter
from training.run.state import Progress, TrainingState, initialise
from training.settings import PretrainSettings, parse, settings_of


class Recorder(Reporter):
    """Keeps the losses of every step."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run.path, total=100)
        self.losses: list[Tensor] = []

    def step(self, losses: Tensor, images: int) -> None:
        super().step(losses, images)
        self.losses.append(losses)


@pytest.fixture
def start_run(synthetic_set, tiny_folder, tmp_path):
    """Begins a run of a few steps of 8 images, in float32, with changes; returns its parts, state and folder."""

    def begin_run(**changes: Any) -> tuple[Parts, TrainingState, RunFolder]:
        settings = {
            **{"--data": synthetic_set, "--resolution": 256, "--shots": 4, "--workers": 0, "--device": "cpu"},
            **{"--backbone": tiny_folder, "--image-size": 32, "--reference-tokens": 16, "--precision": "float32"},
            **{"--batch-size": 8, "--max-steps": 1, "--learning-rate": 1e-9, "--angle-weight": 0.3},
            **{f"--{name.replace('_', '-')}": value for name, value in changes.items()},
        }
        words = [str(word) for setting in settings.items() for word in setting]
        run = RunFolder(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        return *begin(settings_of(PretrainSettings, parse(PretrainSettings, ArgumentParser(), words)), run), run

    return begin_run


def losses_of(started: tuple[Parts, TrainingState, RunFolder]) -> list[list[float]]:
    parts, state, run = started
    with Recorder(run) as recorder:
        assert train(parts, state, recorder) == 0
    return torch.stack(recorder.losses).tolist()


@pytest.mark.parametrize("rule", ["coverage", "published"])
def test_the_first_loss_is_that_of_the_public_extractor(start_run, rule):
    parts, state, run = start_run(patch_labels=rule)
    extractor, pool = parts.extractor, parts.samples._pool
    batch = next(iter(load_batches(parts, state.progress)))
    pixels = augment(batch.images, batch.augmentations) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (extractor.mean, extractor.std))
    images = [
        [str(parts.data.dataset[pool.members[place]]["image"]["path"]) for place in own] for own in batch.references
    ]
    banks = [extractor.make_reference([Path(path) for path in paths]) for paths in images]
    features = [extractor((view - mean) / std, banks) for view in pixels.chunk(2)]
    angle, norm = torch.zeros(()), torch.zeros(())
    anomalous, ignored = batch.labels.flatten(1) == 1, batch.labels.flatten(1) == 2
    for name, center in zip(extractor.layers, state.centers, strict=True):
        first, second = (to_rows(view[name]) for view in features)
        angle += angle_loss(first, second, anomalous[0], center=center, ignored=ignored[0])
        norm += sum(norm_loss(view, anomalous[1], ignored=ignored[1]) for view in (first, second))
    ((got_total, got_angle, got_norm),) = losses_of((parts, state, run))
    assert got_angle == pytest.approx(float(angle.detach()), rel=2e-3)  # references are kept in float16
    assert got_norm == pytest.approx(float(norm.detach()), rel=2e-3)
    assert got_total == pytest.approx(0.3 * got_angle + got_norm, rel=1e-5)


def test_every_projector_weight_learns_and_no_other(start_run):
    parts, state, run = start_run(learning_rate=1e-3, max_steps=2)
    before = {name: tensor.clone() for name, tensor in parts.extractor.state_dict().items()}
    losses_of((parts, state, run))
    for name, tensor in parts.extractor.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone"), name


def test_the_loss_falls(start_run):
    learning, standing = (losses_of(start_run(learning_rate=rate, max_steps=36, epochs=20)) for rate in (5e-3, 1e-9))
    assert learning[0] == pytest.approx(standing[0])
    assert sum(total for total, *_ in learning[-8:]) < 0.93 * sum(total for total, *_ in standing[-8:])


def test_the_loss_of_a_step_is_the_mean_of_its_parts(start_run):
    parts, state, run = start_run(accumulate=2)
    extractor, wanted = parts.extractor, []
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (extractor.mean, extractor.std))
    for batch in itertools.islice(load_batches(parts, state.progress), 2):
        tokens = extractor.encode((augment(batch.images, batch.augmentations) - mean) / std)
        residuals = match(tokens, parts.references.gather(batch.references), extractor.config.residual_scale)
        wanted.append(torch.stack(level_losses(extractor.projectors(residuals), batch.labels, state.centers)).detach())
    ((_, angle, norm),) = losses_of((parts, state, run))
    assert [angle, norm] == pytest.approx(((wanted[0] + wanted[1]) / 2).tolist(), rel=1e-5)
    assert float(wanted[0][1]) != pytest.approx(norm, rel=1e-3)


def test_after_the_last_step_of_an_epoch_come_the_images_of_the_next(start_run):
    parts, state, _ = start_run(max_steps=0, epochs=2)
    expected = next(iter(load_batches(parts, Progress(epoch=1))))
    state.progress.step = state.steps_per_epoch
    batches = load_batches(parts, state.progress)
    state.end_epoch()
    assert torch.equal(next(iter(batches)).images, expected.images)


def test_bfloat16_is_close(start_run):
    exact, rounded = (losses_of(start_run(precision=precision))[0] for precision in ("float32", "bfloat16"))
    assert 0 < abs(rounded[0] - exact[0]) < 0.05 * abs(exact[0])


def test_the_average_of_the_weights_is_what_is_kept(start_run):
    parts, state, run = start_run(ema=0.5, learning_rate=1e-2, max_steps=3)
    first = {name: tensor.clone() for name, tensor in state.projectors.state_dict().items()}
    trained: list[dict[str, Tensor]] = []
    original = state.step

    def step() -> None:
        original()
        trained.append({name: tensor.clone() for name, tensor in state.projectors.state_dict().items()})

    state.step = step
    losses_of((parts, state, run))
    for name, tensor in parts.extractor.projectors.state_dict().items():
        # The first average is the weights after the first step.
        expected = 0.25 * trained[0][name] + 0.25 * trained[1][name] + 0.5 * trained[2][name]
        torch.testing.assert_close(tensor, expected)
    assert not torch.equal(first["levels.0.mlp.fc2.weight"], trained[0]["levels.0.mlp.fc2.weight"])


# The start of the projectors: the identity, the published one, or a share of it


CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1, 2), num_reference_tokens=500)


def start(scale: float) -> Projectors:
    torch.manual_seed(0)
    projectors = Projectors(CONFIG)
    initialise(projectors, scale)
    return projectors


def test_a_start_of_scale_zero_is_the_identity():
    residual = torch.randn(2, 32, 3, 3)
    assert all(torch.equal(level, residual) for level in start(0.0)([residual, residual]))


def test_a_start_of_scale_one_is_the_published_one():
    for level in start(1.0):
        for layer, inputs in ((level.attention.out_proj, 32), (level.mlp.fc1, 32), (level.mlp.fc2, 128)):
            bound = inputs**-0.5  # PyTorch's default
            assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not level.attention.out_proj.bias.any()
        assert 0 < level.mlp.fc2.bias.abs().max() <= 128**-0.5
        assert level.reference_projection.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
        assert 0 < level.reference_projection.bias.abs().max() <= 32**-0.5
        assert level.attention.in_proj_weight.abs().max() <= (6 / 128) ** 0.5  # Xavier, of (3 C, C)
        assert level.reference_tokens.std().item() == pytest.approx(1, abs=0.05)


def test_the_published_deviations_of_768_channels():
    torch.manual_seed(0)
    projectors = Projectors(CONFIG.replace(hidden_size=768, num_heads=16, layers=(1,)))
    initialise(projectors, 1.0)
    assert projectors[0].attention.out_proj.weight.std().item() == pytest.approx(0.0208, abs=2e-4)
    assert projectors[0].reference_projection.weight.std().item() == pytest.approx(0.0510, abs=4e-4)


def test_a_start_in_between_is_a_share_of_the_published_one():
    scaled = {"attention.out_proj.weight", "mlp.fc2.weight", "mlp.fc2.bias", "reference_tokens"}
    whole, part = (dict(start(scale)[0].named_parameters()) for scale in (1.0, 0.1))
    for name, parameter in whole.items():
        torch.testing.assert_close(part[name], (0.1 if name in scaled else 1) * parameter)
    residual = torch.randn(2, 32, 3, 3)
    features = start(0.1)([residual, residual])[0]
    assert 0 < (features - residual).norm() < 0.3 * residual.norm()
