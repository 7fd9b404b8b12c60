import time

import pytest
import torch

from training.reporting import Reporter
from training.step import StepLoss


def test_images_per_second_leave_validation_out(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Reporter(tmp_path, total=64) as reporter:
        for _ in range(2):
            now += 4
            reporter.step(StepLoss(*[torch.tensor(1.0)] * 3), 32)
        reporter.end_steps()
        now += 100  # validation
        assert reporter.end_epoch(0, {})["images_per_second"] == pytest.approx(8)
