"""Training samples: views and labels of real files, the same in any worker; unreadable ones replaced and counted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import InputError
from tests.conftest import random_image
from tests.training.real_iad_tree import RealIADClass
from training.real_iad import load_real_iad
from training.sampler import EpochBatches, Item
from training.samples import Collate, Samples, UnreadableImages

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


def test_views_and_mask(tree):
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


def test_nothing_can_be_read(tree):
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
