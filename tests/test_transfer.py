"""Results on their way to the CPU: in order, as late as they should be, and none lost before an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adpretrain_hf.transfer import begin_copy, late, to_device, to_host

CPU = torch.device("cpu")


def results(asked_for: list[int], fails_at: int | None = None) -> Iterator[tuple[int, list[Tensor]]]:
    for number in range(4):
        if number == fails_at:
            raise OSError("image 2 cannot be read")
        asked_for.append(number)
        yield number, [torch.full((2,), number)]


@pytest.mark.parametrize("behind", [0, 1, 3, 9])
def test_all_arrive_in_order(behind):
    arrived = list(late(((key, begin_copy(tensors)) for key, tensors in results([])), behind))
    assert [key for key, _ in arrived] == [0, 1, 2, 3]
    assert [tensors[0].tolist() for _, tensors in arrived] == [[n, n] for n in range(4)]


@pytest.mark.parametrize(("behind", "asked_first"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])])
def test_the_next_is_asked_for_before_one_is_waited_for(behind, asked_first):
    asked_for: list[int] = []
    copies = late(((key, begin_copy(tensors)) for key, tensors in results(asked_for)), behind)
    assert next(copies)[0] == 0
    assert asked_for == asked_first


@pytest.mark.parametrize("behind", [0, 1])
def test_what_came_before_an_error_is_not_lost(behind):
    copies = late(((key, begin_copy(tensors)) for key, tensors in results([], fails_at=2)), behind)
    assert [next(copies)[0], next(copies)[0]] == [0, 1]
    with pytest.raises(OSError, match="image 2"):
        next(copies)


def test_on_a_cpu_nothing_is_copied_and_nothing_waits():
    asked_for: list[int] = []
    tensor = torch.rand(2, 3, 4, 4)
    assert to_device(tensor, CPU, torch.float32) is tensor
    assert next(to_host(iter([(0, [tensor])]), CPU))[1][0] is tensor
    next(to_host(results(asked_for), CPU))
    assert asked_for == [0]


def test_a_batch_takes_the_precision_of_the_network():
    assert to_device(torch.rand(2, 3, 4, 4), CPU, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_a_gpu_and_back():
    device = torch.device("cuda")
    batches = [torch.rand(8, 3, 64, 64) for _ in range(5)]
    moved = ((number, [to_device(batch, device, torch.float32)]) for number, batch in enumerate(batches))
    for (number, (tensor,)), batch in zip(to_host(moved, device), batches, strict=True):
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, batch), number
