"""Training samples: the split of the data, their order, views and labels of real files, the same in any worker."""

from __future__ import annotations

import io
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import InputError
from tests.conftest import random_image
from tests.training.real_iad_tree import RealIADClass
from training.real_iad import load_real_iad
from training.sampler import EpochBatches, Item
from training.samples import Collate, Samples, UnreadableImages
from training.settings import PretrainSettings
from training.training_data import TrainingData, load_training_data

# The data: the split of the categories, joined sources, and errors that name what is there


NAMES = [f"part{number:02}" for number in range(10)]


def make_tree(root: Path, names: list[str]) -> str:
    for name in names:
        one = RealIADClass(name)
        one.write_folder(root)
        one.write_json(root)
    return str(root)


@pytest.fixture(scope="module")
def ten_categories(tmp_path_factory) -> str:
    return make_tree(tmp_path_factory.mktemp("tree"), NAMES)


def load_data(*data: str, **settings) -> TrainingData:
    return load_training_data(PretrainSettings(data=data, **settings), Path("unused"))


def test_each_eighth_category_validates_by_default(ten_categories):
    data = load_data(ten_categories)
    assert data.validation == ["part00", "part08"]
    assert data.training == [name for name in NAMES if name not in data.validation]
    assert {data.dataset[position]["category"] for position in data.positions} == set(data.training)
    assert len(data.positions) == sum(name in data.training for name in data.dataset["category"])


def test_categories_are_chosen_by_name(ten_categories):
    data = load_data(ten_categories, validation_categories=("part03",), exclude_categories=("part01", "part02"))
    assert data.validation == ["part03"]
    assert set(NAMES) - set(data.training) == {"part01", "part02", "part03"}
    data = load_data(ten_categories, categories=("part04", "part05"), validation_categories=("part05",))
    assert data.training == ["part04"]


def test_sources_are_joined(ten_categories, tmp_path):
    data = load_data(ten_categories, make_tree(tmp_path, ["other"]))
    assert set(data.training + data.validation) == {*NAMES, "other"}
    assert data.dataset[data.positions[-1]]["category"] in data.training


def test_a_category_in_two_sources_is_refused(ten_categories, tmp_path):
    with pytest.raises(InputError, match=r"the categories \['part03'\] are in more than one of --data"):
        load_data(ten_categories, make_tree(tmp_path, ["part03"]))


@pytest.mark.parametrize("flag", ["categories", "exclude_categories", "validation_categories"])
def test_unknown_names_are_refused(ten_categories, flag):
    name = flag.replace("_", "-")
    with pytest.raises(InputError, match=rf"--{name} names \['nut'\], expected some of \['part00', "):
        load_data(ten_categories, **{flag: ("nut",)})


def test_nothing_left_to_train_on(ten_categories):
    with pytest.raises(InputError, match=r"no category is left to train on: all of \['part04'\] are for validation"):
        load_data(ten_categories, categories=("part04",))


# The order: every image once, the same for any number of processes, and from any step on


def batches(**changes) -> list[list[int]]:
    settings = {"positions": range(100, 160), "batch_size": 8} | changes
    return [[item.position for item in batch] for batch in EpochBatches(settings.pop("positions"), **settings)]


def test_an_epoch_has_every_image_once_but_for_the_rest():
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


def test_resuming_gives_the_rest_of_the_epoch():
    assert batches(accumulate=2, first_step=3) == batches(accumulate=2)[6:]
    assert batches(first_step=7) == []


def test_items_carry_the_epoch():
    assert {item.epoch for batch in EpochBatches(range(8), batch_size=4, epoch=5) for item in batch} == {5}


def test_length_counts_the_batches_that_are_left():
    assert len(EpochBatches(range(60), batch_size=8, accumulate=2, first_step=3)) == 8


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(InputError, match=r"5 training images do not fill one batch of 8: lower --batch-size"):
        batches(positions=range(5))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(InputError, match=r"--batch-size 8 cannot be shared by 3 processes .* multiple of 3"):
        batches(world_size=3)


# Samples: views and labels, the same in any worker; unreadable ones replaced and counted


CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=32, patch_size=8, layers=(1, 2), image_size=64)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    one = RealIADClass("bolt", normals=4)
    for number, name in enumerate(one.files):
        one.files[name] = picture(number, name.endswith(".png"))
    one.write_folder(tmp_path)
    one.write_json(tmp_path)
    return tmp_path


