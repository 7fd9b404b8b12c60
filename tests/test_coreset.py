"""Core-sets and choices of images: against naive oracles, what they promise, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adpretrain_hf import ReferenceBank
from adpretrain_hf.errors import InputError
from adpretrain_hf.reference import choose_core, choose_images, coreset, describe_images
from tests.conftest import make_extractor, random_image


def naive_core(rows: torch.Tensor, count: int, seed: int) -> list[int]:
    unit = F.normalize(rows, dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[: (count + 1) // 2].tolist()
    while len(chosen) < count:
        closest = (unit @ unit[chosen].T).amax(dim=1)
        closest[chosen] = torch.inf
        chosen.append(int(closest.argmin()))
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    share=st.floats(0.01, 1),
    candidates=st.sampled_from([1, 2, 5, 256]),
    block=st.sampled_from([1, 7, 4096]),
    seed=st.integers(0, 5),
)
def test_the_same_rows_as_one_at_a_time(n, share, candidates, block, seed):
    rows = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    count = max(1, round(share * n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "_CANDIDATES", candidates)
        patch.setattr(coreset, "_BLOCK", block)
        chosen = choose_core(rows, count, seed=seed)
    assert chosen.tolist() == naive_core(rows, count, seed)


def test_equal_rows_are_chosen_once_each():
    assert sorted(choose_core(torch.ones(10, 4), 10).tolist()) == list(range(10))
    assert len(set(choose_core(torch.zeros(300, 4), 290).tolist())) == 290


def test_what_is_rare_is_kept():
    torch.manual_seed(0)
    common = F.normalize(torch.randn(1, 32), dim=1) + 0.02 * torch.randn(5000, 32)
    rare = torch.randn(20, 32)  # 20 directions of their own
    core = torch.cat([common, rare])[choose_core(torch.cat([common, rare]), 100)]
    nearest = (F.normalize(rare, dim=1) @ F.normalize(core, dim=1).T).amax(dim=1)
    torch.testing.assert_close(nearest, torch.ones(20))


def test_nearer_on_average_and_at_worst_than_chance():
    torch.manual_seed(0)
    rows = torch.randn(3000, 8) * torch.tensor([4.0, 2, 1, 1, 1, 0.5, 0.5, 0.5]).exp()
    unit = F.normalize(rows, dim=1)
    by_core, by_chance = ((unit @ unit[kept].T).amax(dim=1) for kept in (choose_core(rows, 300), torch.arange(300)))
    assert by_core.mean() > by_chance.mean()
    assert by_core.min() > by_chance.min()


def bank_of(patches: int) -> ReferenceBank:
    torch.manual_seed(0)
    levels = [torch.randn(patches, 16), torch.randn(patches, 16)]
    return ReferenceBank(levels, fingerprint="f", category="screw", num_images=4)


def test_a_compacted_bank():
    bank = bank_of(80)
    compacted = bank.compact(0.25, seed=3)
    assert (len(compacted), len(compacted.patches), compacted.compacted) == (20, 2, True)
    assert (compacted.fingerprint, compacted.category, compacted.num_images) == ("f", "screw", 4)
    for level, whole in zip(compacted.patches, bank.patches, strict=True):
        assert torch.equal(level, whole[choose_core(whole, 20, seed=3)])
    again, other = bank.compact(0.25, seed=3), bank.compact(0.25, seed=4)
    assert torch.equal(again.patches[0], compacted.patches[0])
    assert not torch.equal(other.patches[0], compacted.patches[0])


def test_a_compacted_bank_stays_one_on_disk_and_in_another_precision(tmp_path):
    compacted = bank_of(80).compact(0.25).to(dtype=torch.float16)
    compacted.save(tmp_path / "bank.safetensors")
    loaded = ReferenceBank.load(tmp_path / "bank.safetensors")
    assert loaded.compacted and loaded.patches[0].dtype == torch.float16
    assert torch.equal(loaded.patches[1], compacted.patches[1])


def test_no_image_can_be_left_out_of_a_compacted_bank():
    with pytest.raises(InputError, match=r"cannot leave an image out of a compacted bank: .* first, then compact"):
        bank_of(80).compact(0.25).without_image(0)
    assert len(bank_of(80).without_image(0).compact(0.5)) == 30


@pytest.mark.parametrize(("fraction", "patches"), [(1, 80), (0.001, 1), (0.99999, 80)])
def test_extreme_fractions(fraction, patches):
    assert len(bank_of(80).compact(fraction)) == patches


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_fractions_out_of_range(fraction):
    with pytest.raises(InputError, match=rf"the fraction of patches to keep is {fraction}, expected .* above 0 .* 1"):
        bank_of(8).compact(fraction)


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_images_are_the_medoid_and_then_the_farthest():
    described = directions(70, 3, 0, -2, 100, -60, 30)  # their sum points to 19 degrees
    order = [6, 5, 4, 3, 0, 1, 2]
    for length in (0.1, 1, 20):
        assert choose_images(length * described, 7).tolist() == order


def test_no_more_images_are_chosen_than_there_are():
    assert sorted(choose_images(directions(0, 90), 8).tolist()) == [0, 1]
    assert choose_images(directions(10, 10, 10, 10), 3).unique().numel() == 3


def test_every_level_counts_as_much_whatever_its_length():
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    described = describe_images([first, second])
    torch.testing.assert_close(described.unflatten(1, (2, 3)).norm(dim=2), torch.ones(2, 2))
    torch.testing.assert_close(describe_images([50 * first, second]), described)


def test_a_bank_of_chosen_images_is_that_of_these_images(tiny_folder):
    """Of three pictures and near copies of theirs, one of each; the same ones in whatever batches they are seen."""
    extractor = make_extractor(tiny_folder)
    prepared = extractor.preprocess([random_image(seed) for seed in (1, 1, 2, 1, 3, 2, 1)])
    prepared = prepared + 0.01 * torch.randn(prepared.shape)
    bank = extractor.make_reference(prepared, select=3, augment_references="flips", batch_size=2)
    assert (bank.num_images, len(bank.images)) == (3, 3)
    whole = extractor.make_reference(prepared)
    places = [whole.images.index(digest) for digest in bank.images]
    assert places == sorted(places)
    assert {(1, 1, 2, 1, 3, 2, 1)[place] for place in places} == {1, 2, 3}
    expected = extractor.make_reference(prepared[places], augment_references="flips")
    assert all(torch.allclose(*levels, atol=1e-5) for levels in zip(bank.patches, expected.patches, strict=True))
    assert extractor.make_reference(prepared, select=3).images == bank.images
    assert extractor.make_reference(prepared, select=99).images == whole.images


@pytest.mark.parametrize(
    ("images", "select", "message"),
    [
        ([], 2, "no images were given"),
        (0, 0, "select is 0, exp"),
        (0, "8", "select is '8', expected an integer >= 1"),
        (0, 2.5, "select is 2.5, exp"),
    ],
)
def test_images_that_cannot_be_chosen_are_refused(extractor, images, select, message):
    with pytest.raises(InputError, match=message):
        extractor.make_reference([random_image(1)] if images == 0 else iter(images), select=select)
