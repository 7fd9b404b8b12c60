"""Checkpoints: all comes back bit by bit; a damaged, foreign or half-written one is never taken. What is reported."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import InputError
from adpretrain_hf.projector import Projectors
from training.run import distributed
from training.run.reporting import Reporter
from training.run.state import Progress, TrainingState
from training.settings import PretrainSettings

CONFIG = ADPretrainConfig(
    backbone="tiny", hidden_size=8, patch_size=8, layers=(1,), num_heads=2, num_reference_tokens=4
)
PROGRESS = Progress(epoch=2, history=[{"loss": 1.5}], best={"angle": 0.7}, residual_scale=[1.25, 0.1], data="some")
CENTERS = torch.arange(6.0).view(2, 3)


def make(path, config: ADPretrainConfig = CONFIG, **settings) -> TrainingState:
    torch.manual_seed(0 if path.exists() else 1)
    return TrainingState(PretrainSettings(**settings), path, Projectors(config), images=400, data="some")


def advance(state: TrainingState, steps: int) -> None:
    for step in range(steps):
        residual = torch.arange(8 * 2 * 3.0).view(1, 8, 2, 3).sin() + step
        state.projectors([residual])[0].square().sum().backward()
        state.step()


def save(state: TrainingState) -> str:
    """What is said of it; nothing where all went well."""
    said: list[str] = []
    state.save_checkpoint(said.append)
    return "".join(said)


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [*state.projectors.parameters(), *state.weights.parameters()]


@pytest.fixture(params=[0.0, 0.5])
def saved(tmp_path, request):
    state = make(tmp_path / "checkpoint.safetensors", ema=request.param)
    state.progress, state.centers = dataclasses.replace(PROGRESS), CENTERS
    advance(state, 3)
    assert save(state) == ""
    return tmp_path / "checkpoint.safetensors", state


def test_a_checkpoint_goes_on_bit_by_bit(saved):
    path, state = saved
    other = make(path, ema=state.settings.ema)
    assert not other.is_new
    assert other.progress == dataclasses.replace(PROGRESS, step=3, steps_done=3)
    assert torch.equal(other.centers, CENTERS)
    for one in (state, other):
        advance(one, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), weights(other), strict=True))


def test_a_checkpoint_before_the_first_step(tmp_path):
    state = make(tmp_path / "c.safetensors")
    assert state.is_new and save(state) == ""
    assert make(tmp_path / "c.safetensors").progress == Progress(data="some")


def test_what_could_not_be_read_is_kept_for_the_rest_of_the_epoch(tmp_path):
    state = make(tmp_path / "c.safetensors")
    assert not state.agree(False, ["0.jpg"]) and save(state) == ""
    state = make(tmp_path / "c.safetensors")
    state.agree(False, ["1.jpg"])
    assert state.progress.unreadable == ["0.jpg", "1.jpg"]
    state.progress.step = state.steps_per_epoch
    state.end_epoch()
    assert state.progress.unreadable == []


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(InputError, match=r"checkpoint.safetensors is not a checkpoint of this run"):
        make(saved[0], CONFIG.replace(num_reference_tokens=5))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 100])
def test_a_damaged_checkpoint_is_refused(saved, damage):
    saved[0].write_bytes(damage(saved[0].read_bytes()))
    with pytest.raises(InputError, match="is not a checkpoint of this run"):
        make(saved[0])


def test_a_failed_write_leaves_the_last_checkpoint(saved, monkeypatch):
    path, state = saved
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.run.state.save_file", fail)
    said = save(state)
    assert said.startswith(f"no checkpoint was written, the last one is intact: {path} cannot be written: ")
    assert "No space left" in said
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Reports


def test_images_per_second_leave_validation_out(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Reporter(tmp_path, total=64) as reporter:
        for _ in range(2):
            now += 4
            reporter.step(torch.ones(3), 32)
        reporter.end_steps()
        now += 100  # validation
        assert reporter.end_epoch(0, {})["images_per_second"] == pytest.approx(8)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(InputError, match=r"--batch-size 8 cannot be shared by 3 processes .* multiple of 3"):
        make(tmp_path / "checkpoint.safetensors", batch_size=8)
