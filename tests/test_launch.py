"""Which of several processes this is, and on which device it computes."""

from __future__ import annotations

import pytest
import torch

from adpretrain_hf.errors import InputError
from adpretrain_hf.launch import Launch, default_device, launched


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone() -> None:
    assert launched() is None


def test_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert launched() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched() == Launch(3, 8) == (3, 8)


@pytest.mark.parametrize(("rank", "world_size"), [("8", "8"), ("-1", "2"), ("first", "2"), ("0", "0")])
def test_numbers_that_do_not_fit(rank: str, world_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(InputError, match=f"RANK={rank} WORLD_SIZE={world_size} in the environment: expected 0 <= RANK"):
        launched()


@pytest.mark.parametrize(("gpus", "expected"), [(False, ("cpu", "cpu")), (True, ("cuda", "cuda:1"))])
def test_every_process_has_a_gpu_of_its_own(
    gpus: bool, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    alone = default_device()
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert (alone, default_device()) == expected