def picture(number: int, is_mask: bool) -> bytes:
    data = io.BytesIO()
    if is_mask:
        mask = Image.new("L", (48, 40))
        mask.paste(3, (8, 8, 30, 30))
        mask.save(data, "PNG")
    else:
        random_image(number).save(data, "JPEG")
    return data.getvalue()


def load(tree: Path, positions=None, **settings) -> Samples:
    dataset = load_real_iad(tree)
    return Samples(dataset, positions or range(len(dataset)), CONFIG, **settings)


def test_a_sample_has_two_views_and_a_mask(tree):
    samples = load(tree)
    anomalous = [n for n, label in enumerate(load_real_iad(tree)["is_anomalous"]) if label]
    for position in range(len(samples)):
        sample = samples[Item(position, 0)]
        assert sample.views.shape == (2, 3, 64, 64)
        assert sample.views.dtype == torch.uint8
        assert bool(sample.mask.any()) == (position in anomalous)
        assert (sample.position, sample.unreadable) == (position, [])


def test_what_is_random_follows_from_seed_epoch_and_image(tree):
    samples = load(tree)
    first = samples[Item(3, 1)].views
    torch.rand(5)
    assert torch.equal(first, load(tree)[Item(3, 1)].views)
    assert not torch.equal(first, samples[Item(3, 2)].views)
    assert not torch.equal(first, load(tree, seed=1)[Item(3, 1)].views)


def test_workers_change_nothing(tree):
    samples = load(tree, paint_defects=0.5)

    def batches(workers: int):
        order = EpochBatches(range(len(samples)), batch_size=4)
        return list(DataLoader(samples, batch_sampler=order, collate_fn=Collate(8), num_workers=workers))

    for one, other in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one.views, other.views)
        assert torch.equal(one.norm_labels, other.norm_labels)
        assert one.positions == other.positions


def test_batch_has_labels_of_both_rules(tree):
    samples = load(tree)
    batch = Collate(8)([samples[Item(position, 0)] for position in range(6)])
    assert batch.views.shape == (2, 6, 3, 64, 64)
    assert batch.angle_labels.shape == batch.norm_labels.shape == (6, 8, 8)
    assert batch.angle_labels.dtype == batch.norm_labels.dtype == torch.bool


def test_painted_defects_reach_normal_images_only(tree):
    labels = load_real_iad(tree)["is_anomalous"]
    normal = [n for n, label in enumerate(labels) if not label]
    painted, plain = load(tree, paint_defects=1.0), load(tree)
    assert all(painted[Item(n, 0)].mask.any() for n in normal)
    for n in set(range(len(labels))) - set(normal):
        assert torch.equal(painted[Item(n, 0)].mask, plain[Item(n, 0)].mask)


def damage(tree: Path, position: int) -> Path:
    path = Path(load_real_iad(tree)[position]["image"]["path"])
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_unreadable_image_is_replaced_by_the_next(tree):
    path = damage(tree, 2)
    samples = load(tree)
    sample = samples[Item(2, 0)]
    assert sample.position == 3
    assert len(sample.unreadable) == 1
    assert path.name in sample.unreadable[0]
    assert torch.equal(sample.views, samples[Item(3, 0)].views)
    assert Collate(8)([sample, samples[Item(4, 0)]]).unreadable == sample.unreadable


def test_validation_images_never_stand_in(tree):
    damage(tree, 6)
    assert load(tree, [1, 6, 9])[Item(6, 0)].position == 9
    damage(tree, 9)
    assert load(tree, [1, 6, 9])[Item(9, 0)].position == 1


def test_a_set_without_a_readable_image_is_an_error(tree):
    for position in range(len(load(tree))):
        damage(tree, position)
    with pytest.raises(InputError, match="no image of the data set can be read"):
        load(tree)[Item(0, 0)]


def test_few_unreadable_images_are_counted():
    unreadable = UnreadableImages(3000)
    for number in range(3):
        unreadable.add([f"{number}.jpg cannot be read"])
    assert len(unreadable.messages) == 3


def test_too_many_unreadable_images_are_an_error():
    unreadable = UnreadableImages(3000)
    with pytest.raises(InputError, match=r"4 of 3000 images cannot be read, more than 0.1%: .*\n  0.jpg\n  1.jpg"):
        unreadable.add([f"{number}.jpg" for number in range(4)])


def test_references_are_prepared_as_at_test_time(tree):
    image = load(tree).load_normal(0)
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
