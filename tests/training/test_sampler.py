"""The order of images: every image once, the same for any number of processes, and from any step on."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf.errors import InputError
from training.sampler import EpochBatches


def batches(**changes) -> list[list[int]]:
    settings = {"positions": range(100, 160), "batch_size": 8} | changes
    return [[item.position for item in batch] for batch in EpochBatches(settings.pop("positions"), **settings)]


def test_every_image_once_but_for_the_rest():
    order = [position for batch in batches() for position in batch]
    assert len(order) == len(set(order)) == 56
    assert set(order) < set(range(100, 160))


def test_epochs_and_seeds_differ():
    assert batches(epoch=0) != batches(epoch=1)
    assert batches(seed=0) != batches(seed=1)
    assert batches(epoch=1, seed=3) == batches(epoch=1, seed=3)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_processes_share_the_batches_of_one(world_size, accumulate):
    shares = [batches(accumulate=accumulate, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [[position for share in shares for position in share[number]] for number in range(7 * accumulate)]
    steps = [list(chain(*parts[step * accumulate : (step + 1) * accumulate])) for step in range(7)]
    assert steps == batches()


def test_resuming_gives_the_rest():
    assert batches(accumulate=2, first_step=3) == batches(accumulate=2)[6:]
    assert batches(first_step=7) == []


def test_items_carry_the_epoch():
    assert {item.epoch for batch in EpochBatches(range(8), batch_size=4, epoch=5) for item in batch} == {5}


def test_length_counts_what_is_left():
    assert len(EpochBatches(range(60), batch_size=8, accumulate=2, first_step=3)) == 8


def test_too_few_images():
    with pytest.raises(InputError, match=r"5 training images do not fill one batch of 8: lower --batch-size"):
        batches(positions=range(5))


def test_batch_that_cannot_be_shared():
    with pytest.raises(InputError, match=r"--batch-size 8 cannot be shared by 3 processes .* multiple of 3"):
        batches(world_size=3)
