"""Remembered features: the numbers of computed ones, without computing them, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.integrations.anomalib import DetectorFeatures
from tests.conftest import make_extractor
from training.evaluation.memory import Memory, exact_digest, look_up
from training.evaluation.remember import CategoryReferences, RememberedBackbone, RememberedFeatures

MEGABYTE = 2**20
NAMES = ("a.png", "b.png", "c.png")


class Counting(nn.Module):
    """A backbone that counts the images it is given."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.images = backbone, 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.images += len(images)
        return self.backbone(images)


def images(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def counting(extractor: ADPretrainFeatureExtractor) -> Counting:
    counting = Counting(extractor.backbone)
    extractor.set_submodule("backbone", counting)
    return counting


# Memory


def test_what_was_not_asked_for_longest_goes_first() -> None:
    memory = Memory(24)  # six floats
    for key in "abc":
        memory.put(key, [torch.full((2,), float(ord(key)))])
    assert memory.get("a") is not None  # asked for: b is the oldest now
    memory.put("d", [torch.zeros(2)])
    assert memory.get("b") is None
    assert all(memory.get(key) is not None for key in "acd")


def test_what_is_larger_than_the_memory_is_not_kept() -> None:
    memory = Memory(8)
    memory.put("a", [torch.zeros(1)])
    memory.put("b", [torch.zeros(3)])
    assert memory.get("b") is None
    maps = look_up(memory, ["b", "b"], lambda place: [torch.full((1, 3, 1, 1), place)])
    assert maps[0].flatten(1).tolist() == [[0] * 3, [1] * 3]


@settings(max_examples=50, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=30))
def test_memory_is_bounded_and_holds_what_was_put_last(steps: list[tuple[int, int]]) -> None:
    memory, last = Memory(10 * 4), {}
    for key, size in steps:
        memory.put(key, [torch.full((size,), float(key)), torch.zeros(1)])
        last[key] = size
        kept = {one: tensors for one in range(6) if (tensors := memory.get(one)) is not None}
        assert key in kept
        assert sum(tensor.numel() for tensors in kept.values() for tensor in tensors) <= 10
        assert all(tensors[0].tolist() == [one] * last[one] for one, tensors in kept.items())


def test_a_view_is_kept_without_the_batch_that_it_is_of() -> None:
    memory, batch = Memory(MEGABYTE), torch.zeros(100, 4)
    memory.put("a", [batch[3]])
    kept = memory.get("a")
    assert kept is not None
    assert kept[0].untyped_storage().nbytes() == 16


def test_the_identity_of_an_image_is_of_every_value_and_its_shape() -> None:
    image = images(1)[0]
    changed = image.clone()
    changed[1, 17, 5] += 1e-6
    assert exact_digest(image) == exact_digest(image.clone())
    assert len({exact_digest(one) for one in (image, changed, image.reshape(3, 16, 64))}) == 3


# The backbone


def test_each_image_is_encoded_once(extractor: ADPretrainFeatureExtractor, counting: Counting) -> None:
    batch = images(5)
    fresh = extractor.encode(batch)
    extractor.set_submodule("backbone", RememberedBackbone(counting, Memory(MEGABYTE)))
    counting.images = 0
    first, again = extractor.encode(batch[:3]), extractor.encode(batch.flip(0))
    assert counting.images == 5
    for computed, one, other in zip(fresh, first, again, strict=True):
        torch.testing.assert_close(one, computed[:3])
        assert torch.equal(other.flip(0)[:3], one)


def test_an_image_is_encoded_the_same_in_any_company(extractor: ADPretrainFeatureExtractor) -> None:
    batch = images(7)
    backbone = extractor.backbone
    whole = RememberedBackbone(backbone, Memory(MEGABYTE))(batch)
    parts = [RememberedBackbone(backbone, Memory(MEGABYTE))(part) for part in batch.split([1, 4, 2])]
    assert all(torch.equal(level, torch.cat(some)) for level, some in zip(whole, zip(*parts, strict=True), strict=True))


# Features


