"""Training samples: the split of the data, their order, views and labels of real files, the same in any worker."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.images import Preprocessor, normalize
from tests.conftest import random_image
from tests.training.real_iad_tree import RealIADClass, load_real_iad
from training.data.samples import (
    Item,
    Sample,
    Samples,
    check_unreadable,
    collate,
    coverage_labels,
    epoch_batches,
    published_labels,
)
from training.data.slots import SlotFile
from training.data.sources import TrainingData, load_training_data
from training.references import ReferencePool
from training.settings import PretrainSettings

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
    with pytest.raises(InputError, match=r"--categories and --exclude-categories leave none of \['part00', "):
        load_data(ten_categories, categories=("part04",), exclude_categories=("part04",))
    with pytest.raises(InputError, match=r"no category is left to train on: all of \['part04'\] are for validation"):
        load_data(ten_categories, categories=("part04",))


def test_all_categories_are_trained_on_if_that_is_asked_for(ten_categories):
    data = load_data(ten_categories, all_categories=True)
    assert data.training == NAMES
    assert data.validation == ["part00", "part08"]


def test_the_digest_is_of_the_names_wherever_they_lie(ten_categories, tmp_path):
    moved = shutil.copytree(ten_categories, tmp_path / "moved")
    assert load_data(ten_categories).digest() == load_data(str(moved)).digest()
    assert load_data(ten_categories, exclude_categories=("part03",)).digest() != load_data(ten_categories).digest()


def test_data_without_an_anomaly_need_painted_defects(tmp_path):
    tree = make_tree(tmp_path, ["bolt", "cap"])
    for name in ("bolt", "cap"):
        remove_anomalies(tmp_path, name)
    message = r"none of the \d+ training images is anomalous, .* give anomalous images with masks, or --paint-defects"
    with pytest.raises(InputError, match=message):
        load_data(tree)
    assert load_data(tree, paint_defects=0.5).anomalous == []


def remove_anomalies(root: Path, name: str) -> None:
    (path,) = root.rglob(f"{name}.json")
    content = json.loads(path.read_text())
    for split in ("train", "test"):
        content[split] = [item for item in content[split] if item["image_path"].startswith("OK/")]
    path.write_text(json.dumps(content))
    for folder in root.glob(f"realiad_*/{name}/NG"):
        shutil.rmtree(folder)


# The order: every image once, the same for any number of processes, and from any step on


def batches(**changes) -> list[list[int]]:
    names = {field.name for field in fields(PretrainSettings)}
    settings = {"batch_size": 8} | {name: value for name, value in changes.items() if name in names}
    others = {name: value for name, value in changes.items() if name not in names}
    order = epoch_batches(range(100, 160), PretrainSettings(**settings), **others)
    return [[item.position for item in batch] for batch in order]


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
    assert {
        item.epoch for batch in epoch_batches(range(8), PretrainSettings(batch_size=4), epoch=5) for item in batch
    } == {5}


def test_one_number_of_references_is_drawn_for_every_step():
    settings = PretrainSettings(batch_size=4, references=(1, 4, 8))
    numbers = [{item.references for item in batch} for batch in epoch_batches(range(400), settings)]
    assert all(len(own) == 1 for own in numbers)
    assert set.union(*numbers) == {1, 4, 8}
    rest = [{item.references for item in batch} for batch in epoch_batches(range(400), settings, first_step=60)]
    assert rest == numbers[60:]


@pytest.mark.parametrize("number", [1, 5, 30])
def test_balanced_batches_are_a_quarter_anomalous(number):
    anomalous = list(range(100, 100 + number))
    order = batches(anomalous=anomalous)
    assert len(order) == 7
    assert all(sum(position in anomalous for position in batch) >= 2 for batch in order)
    seen = [position for batch in order for position in batch]
    normal = [position for position in seen if position not in anomalous]
    assert len(normal) == len(set(normal))
    assert set(seen) >= set(anomalous[:14])
    assert order == batches(anomalous=anomalous)


def test_length_counts_the_batches_that_are_left():
    assert len(epoch_batches(range(60), PretrainSettings(batch_size=8, accumulate=2), first_step=3)) == 8


# Samples: views and labels, the same in any worker; unreadable ones replaced and counted


CONFIG = ADPretrainConfig(
    backbone="tiny", hidden_size=32, patch_size=8, layers=(1, 2), image_size=64, resize_mode="crop"
)


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


def load(tree: Path, positions=None, crops=None, **settings) -> Samples:
    dataset = load_real_iad(tree)
    pool = ReferencePool(dataset["category"], dataset["view"], [not label for label in dataset["is_anomalous"]])
    return Samples(dataset, positions or range(len(dataset)), CONFIG, pool, PretrainSettings(**settings), crops)


def get(samples: Samples, position: int, epoch: int = 0) -> Sample:
    return samples[Item(position, epoch, 3)]


def same(one: Sample, other: Sample) -> bool:
    fields = ("image", "mask", "augmentation", "references")
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


def test_a_sample_is_a_crop_and_a_mask(tree):
    samples, dataset = load(tree), load_real_iad(tree)
    for position, row in enumerate(dataset):
        sample = get(samples, position)
        assert sample.image.shape == (3, 64, 64)
        assert sample.image.dtype == torch.uint8
        expected = Preprocessor(CONFIG).prepare(row["image"]["path"]).tensor
        assert torch.equal(normalize(sample.image, CONFIG.mean, CONFIG.std), expected)
        assert bool(sample.mask.any()) == row["is_anomalous"]
        assert sample.unreadable is None


def test_a_mask_is_cut_out_like_its_image():
    samples = object.__new__(Samples)
    samples._preprocessor = Preprocessor(CONFIG)
    for width, height in ((70, 90), (90, 70), (64, 64), (33, 200)):
        pixels = np.zeros((height, width), np.uint8)
        pixels[height // 3 : 2 * height // 3, width // 4 :] = 7
        data = [io.BytesIO(), io.BytesIO()]
        Image.fromarray(255 * (pixels > 0).astype(np.uint8)).convert("RGB").save(data[0], "PNG")
        Image.fromarray(pixels).save(data[1], "PNG")
        samples._dataset = [
            {name: {"bytes": d.getvalue(), "path": name} for name, d in zip(("image", "mask"), data, strict=True)}
        ]
        image, mask = samples._decode(0)
        sure = (image[0] < 64) | (image[0] > 192)
        assert mask.dtype == torch.bool and share(sure) > 0.7
        assert torch.equal(mask[sure], image[0][sure] > 128)


def share(of: torch.Tensor) -> float:
    return float(of.float().mean())


def test_a_mask_of_another_size_is_refused(tree):
    path = next(Path(row["mask"]["path"]) for row in load_real_iad(tree) if row["mask"])
    Image.new("L", (30, 20)).save(path)
    position = [row["mask"] and row["mask"]["path"] for row in load_real_iad(tree)].index(str(path))
    with pytest.raises(ImageError, match=r"the mask .*png has 30 x 20 pixels, its image .* 48 x 40: expected the same"):
        load(tree)._decode(position)


def test_what_is_random_follows_from_seed_epoch_and_image(tree):
    samples = load(tree)
    first = get(samples, 3, 1)
    torch.rand(5)
    assert same(first, get(load(tree), 3, 1))
    assert not torch.equal(first.augmentation, get(samples, 3, 2).augmentation)
    assert not torch.equal(first.augmentation, get(load(tree, seed=1), 3, 1).augmentation)
    draws = {tuple(get(samples, 0, epoch).references.tolist()) for epoch in range(8)}
    assert len(draws) > 1


def test_references_are_of_the_same_kind_and_never_the_image_itself(tree):
    samples, dataset = load(tree), load_real_iad(tree)
    for position, row in enumerate(dataset):
        members = [samples._pool.members[place] for place in get(samples, position).references.tolist()]
        assert len(members) == 3 and position not in members
        for member in members:
            its = dataset[member]
            assert (its["category"], its["view"], its["is_anomalous"]) == (row["category"], row["view"], False)


def test_workers_change_nothing(tree):
    samples = load(tree, paint_defects=0.5)

    def batches(workers: int):
        order = epoch_batches(range(len(samples)), PretrainSettings(batch_size=4, references=(8,)))
        return list(
            DataLoader(samples, batch_sampler=order, collate_fn=partial(collate, "coverage", 8), num_workers=workers)
        )

    for one, other in zip(batches(0), batches(2), strict=True):
        for field in ("images", "augmentations", "labels", "references"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_a_batch_has_labels_for_both_losses(tree):
    samples = load(tree)
    batch = collate("coverage", 8, [get(samples, position) for position in range(6)])
    assert batch.images.shape == (6, 3, 64, 64)
    assert batch.augmentations.shape == (6, 2, 10)
    assert batch.labels.shape == (2, 6, 8, 8)
    assert batch.references.shape == (6, 3)


def test_painted_defects_reach_normal_images_only(tree):
    labels = load_real_iad(tree)["is_anomalous"]
    painted, plain = load(tree, paint_defects=1.0), load(tree)
    for position, is_anomalous in enumerate(labels):
        assert get(painted, position).mask.any()
        assert torch.equal(get(painted, position).mask, get(plain, position).mask) == is_anomalous


def crops_of(tree: Path, file: Path) -> dict:
    dataset = load_real_iad(tree)
    return {"crops": SlotFile(file, slots=len(dataset), shape=(4, 64, 64), dtype=torch.uint8)}


def test_crops_that_are_kept_need_no_file_any_more(tree, tmp_path):
    plain = [get(load(tree, paint_defects=0.5), position) for position in range(8)]
    samples = load(tree, paint_defects=0.5, **crops_of(tree, tmp_path / "crops.bin"))
    for _ in range(2):
        assert all(same(get(samples, position), one) for position, one in enumerate(plain))
        for row in load_real_iad(tree):
            Path(row["image"]["path"]).write_bytes(b"gone")


def test_a_full_disk_costs_the_crops_not_the_run(tree, mount_disk, caplog):
    plain = [get(load(tree), position) for position in range(8)]
    disk = mount_disk("64k")
    samples = load(tree, **crops_of(tree, disk / "crops.bin"))
    (disk / "rest").write_bytes(b"x" * shutil.disk_usage(disk).free)
    assert all(same(get(samples, position), one) for position, one in enumerate(plain))
    assert caplog.text.count("crops are kept no more: ") == 1


def damage(tree: Path, position: int) -> Path:
    path = Path(load_real_iad(tree)[position]["image"]["path"])
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_unreadable_image_is_replaced_by_the_next(tree):
    path = damage(tree, 2)
    samples = load(tree)
    sample = get(samples, 2)
    assert path.name in sample.unreadable
    assert torch.equal(sample.image, get(samples, 3).image)
    assert collate("coverage", 8, [sample, get(samples, 4)]).unreadable == [sample.unreadable]


def test_adjacent_unreadable_images_are_counted_once_each(tree):
    damaged = [damage(tree, position).name for position in (1, 2, 3)]
    batch = collate("coverage", 8, [get(load(tree), position) for position in range(6)])
    assert len(batch.unreadable) == 3
    assert all(name in message for name, message in zip(damaged, batch.unreadable, strict=True))


def test_validation_images_never_stand_in(tree):
    damage(tree, 6)
    assert torch.equal(get(load(tree, [1, 6, 9]), 6).image, get(load(tree), 9).image)
    damage(tree, 9)
    assert torch.equal(get(load(tree, [1, 6, 9]), 9).image, get(load(tree), 1).image)


def test_a_set_without_a_readable_image_is_an_error(tree):
    for position in range(len(load(tree))):
        damage(tree, position)
    with pytest.raises(InputError, match="no image of the data set can be read"):
        get(load(tree), 0)


@pytest.mark.parametrize(("images", "most"), [(138, 10), (20, 2), (20_000, 20), (151_050, 151)])
def test_a_few_unreadable_images_are_no_error_and_many_are(images, most):
    messages = [f"{number}.jpg cannot be read" for number in range(most + 1)]
    check_unreadable(messages[:most], images)
    with pytest.raises(
        InputError, match=rf"{most + 1} of {images} images cannot be read: .*\n  0.jpg cannot be read\n  1"
    ):
        check_unreadable(messages, images)


def test_references_are_prepared_as_at_test_time(tree):
    image = load(tree).load_normal(0)
    expected = Preprocessor(CONFIG).prepare(load_real_iad(tree)[0]["image"]["path"]).tensor
    assert torch.equal(image, expected)


# Labels of patches


@pytest.mark.parametrize("patch_size", [14, 16])
def test_published_labels_of_the_angle_loss_are_the_authors(golden, patch_size):
    labels = published_labels(golden["mask.pixels"][:, 0].bool(), patch_size)
    assert torch.equal(labels[0].bool(), golden[f"mask.patch{patch_size}"].bool())


def test_published_labels_of_the_norm_loss_are_the_authors(golden):
    labels = published_labels(golden["mask.pixels"][:, 0].bool(), 14)
    assert torch.equal(labels[1].bool(), golden["mask.nearest16"].bool())


@pytest.mark.parametrize("count", [32, 33])
def test_a_patch_is_anomalous_above_the_published_threshold(count):
    mask = torch.zeros(1, 28, 42, dtype=torch.bool)
    mask[0, torch.arange(count) // 14 + 14, torch.arange(count) % 14 + 14] = True
    assert int(published_labels(mask, 14)[0].sum()) == (count > 32)


def test_coverage_is_anomalous_from_an_eighth_and_ignored_between():
    mask = torch.zeros(1, 16, 32, dtype=torch.bool)
    mask[0, :4, :8] = True  # an eighth of the first patch
    mask[0, 0, 16] = True  # one pixel of the second
    assert coverage_labels(mask, 16).tolist() == [[[[1, 2]]]] * 2


def test_a_small_defect_makes_its_most_covered_patches_anomalous():
    mask = torch.zeros(2, 16, 48, dtype=torch.bool)
    mask[0, 0, 14:18] = True  # two pixels of each of two patches
    mask[1, 0, 15:18] = True  # one and two
    assert coverage_labels(mask, 16)[0].tolist() == [[[1, 1, 0]], [[2, 1, 0]]]


def test_no_defect_goes_without_an_anomalous_patch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(200, 32, 32, generator=generator) > 1 - torch.rand(200, 1, 1, generator=generator) ** 4
    labels = coverage_labels(masks, 8)[0]
    assert torch.equal((labels == 1).any(dim=(1, 2)), masks.any(dim=(1, 2)))
    empty = ~masks.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).any(dim=4).any(dim=2)
    assert torch.equal(labels == 0, empty)
