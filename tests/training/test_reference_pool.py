"""ReferencePool: who is in it, what is drawn, and what is said where nothing can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf.errors import InputError
from training.reference_pool import ReferencePool

IMAGES = st.lists(
    st.tuples(st.sampled_from(["bolt", "cap"]), st.sampled_from(["C1", "C2"]), st.booleans()), max_size=40
)


def pool_of(images: list[tuple[str, str, bool]], **options: Any) -> ReferencePool:
    """A pool of images, each given as category, view and whether it is anomalous."""
    categories, views, is_anomalous = zip(*images, strict=True) if images else ((), (), ())
    return ReferencePool(categories, views, is_anomalous, **options)


def images(number: int, category: str = "bolt", view: str = "C1", anomalous: bool = False) -> list:
    return [(category, view, anomalous)] * number


@given(IMAGES, st.integers(1, 6) | st.none(), st.integers(0, 3), st.integers(1, 8))
def test_only_normal_images_of_the_same_category_and_view_are_drawn(given_images, pool_size, seed, number):
    keys = {image[:2] for image in given_images}
    normal = {key: [p for p, image in enumerate(given_images) if image == (*key, False)] for key in keys}
    if not all(normal.values()):
        with pytest.raises(InputError, match="no normal image"):
            pool_of(given_images, pool_size=pool_size)
        return
    pool = pool_of(given_images, pool_size=pool_size, seed=seed)
    members = pool.members
    assert members == sorted(set(members))
    for key, positions in normal.items():
        own = [p for p in members if p in positions]
        assert len(own) == min(len(positions), pool_size or len(positions))
        for exclude in (None, *own):
            drawn = pool.draw(*key, number, np.random.default_rng(seed), exclude=exclude)
            assert len(drawn) == number and set(drawn) <= set(own)
            assert exclude is None or exclude not in drawn or own == [exclude]


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
    drawn = pool.draw("bolt", "C1", 20_000, np.random.default_rng(0), exclude=3)
    assert drawn == pool.draw("bolt", "C1", 20_000, np.random.default_rng(0), exclude=3)
    assert drawn != pool.draw("bolt", "C1", 20_000, np.random.default_rng(1), exclude=3)
    shares = np.bincount(drawn, minlength=5) / 20_000
    assert shares == pytest.approx([0.25, 0.25, 0.25, 0, 0.25], abs=0.02)
    assert all(isinstance(position, int) for position in drawn)


def test_an_image_is_its_own_reference_only_where_it_is_alone():
    assert pool_of(images(1)).draw("bolt", "C1", 3, np.random.default_rng(0), exclude=0) == [0, 0, 0]
    assert pool_of(images(2)).draw("bolt", "C1", 3, np.random.default_rng(0), exclude=0) == [1, 1, 1]


def test_an_anomalous_image_or_one_outside_the_pool_excludes_nothing():
    pool = pool_of(images(1) + images(1, anomalous=True))
    assert pool.draw("bolt", "C1", 2, np.random.default_rng(0), exclude=1) == [0, 0]


def test_among_some_positions():
    mixed = images(4) + images(2, "cap", anomalous=True)
    assert pool_of(mixed, among=[3, 1, 1]).members == [1, 3]
    with pytest.raises(InputError, match=r"1 categories and views have no normal image .*: cap C1\."):
        pool_of(mixed)


def test_without_what_cannot_be_read():
    pool = pool_of(images(3) + images(1, "cap"))
    smaller = pool.without([1])
    assert smaller.members == [0, 2, 3] and pool.members == [0, 1, 2, 3]
    assert set(smaller.draw("bolt", "C1", 50, np.random.default_rng(0))) == {0, 2}
    with pytest.raises(InputError, match="no normal image to be a reference: cap C1"):
        pool.without([3])


def test_errors():
    with pytest.raises(InputError, match=r"12 categories .*: bolt0 C1, .*, bolt9 C1 and 2 more"):
        pool_of([(f"bolt{number}", "C1", True) for number in range(12)])
    with pytest.raises(InputError, match="got 2 categories, 1 views and 2 labels"):
        ReferencePool(["a", "b"], ["C1"], [False, False])
    with pytest.raises(InputError, match="pool_size is 0, expected at least 1, or None"):
        pool_of(images(1), pool_size=0)
    with pytest.raises(InputError, match="no references of category 'cap' and view 'C1'"):
        pool_of(images(1)).draw("cap", "C1", 1, np.random.default_rng(0))