@pytest.mark.parametrize("kind", ["raw", "residual", "pretrained"])
def test_features_are_those_of_the_extractor(extractor: ADPretrainFeatureExtractor, kind: str) -> None:
    bank, batch = extractor.make_reference(images(3, seed=1)), images(4)
    plain = DetectorFeatures(extractor, kind, levels=[2, 4])
    plain.set_reference(bank)
    expected = plain(batch)
    remembered = RememberedFeatures(DetectorFeatures(extractor, kind, levels=[2, 4]), Memory(MEGABYTE))
    remembered.set_reference(bank)
    assert remembered.layers == ["layer2", "layer4"]
    assert remembered.out_dims == [32, 32]
    computed, looked_up = remembered(batch), remembered(batch)
    for name, level in expected.items():
        torch.testing.assert_close(computed[name], level)
        assert torch.equal(looked_up[name], computed[name])


def test_what_is_remembered_is_not_computed(extractor: ADPretrainFeatureExtractor, counting: Counting) -> None:
    memory = Memory(MEGABYTE)
    bank = extractor.make_reference(images(3, seed=1))
    counting.images = 0
    for _ in range(2):  # another detector, with the same memory
        features = RememberedFeatures(DetectorFeatures(extractor), memory)
        features.set_reference(bank)
        features(images(4))
    assert counting.images == 4


def test_kinds_levels_variants_and_references_are_kept_apart(tiny_folder: Path) -> None:
    memory, batch = Memory(MEGABYTE), images(2)
    angle, norm = (make_extractor(tiny_folder, seed=seed) for seed in (1, 2))
    norm.variant = "norm"
    banks = [angle.make_reference(images(2, seed=seed)) for seed in (1, 2)]
    for _ in range(2):
        for extractor, kind, bank, levels in (
            (angle, "raw", banks[0], [1, 2]),
            (angle, "residual", banks[0], [1, 2]),
            (angle, "residual", banks[1], [1, 2]),
            (angle, "pretrained", banks[0], [1, 2]),
            (angle, "pretrained", banks[0], [1, 2, 3]),
            (norm, "pretrained", banks[0], [1, 2, 3]),
        ):
            plain = DetectorFeatures(extractor, kind, levels)
            remembered = RememberedFeatures(DetectorFeatures(extractor, kind, levels), memory)
            for one in (plain, remembered):
                one.set_reference(bank)
            torch.testing.assert_close(remembered(batch), plain(batch))


def test_a_reference_is_compared_with_the_others(extractor: ADPretrainFeatureExtractor) -> None:
    batch = images(3)
    plain = DetectorFeatures(extractor, "residual")
    remembered = RememberedFeatures(DetectorFeatures(extractor, "residual"), Memory(MEGABYTE))
    for one in (plain, remembered):
        one.set_reference(extractor.make_reference(batch), NAMES)
        one.note_own(["x.png", "c.png", "b.png"])
    assert remembered.own == plain.own == [None, 2, 1]
    torch.testing.assert_close(remembered(batch), plain(batch))
    remembered.note_own([])
    assert all((level == 0).all() for level in remembered(batch).values())


def test_images_of_several_categories_are_compared_with_their_own(extractor: ADPretrainFeatureExtractor) -> None:
    batch, others = images(3), images(3, seed=9)
    first = CategoryReferences(extractor.make_reference(batch), NAMES)
    second = CategoryReferences(extractor.make_reference(others), ("d.png", "e.png", "f.png"))
    of_path = {"b.png": first, "e.png": second, "y.png": second}
    remembered = RememberedFeatures(DetectorFeatures(extractor, "residual"), Memory(MEGABYTE), of_path)
    remembered.note_own(["b.png", "e.png", "y.png"])
    got = remembered(torch.stack([batch[1], others[1], batch[2]]))
    plain = DetectorFeatures(extractor, "residual")
    for row, (references, image, own) in enumerate(
        [(first, batch[1:2], 1), (second, others[1:2], 1), (second, batch[2:3], None)]
    ):
        plain.set_reference(references.bank)
        plain.own = [own]
        expected = plain(image)
        assert all(torch.equal(got[name][row], level[0]) for name, level in expected.items())


def test_images_without_references_are_refused(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    remembered = RememberedFeatures(DetectorFeatures(extractor), Memory(MEGABYTE))
    with pytest.raises(ValueError, match="no reference is set"):
        remembered(images(1))
