"""Core-sets: against a naive greedy oracle, what they promise, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adpretrain_hf import ReferenceBank, coreset
from adpretrain_hf.coreset import choose_core
from adpretrain_hf.errors import InputError


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
