"""What is drawn: nested, paired, never tested on as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf.errors import InputError
from training.data.folders import Category
from training.data.table import Row
from training.evaluation.data import views
from training.evaluation.draws import draw_few_shot, draw_training, read_reference_lists
from training.evaluation.plan import Cell


def row(path: object, is_anomalous: bool = False, kind: str = "good", view: str = "", is_good: bool = True) -> Row:
    return Row(str(path), None, "bolt", view, kind, is_anomalous, is_good and not is_anomalous, "1")


def category(train: int = 20, normal: int = 5, anomalous: int = 15) -> Category:
    def samples(kind: str, number: int, is_anomalous: bool = False) -> tuple[Row, ...]:
        return tuple(row(f"/data/{kind}/{n:03}.png", is_anomalous, kind) for n in range(number))

    return Category(
        "mvtecad", "bolt", samples("train", train), samples("good", normal) + samples("bad", anomalous, True)
    )


def cell(**changes) -> Cell:
    settings = {"shots": 4, "noise": 0.0, "fraction": 1.0, "seed": 0} | changes
    return Cell("mvtecad", "bolt", "patchcore", "raw", "", **settings)


shots = st.integers(1, 8)
noises = st.sampled_from([0.0, 0.05, 0.1, 0.2])
fractions = st.sampled_from([0.05, 0.1, 0.5, 1.0])


@given(shots=shots, noise=noises, fraction=fractions, seed=st.integers(0, 50))
def test_sizes_and_no_image_is_trained_and_tested_on(shots, noise, fraction, seed):
    drawn = draw_training(category(), cell(shots=shots, noise=noise, fraction=fraction, seed=seed))
    assert len(drawn.references) == shots == len(set(drawn.references))
    noisy = [sample for sample in drawn.train if sample.is_anomalous]
    assert len(drawn.train) - len(noisy) == {0.05: 1, 0.1: 2, 0.5: 10, 1.0: 20}[fraction]
    assert (len(noisy) > 0) == (noise > 0)
    if fraction == 1.0:
        assert len(noisy) / len(drawn.train) == pytest.approx(noise, abs=0.03)
    assert not set(drawn.train) & set(drawn.test)
    assert set(drawn.test) | set(noisy) == set(category().test)
    assert draw_training(category(), cell(shots=shots, noise=noise, fraction=fraction, seed=seed)) == drawn


@given(few=shots, many=shots, noise=noises, seed=st.integers(0, 50))
def test_fewer_shots_are_the_first_of_more(few, many, noise, seed):
    few, many = sorted((few, many))
    first = draw_training(category(), cell(shots=few, noise=noise, seed=seed)).references
    assert draw_training(category(), cell(shots=many, noise=noise, seed=seed)).references[:few] == first


@given(small=fractions, large=fractions, seed=st.integers(0, 50))
def test_a_fraction_is_part_of_a_larger_one(small, large, seed):
    small, large = sorted((small, large))
    part, whole = (draw_training(category(), cell(fraction=one, seed=seed)) for one in (small, large))
    assert set(part.train) <= set(whole.train)
    assert part.references == whole.references


@given(number=shots, noise=noises, fraction=fractions, seed=st.integers(0, 50))
def test_references_are_of_the_training_images_as_far_as_there_are_so_many(number, noise, fraction, seed):
    drawn = draw_training(category(), cell(shots=number, noise=noise, fraction=fraction, seed=seed))
    within = min(number, len(drawn.train))
    assert drawn.references[:within] == drawn.train[:within]
    assert set(drawn.references) <= set(drawn.train) or number > len(drawn.train)


@pytest.mark.parametrize(("fraction", "number"), [(0.07, 7), (0.55, 55), (0.071, 8), (1e-12, 1)])
def test_fractions_are_rounded_up_but_not_for_an_error_of_rounding(fraction, number):
    assert len(draw_training(category(train=100), cell(fraction=fraction)).train) == number


@given(little=noises, much=noises, seed=st.integers(0, 50))
def test_little_noise_is_part_of_more(little, much, seed):
    little, much = sorted((little, much))
    less, more = (draw_training(category(), cell(noise=one, seed=seed)) for one in (little, much))
    assert set(less.train) <= set(more.train)


def test_seeds_and_categories_draw_differently():
    other = Category("mvtecad", "nut", *(getattr(category(), part) for part in ("train", "test")))
    draws = [draw_training(category(), cell(seed=seed)).references for seed in range(5)]
    draws.append(draw_training(other, cell()).references)
    assert len(set(draws)) == 6


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_noise_reaches_the_references_as_it_does_the_training_images(fraction):
    many = category(train=200, anomalous=100)
    settings = {"noise": 0.2, "fraction": fraction, "shots": 8}
    drawn = [draw_training(many, cell(seed=seed, **settings)).references for seed in range(100)]
    share = sum(sample.is_anomalous for references in drawn for sample in references) / 800
    assert share == pytest.approx(0.2, abs=0.05)


def test_too_much_is_refused():
    with pytest.raises(InputError, match="bolt has 3 training images, fewer than 4 shots"):
        draw_training(category(train=3), cell())
    with pytest.raises(
        InputError, match=r"noise 0\.2 takes 5 of 5 anomalous images of bolt: at least one must be left"
    ):
        draw_training(category(anomalous=5), cell(noise=0.2))


def test_fixed_references_take_the_place_of_drawn_ones(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "lists.json").write_text(json.dumps({"bolt": ["a.png", "b.png", "c.png"]}))
    lists = read_reference_lists(tmp_path / "lists.json")
    drawn = draw_training(category(), cell(shots=2), lists["bolt"])
    assert [Path(sample.image) for sample in drawn.references] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert drawn.train == draw_training(category(), cell(shots=2)).train
    with pytest.raises(InputError, match="the list for bolt has 3 references, fewer than 4 shots"):
        draw_training(category(), cell(), lists["bolt"])
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match=r"the list for bolt names images that are not there: .*b\.png"):
        draw_training(category(), cell(shots=2), lists["bolt"])


def test_reference_that_is_trained_on_is_the_same_sample(tmp_path):
    train = tuple(row(tmp_path / f"{n}.png") for n in range(5))
    Path(train[3].image).touch()
    drawn = draw_training(Category("mvtecad", "bolt", train, category().test), cell(shots=1), [Path(train[3].image)])
    assert drawn.references == (train[3],)


def test_reference_is_recognised_however_its_path_is_written(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    train = tuple(row(tmp_path / f"data/{n}.png") for n in range(5))
    Path(train[3].image).touch()
    for written in ("../data/3.png", "../link/3.png"):
        (tmp_path / "lists/list.json").write_text(json.dumps({"bolt": [written]}))
        listed = read_reference_lists(tmp_path / "lists/list.json")["bolt"]
        drawn = draw_training(Category("mvtecad", "bolt", train, category().test), cell(shots=1), listed)
        assert drawn.references == (train[3],)


def test_list_of_what_is_tested_or_twice_the_same_is_refused(tmp_path):
    test = tuple(row(tmp_path / f"{n}.png", n > 0) for n in range(3))
    (tmp_path / "0.png").touch()
    (tmp_path / "reference.png").touch()
    one = Category("mvtecad", "bolt", category().train, test)
    with pytest.raises(InputError, match=r"the list for bolt names images that are tested on: .*0\.png"):
        draw_training(one, cell(shots=1), [tmp_path / "0.png"])
    with pytest.raises(InputError, match="the list for bolt names an image twice among its first 2"):
        draw_training(one, cell(shots=2), [tmp_path / "reference.png"] * 2)


@pytest.mark.parametrize("text", ["[]", '{"bolt": "a.png"}', '{"bolt": []}', '{"bolt": [1]}'])
def test_lists_of_another_form_are_refused(text, tmp_path):
    (tmp_path / "lists.json").write_text(text)
    with pytest.raises(InputError, match=r"is not of the form \{category: \[paths of reference images\]\}"):
        read_reference_lists(tmp_path / "lists.json")


def test_lists_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_reference_lists(tmp_path / "none.json")
    (tmp_path / "lists.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_reference_lists(tmp_path / "lists.json")


# A few references, which are all that is trained on


def two_views(normal: int = 6, anomalous: int = 3, damaged: int = 2) -> Category:
    """Views C1 and C2 of parts; of the damaged ones some images show no damage."""

    def samples(kind: str, number: int, is_anomalous: bool, defect: str) -> list[Row]:
        return [
            row(f"/data/{kind}/{n:03}_{view}.png", is_anomalous, defect, view, defect == "OK")
            for n in range(number)
            for view in ("C1", "C2")
        ]

    good = samples("OK", normal, False, "OK")
    test = [*samples("NG", anomalous, True, "AK"), *samples("NG-clean", damaged, False, "AK")]
    return Category.of("realiad", "bolt", good[: len(good) // 2], [*good[len(good) // 2 :], *test])


@given(shots=st.integers(2, 5), seed=st.integers(0, 50), view=st.sampled_from(["C1", "C2"]))
def test_few_shot_trains_on_the_references_of_a_view_and_tests_on_all_its_others(shots, seed, view):
    whole = two_views()
    drawn = draw_few_shot(whole, cell(shots=shots, seed=seed, view=view))
    assert drawn.references == drawn.train and len(set(drawn.train)) == shots
    assert {sample.anomaly_class for sample in drawn.references} == {
        "OK"
    }  # of damaged parts none, even where none shows
    own = {sample for sample in (*whole.train, *whole.test) if sample.view == view}
    assert set(drawn.test) == own - set(drawn.references) and len(drawn.test) == len(own) - shots


def test_references_are_of_undamaged_parts():
    whole = two_views()
    train = (*whole.train, *(sample for sample in whole.test if not (sample.is_good or sample.is_anomalous)))
    for seed in range(10):
        drawn = draw_training(replace(whole, train=train), cell(shots=6, seed=seed))
        assert len(drawn.references) == 6 and all(sample.is_good for sample in drawn.references)
        assert set(drawn.train) == set(train)


def test_few_shot_draws_depend_on_names_and_seed():
    whole = two_views()
    drawn = [draw_few_shot(whole, cell(seed=seed, view="C1", shots=3)).references for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert draw_few_shot(replace(whole, name="nut"), cell(seed=0, view="C1", shots=3)).references != drawn[0]


@pytest.mark.parametrize("shots", [7, 8])
def test_few_shot_needs_an_image_more_than_references(shots):
    with pytest.raises(
        InputError, match=f"bolt C1 has 8 normal images, 6 of them of undamaged parts: .* {shots} shots"
    ):
        draw_few_shot(two_views(), cell(shots=shots, view="C1"))


def test_views_are_those_that_show_anomalies():
    whole = two_views()
    assert views(whole) == ["C1", "C2"]
    hidden = [sample._replace(is_anomalous=False) if sample.view == "C2" else sample for sample in whole.test]
    assert views(replace(whole, test=tuple(hidden))) == ["C1"]
    assert views(category()) == [""]
