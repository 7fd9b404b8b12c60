"""References: who may be one, patches that are each image's own whatever happens, and matching against them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.matching import nearest_residual, to_rows
from tests.conftest import make_extractor
from tests.processes import kill, start
from training.references import ReferencePatches, ReferencePool, match, nearest_residuals

# The pool: who is in it, what is drawn, and what is said where nothing can be


IMAGES = st.lists(
    st.tuples(st.sampled_from(["bolt", "cap"]), st.sampled_from(["C1", "C2"]), st.booleans()), max_size=40
)


def pool_of(images: list[tuple[str, str, bool]], **options: Any) -> ReferencePool:
    """A pool of images, each given as category, view and whether it is good."""
    categories, views, is_good = zip(*images, strict=True) if images else ((), (), ())
    return ReferencePool(categories, views, is_good, **options)


def images(number: int, category: str = "bolt", view: str = "C1", good: bool = True) -> list:
    return [(category, view, good)] * number


def drawn(pool: ReferencePool, position: int, number: int, seed: int = 0) -> list[int]:
    """The positions that are drawn for an image."""
    return [pool.members[place] for place in pool.draw(position, number, np.random.default_rng(seed))]


@given(IMAGES, st.integers(1, 6) | st.none(), st.integers(0, 3), st.integers(1, 8))
def test_only_good_images_of_the_same_category_and_view_are_drawn(given_images, pool_size, seed, number):
    kinds = {image[:2] for image in given_images}
    good = {kind: [p for p, image in enumerate(given_images) if image == (*kind, True)] for kind in kinds}
    if not all(good.values()):
        with pytest.raises(InputError, match="no good image"):
            pool_of(given_images, pool_size=pool_size)
        return
    pool = pool_of(given_images, pool_size=pool_size, seed=seed)
    assert pool.members == pool.drawn == sorted(set(pool.members))
    for position, image in enumerate(given_images):
        own = [p for p in pool.members if p in good[image[:2]]]
        assert len(own) == min(len(good[image[:2]]), pool_size or len(given_images))
        found = drawn(pool, position, number, seed)
        assert len(found) == number and set(found) <= set(own)
        assert position not in found or own == [position]


def test_a_pool_is_a_fixed_random_choice():
    large = images(200)
    first, again = pool_of(large), pool_of(large)
    assert first.members == again.members and len(first.members) == 64
    assert first.members != pool_of(large, seed=1).members
    assert first.members != list(range(64))
    assert pool_of(large, pool_size=None).members == list(range(200))


def test_two_views_choose_apart_and_other_categories_do_not_matter():
    both = pool_of(images(100) + images(100, view="C2"), pool_size=10).members
    assert [p for p in both if p < 100] != [p - 100 for p in both if p >= 100]
    assert [p for p in both if p < 100] == pool_of(images(100), pool_size=10).members
    with_others = pool_of(images(100) + images(50, "cap"), pool_size=10).members
    assert [p for p in with_others if p < 100] == pool_of(images(100), pool_size=10).members


def test_draws_are_with_replacement_uniform_and_follow_the_generator():
    pool = pool_of(images(5))
    found = drawn(pool, 3, 20_000)
    assert found == drawn(pool, 3, 20_000)
    assert found != drawn(pool, 3, 20_000, seed=1)
    assert np.bincount(found, minlength=5) / 20_000 == pytest.approx([0.25, 0.25, 0.25, 0, 0.25], abs=0.02)


def test_an_image_is_its_own_reference_only_where_it_is_alone():
    assert drawn(pool_of(images(1)), 0, 3) == [0, 0, 0]
    assert drawn(pool_of(images(2)), 0, 3) == [1, 1, 1]
    assert drawn(pool_of(images(1) + images(1, good=False)), 1, 2) == [0, 0]


def test_a_pool_among_some_positions():
    mixed = images(4) + images(2, "cap", good=False)
    assert pool_of(mixed, among=[3, 1, 1]).members == [1, 3]
    with pytest.raises(InputError, match=r"1 categories and views have no good image .*\n  cap C1$"):
        pool_of(mixed)


def test_what_cannot_be_read_is_drawn_no_more():
    pool = pool_of(images(3) + images(1, "cap"))
    pool.leave_out([1])
    assert pool.members == [0, 1, 2, 3] and pool.drawn == [0, 2, 3]
    assert set(drawn(pool, 1, 50)) == {0, 2}
    with pytest.raises(InputError, match=r"no good image to be a reference: .*\n  cap C1$"):
        pool.leave_out([3])


def test_a_pool_says_what_it_lacks():
    with pytest.raises(InputError, match=r"(?s)12 categories .*\n  bolt0 C1\n.*\n  bolt9 C1\n  and 2 more$"):
        pool_of([(f"bolt{number}", "C1", False) for number in range(12)])


# Patches: each image's own, encoded once, whatever was there before and whoever else encodes


PICTURES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KEYS = [f"image {number}" for number in range(8)]


class Loads:
    """Gives the pictures, and counts how often."""

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.positions: list[int] = []
        self.broken = broken

    def __call__(self, position: int) -> Tensor:
        self.positions.append(position)
        if position in self.broken:
            raise ImageError(f"{position}.png cannot be read")
        return PICTURES[position]


def patches_of(
    backbone: Path, file: Path, load: Loads | None = None, keys: Sequence[str] = KEYS, **options: Any
) -> ReferencePatches:
    extractor = make_extractor(backbone, **options)
    return ReferencePatches(extractor, load or Loads(), pool_of(images(8)), keys, file=file)


def expected(backbone: Path, places: Sequence[int], **options: Any) -> list[Tensor]:
    extractor = make_extractor(backbone, **options)
    alone = [extractor.encode(PICTURES[place : place + 1]) for place in places]
    return [torch.cat([to_rows(level) for level in levels]).half() for levels in zip(*alone, strict=True)]


def test_gathered_patches_are_what_encoding_an_image_alone_gives(tiny_folder, tmp_path):
    patches = patches_of(tiny_folder, tmp_path / "r.bin")
    levels = patches.gather(torch.tensor([[3, 1, 3], [0, 7, 2]]))
    assert [tuple(level.shape) for level in levels] == [(2, 3 * 16, 32)] * 4
    for level, first, second in zip(
        levels, expected(tiny_folder, [3, 1, 3]), expected(tiny_folder, [0, 7, 2]), strict=True
    ):
        assert torch.equal(level, torch.stack([first, second]))


def test_a_later_start_finds_what_is_encoded(tiny_folder, tmp_path):
    first, again = (patches_of(tiny_folder, tmp_path / "r.bin", loads := Loads()) for _ in range(2))
    assert not loads.positions
    index = torch.arange(8)[None]
    assert all(map(torch.equal, first.gather(index), again.gather(index)))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"size": 3}, {"keys": ["touched", *KEYS[1:]]}, {"precision": "bfloat16"}]
)
def test_another_run_on_the_same_cache_leaves_the_patches_of_this_one(tiny_folder, tmp_path, change):
    def begin(seed: int = 0, size: int = 4, keys: Sequence[str] = KEYS, precision: str = "float32") -> ReferencePatches:
        pool = pool_of(images(8), pool_size=size, seed=seed)
        file = tmp_path / "r.bin"
        return ReferencePatches(make_extractor(tiny_folder), loads, pool, keys, file=file, precision=precision)

    index, loads = torch.arange(4)[None], Loads()
    this = begin()
    before = this.gather(index)
    loads.positions.clear()
    other = begin(**change)
    assert sorted(loads.positions) == other._pool.members
    assert all(map(torch.equal, this.gather(index), before))


@pytest.mark.parametrize("change", [{"image_size": 64}, {"layers": (1, 2)}, {"normalize_tokens": False}])
def test_another_extractor_is_not_served_from_the_old_file(tiny_folder, tmp_path, change, monkeypatch):
    patches_of(tiny_folder, tmp_path / "r.bin")
    monkeypatch.setattr(
        "tests.training.test_references.PICTURES", torch.randn(8, 3, *[change.get("image_size", 32)] * 2)
    )
    patches = patches_of(tiny_folder, tmp_path / "r.bin", loads := Loads(), **change)
    assert sorted(loads.positions) == list(range(8))
    for level, alone in zip(patches.gather(torch.tensor([[4]])), expected(tiny_folder, [4], **change), strict=True):
        assert torch.equal(level[0], alone)


def test_images_that_cannot_be_read_are_drawn_no_more(tiny_folder, tmp_path, caplog):
    extractor, pool = make_extractor(tiny_folder), pool_of(images(8))
    ReferencePatches(extractor, Loads(broken=(2, 6)), pool, KEYS, file=tmp_path / "r.bin")
    assert pool.drawn == [0, 1, 3, 4, 5, 7]
    assert "left out as a reference: 2.png cannot be read" in caplog.text


def fill(backbone: Path, file: Path) -> None:
    patches_of(backbone, file)


def test_killed_while_it_encodes_it_goes_on(tiny_folder, tmp_path):
    whole = patches_of(tiny_folder, tmp_path / "whole.bin").gather(torch.arange(8)[None])
    for _ in range(3):
        process = start(fill, tiny_folder, tmp_path / "r.bin")
        while not [*tmp_path.glob("r-*.bin")] and process.is_alive():
            process.join(0.002)
        kill(process)
    assert all(map(torch.equal, patches_of(tiny_folder, tmp_path / "r.bin").gather(torch.arange(8)[None]), whole))


def test_two_processes_may_fill_one_file(tiny_folder, tmp_path):
    whole = patches_of(tiny_folder, tmp_path / "whole.bin").gather(torch.arange(8)[None])
    processes = [start(fill, tiny_folder, tmp_path / "r.bin") for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = patches_of(tiny_folder, tmp_path / "r.bin", loads := Loads()).gather(torch.arange(8)[None])
    assert not loads.positions
    assert all(map(torch.equal, found, whole))


def test_tokens_that_float16_cannot_hold_are_refused(tiny_folder, tmp_path):
    extractor = make_extractor(tiny_folder, normalize_tokens=False)
    extractor.backbone.register_forward_hook(lambda module, inputs, maps: [1e5 * level for level in maps])
    with pytest.raises(InputError, match=r"image 0 do not fit torch.float16, .*use --normalize-tokens"):
        ReferencePatches(extractor, Loads(), pool_of(images(8)), KEYS, file=tmp_path / "r.bin")


# Matching: the choice and the numbers of the package's, for all images at once


@pytest.mark.parametrize("at_a_time", [2**28, 1])
def test_every_image_is_compared_with_its_own_references(monkeypatch, at_a_time):
    monkeypatch.setattr("training.references._SIMILARITIES", at_a_time)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 5, 2, 4, generator=generator)  # 2 B, C, h, w
    references = torch.randn(3, 7, 5, generator=generator).half()
    (got,) = match([maps], [references], [2.0])
    for view, image in itertools.product(range(2), range(3)):
        row = 3 * view + image
        alone = nearest_residual(maps[row : row + 1], references[image].float())
        torch.testing.assert_close(got[row : row + 1], 2 * alone)


def test_products_are_of_float32_whatever_autocast_says():
    queries, references = torch.randn(2, 9, 64), torch.randn(2, 33, 64).half()
    plain = nearest_residuals(queries, references)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_residuals(queries, references), plain)


def test_a_reference_of_length_zero_is_not_nearest():
    references = torch.cat([torch.zeros(1, 1, 4), torch.ones(1, 1, 4)], dim=1).half()
    assert not nearest_residuals(torch.ones(1, 3, 4), references).any()


# Statistics: of the pool's images against others, in closed form


def test_statistics_are_the_means_over_all_patches(tiny_folder, tmp_path):
    patches = patches_of(tiny_folder, tmp_path / "r.bin")
    centers, mean_norms = patches.statistics(seed=3)
    from training.seeds import generator

    residuals: list[list[Tensor]] = []
    for position in range(8):
        others = patches._pool.draw(position, 4, generator(3, "center", position))
        own, references = expected(tiny_folder, [position]), expected(tiny_folder, others.tolist())
        residuals.append([nearest_residuals(o[None], r[None])[0] for o, r in zip(own, references, strict=True)])
    for level, rows in enumerate(zip(*residuals, strict=True)):
        torch.testing.assert_close(centers[level], torch.cat(rows).mean(dim=0))
        assert mean_norms[level] == pytest.approx(float(torch.cat(rows).norm(dim=1).mean()))


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0"), (float("nan"), "nan")])
def test_residuals_without_a_length_are_refused(tiny_folder, tmp_path, monkeypatch, value, text):
    patches = patches_of(tiny_folder, tmp_path / "r.bin")
    gather = patches.gather
    monkeypatch.setattr(patches, "gather", lambda drawn: [gather(drawn)[0], torch.full_like(gather(drawn)[1], value)])
    with pytest.raises(InputError, match=rf"normal residuals of level 1 are {text} long on average, expected a finite"):
        patches.statistics(seed=3)
