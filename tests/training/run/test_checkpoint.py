"""Checkpoints: all comes back bit by bit; a damaged, foreign or half-written one is never taken. What is reported."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from adpretrain_hf.errors import InputError
from training.run.reporting import Reporter
from training.run.state import Progress, load_checkpoint, save_checkpoint


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.01)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        model(torch.arange(15.0).view(5, 3).sin() + step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


PROGRESS = Progress(epoch=2, step=5, history=[{"loss": 1.5}], best={"angle": 0.7}, residual_scale=[1.25, 0.1])
CENTERS = torch.arange(6.0).view(2, 3)


@pytest.fixture
def saved(tmp_path):
    model, optimizer = make()
    advance(model, optimizer, 3)
    save_checkpoint(tmp_path / "checkpoint.safetensors", PROGRESS, {"model": model}, optimizer, CENTERS)
    return tmp_path / "checkpoint.safetensors", model, optimizer


def test_a_checkpoint_goes_on_bit_by_bit(saved):
    path, model, optimizer = saved
    advance(model, optimizer, 4)
    other, its_optimizer = make(seed=1)
    progress, centers = load_checkpoint(path, {"model": other}, its_optimizer)
    advance(other, its_optimizer, 4)
    assert progress == PROGRESS
    assert torch.equal(centers, CENTERS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_before_the_first_step(tmp_path):
    model, optimizer = make()
    save_checkpoint(tmp_path / "c.safetensors", Progress(), {"model": model}, optimizer, CENTERS)
    other, its_optimizer = make(1)
    assert load_checkpoint(tmp_path / "c.safetensors", {"model": other}, its_optimizer)[0] == Progress()


def test_a_checkpoint_of_another_model_is_refused(saved):
    model = nn.Linear(7, 7)
    with pytest.raises(InputError, match=r"checkpoint.safetensors is not a checkpoint of this run"):
        load_checkpoint(saved[0], {"model": model}, torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 100])
def test_a_damaged_checkpoint_is_refused(saved, damage):
    saved[0].write_bytes(damage(saved[0].read_bytes()))
    model, optimizer = make()
    with pytest.raises(InputError, match="is not a checkpoint of this run"):
        load_checkpoint(saved[0], {"model": model}, optimizer)


def test_a_failed_write_leaves_the_last_checkpoint(saved, monkeypatch):
    path, model, optimizer = saved
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.run.state.save_file", fail)
    with pytest.raises(OSError, match="checkpoint.safetensors cannot be written: .*No space left"):
        save_checkpoint(path, Progress(), {"model": model}, optimizer, CENTERS)
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
