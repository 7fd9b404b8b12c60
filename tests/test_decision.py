"""From a score to a decision: split conformal p-values, what they promise, and the bank that keeps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from adpretrain_hf.reference import ReferenceBank
from adpretrain_hf.scoring import AnomalyScores, Calibration, Judgement
from tests.conftest import ROOT, make_extractor, random_image

QUICK = settings(max_examples=100, deadline=None, database=None)
scores_strategy = st.lists(st.integers(0, 30).map(lambda n: n / 8), min_size=1, max_size=40)


def normals(number: int, first: int = 100) -> list[Image.Image]:
    return [random_image(first + seed) for seed in range(number)]


# The rule


@QUICK
@given(scores_strategy, st.integers(-1, 31).map(lambda n: n / 8), st.integers(1, 99))
def test_the_p_value_and_the_decision_are_those_of_the_definition(own: list[float], score: float, percent: int) -> None:
    calibration, alpha = Calibration(tuple(own)), percent / 100
    reached, number = sum(one >= score for one in own), len(own)
    assert calibration.p_value(score) == (1 + reached) / (number + 1)
    if percent * (number + 1) >= 100:  # in whole numbers: what the images allow
        assert calibration.is_anomalous(score, alpha) == (100 * (1 + reached) <= percent * (number + 1))


@QUICK
@given(scores_strategy, st.integers(1, 99))
def test_a_rate_that_the_images_do_not_allow_names_the_smallest_and_what_it_needs(
    own: list[float], percent: int
) -> None:
    number = len(own)
    if percent * (number + 1) >= 100:
        return
    needed = math.ceil(100 / percent) - 1
    message = f"cannot be promised by {number} calibration images: it needs at least {needed}, and the smallest"
    with pytest.raises(InputError, match=message):
        Calibration(tuple(own)).threshold(percent / 100)
    Calibration((0.0,) * needed).threshold(percent / 100)  # that many do


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan, "0.1"])
def test_a_rate_is_a_share(alpha: object) -> None:
    with pytest.raises(InputError, match="false-alarm rate is .*, expected a number above 0 and below 1"):
        Calibration((1.0, 2.0)).is_anomalous(1.5, alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("scores", [(), (1.0, math.nan), (math.inf,)])
def test_calibration_scores_are_finite(scores: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected at least one, all finite"):
        Calibration(scores)


def inside_binomial(alarms: int, draws: int, rate: float) -> bool:
    low, high = binom.interval(0.999, draws, rate)
    return low <= alarms <= high


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("law", ["normal", "lognormal", "cauchy"])
def test_the_rate_of_false_alarms_is_kept_whatever_the_scores_are_like(law: str, alpha: float) -> None:
    generator = np.random.default_rng(0)
    draws, number = 4000, 199  # 200 alpha is a whole number: the rate is alpha itself, not below it
    values = generator.standard_cauchy if law == "cauchy" else getattr(generator, law)
    alarms = sum(
        Calibration(tuple(drawn[:-1])).is_anomalous(drawn[-1], alpha)
        for drawn in values(size=(draws, number + 1)).tolist()
    )
    assert inside_binomial(alarms, draws, alpha)


def test_the_rate_of_false_alarms_is_kept_on_photographs() -> None:
    """Normal photographs that were neither referred to nor calibrated with, over many draws of which those are."""
    bundle = ROOT / "hub_cards/adpretrain-dinov2-small"
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, image_size=56, resize_mode="crop")
    paths = sorted((ROOT / "tests/photos/gravel/train/good").glob("*.jpg"))
    extractor.set_reference(paths[:2])
    parts = [
        image.crop((left, top, left + 40, top + 40))
        for image in map(Image.open, paths[2:])
        for top in range(0, image.height - 40, 14)
        for left in range(0, image.width - 40, 14)
    ]
    scores = extractor.score(parts, batch_size=32).scores.numpy().astype(float)
    assert len(set(scores)) > 120
    generator, draws, alarms = np.random.default_rng(0), 3000, {0.01: 0, 0.05: 0, 0.1: 0}
    for _ in range(draws):
        drawn = generator.choice(scores, 100, replace=False)
        calibration = Calibration(tuple(drawn[:-1]))
        for alpha in alarms:
            alarms[alpha] += calibration.is_anomalous(drawn[-1], alpha)
    assert all(inside_binomial(number, draws, alpha) for alpha, number in alarms.items()), alarms


@QUICK
@given(scores_strategy, st.floats(-5, 9, width=32), st.floats(-5, 9, width=32))
def test_confidence_rises_with_the_score_and_is_a_half_at_the_threshold(own: list[float], a: float, b: float) -> None:
    calibration = Calibration(tuple(own))
    low, high = sorted((a, b))
    assert 0 <= calibration.confidence(low) <= calibration.confidence(high) <= 1
    assert calibration.confidence(calibration.threshold()) == 0.5


def test_confidence_and_borderline_in_closed_form() -> None:
    calibration = Calibration((1.0, 2.0, 3.0, 4.0), false_alarms=0.4)  # 0.4 x 5 = 2: the second from the top
    spread = math.sqrt(1.25)
    assert calibration.threshold() == 3.0
    assert calibration.scale == pytest.approx(spread)
    assert calibration.confidence(4.0) == pytest.approx(1 / (1 + math.exp(-1 / spread)))
    assert calibration.confidence(4.0, 0.2) == 0.5  # whose threshold it is
    assert [calibration.is_borderline(score) for score in (1.8, 1.9, 4.1, 4.2)] == [False, True, True, False]
    assert [calibration.is_borderline(score, band=0.5) for score in (2.4, 2.5, 3.5, 3.6)] == [False, True, True, False]


def test_the_default_rate_is_the_smallest_one_but_not_below_one_in_a_hundred() -> None:
    assert Calibration((1.0,) * 9).false_alarms == pytest.approx(0.1)
    assert Calibration((1.0,) * 999).false_alarms == 0.01


# How an image's score is taken


def test_the_score_of_the_top_is_the_mean_of_the_highest_pixels() -> None:
    maps = torch.arange(200.0).view(2, 10, 10)
    assert Judgement("top", 0.03).image_scores(maps).tolist() == [98.0, 198.0]
    assert Judgement("top", 0.0001).image_scores(maps).tolist() == Judgement().image_scores(maps).tolist() == [99, 199]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("mean",), "image_score is 'mean', expected one of"),
        (("top", 0.0), "top is 0.0, expected the share"),
        (("top", "0.1"), "top is '0.1', expected the share"),
    ],
)
def test_other_scores_are_refused(values: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Judgement(*values)  # type: ignore[arg-type]


# Results


def test_results_are_decided_each_by_its_own_calibration() -> None:
    low, high = Calibration((1.0, 2.0, 3.0)), Calibration((11.0, 12.0, 13.0))
    result = AnomalyScores(torch.zeros(3, 2, 2), torch.tensor([2.5, 2.5, 14.0]), [low, high, high])
    maps, scores = result
    assert maps is result.maps and scores is result.scores
    assert result.p_values.tolist() == [0.5, 1.0, 0.25]
    assert result.is_anomalous().tolist() == [False, False, True]
    assert result.is_anomalous(0.5).tolist() == [True, False, True]
    assert result.is_borderline().tolist() == [True, False, False]
    assert result.confidence.tolist() == [low.confidence(2.5), high.confidence(2.5), high.confidence(14.0)]


@pytest.mark.parametrize("calibrations", [(), (None, None)])
def test_no_decision_without_a_calibration(calibrations: tuple[None, ...]) -> None:
    result = AnomalyScores(torch.zeros(2, 2, 2), torch.zeros(2), calibrations)
    for ask in (lambda: result.p_values, lambda: result.confidence, result.is_anomalous, result.is_borderline):
        with pytest.raises(InputError, match=r"a decision needs a calibrated reference.*extractor\.calibrate\(bank"):
            ask()


# The bank that keeps it


def test_what_cannot_be_decided_is_told_of_its_product() -> None:
    images = {"scores": torch.ones(2), "categories": ["nut", "screw"]}
    with pytest.raises(InputError, match="^screw: a decision needs a calibrated reference"):
        AnomalyScores(None, calibrations=[Calibration((1.0,)), None], **images).p_values  # noqa: B018
    few = AnomalyScores(None, calibrations=[Calibration((1.0,) * 9), Calibration((1.0,))], **images)
    with pytest.raises(InputError, match="^screw: a false-alarm rate of 0.1 cannot be promised by 1 calib"):
        few.is_anomalous(0.1)


def test_a_decision_travels_with_the_bank(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    bank = extractor.make_reference(normals(3), calibrate=normals(9, first=200))
    bank.save(tmp_path / "bank.safetensors")
    loaded = ReferenceBank.load(tmp_path / "bank.safetensors")
    calibration = loaded.judgement.calibration
    assert calibration is not None and calibration == bank.judgement.calibration
    expected = extractor.set_reference(loaded).score(normals(9, first=200)).scores.tolist()
    assert calibration.scores == pytest.approx(sorted(expected))
    assert not calibration.approximate and calibration.peaks == ()
    result = extractor.score(normals(2, first=300))
    assert result.p_values.tolist() == [calibration.p_value(score) for score in result.scores.tolist()]


def test_the_top_score_is_kept_in_the_bank_and_followed(extractor: ADPretrainFeatureExtractor, tmp_path: Path) -> None:
    bank = extractor.make_reference(normals(3), image_score="top", top=0.1, calibrate=normals(4, first=200))
    bank.save(tmp_path / "bank.safetensors")
    extractor.set_reference(tmp_path / "bank.safetensors")
    for scored in extractor.score_stream(normals(2, first=300), progress=False):
        highest = scored.anomaly.flatten().sort(descending=True).values[: round(0.1 * scored.anomaly.numel())]
        assert scored.score == pytest.approx(float(highest.mean()))
    calibration = bank.judgement.calibration
    assert calibration is not None and len(calibration.peaks) == 4
    assert calibration.pixel_threshold() == max(calibration.peaks) > calibration.threshold()


def test_what_is_asked_of_a_bank_is_what_it_has_or_refused(extractor: ADPretrainFeatureExtractor) -> None:
    plain, top = extractor.make_reference(normals(3)), extractor.make_reference(normals(3), image_score="top", top=0.1)
    nothing: dict[str, Any] = {"select": None, "augment_references": "none", "progress": False, "calibrate": False}
    for bank, same in ((plain, {"image_score": "max"}), (top, {"image_score": "top", "top": 0.1}), (top, {"top": 0.1})):
        assert extractor.set_reference(bank, **nothing, **same).reference is bank
    for bank, other in (
        (plain, {"top": 0.1}),
        (top, {"image_score": "max"}),
        (top, {"top": 0.2}),
        (top, {"select": 2}),
    ):
        with pytest.raises(InputError, match=f"^{next(iter(other))}: a bank is as it was made"):
            extractor.set_reference(bank, **other)
    with pytest.raises(InputError, match="calibrate=True compares the references, and a bank has no images"):
        extractor.set_reference(plain, calibrate=True)
    with pytest.raises(InputError, match="top is 0.1, and the score is the maximum: expected image_score='top'"):
        extractor.make_reference(normals(3), top=0.1)


def test_the_references_themselves_are_compared_with_the_others(extractor: ADPretrainFeatureExtractor) -> None:
    images = normals(4)
    bank = extractor.make_reference(images, calibrate=True)
    calibration = bank.judgement.calibration
    assert calibration is not None and calibration.approximate
    alone = [
        extractor.set_reference(bank.without_image(place)).score(image).scores for place, image in enumerate(images)
    ]
    assert calibration.scores == pytest.approx(sorted(torch.cat(alone).tolist()), rel=1e-5)


def test_copies_of_a_reference_are_left_out_and_named(
    extractor: ADPretrainFeatureExtractor, caplog: pytest.LogCaptureFixture
) -> None:
    """Each would find the other, and have the residual 0."""
    images = normals(4)
    named = [(f"{number}.png", image) for number, image in enumerate([*images, images[1], images[0], images[1]])]
    expected = extractor.make_reference(images, calibrate=True)
    bank = extractor.make_reference(named, calibrate=True)
    assert [record.message for record in caplog.records if "copies" in record.message] == [
        "3 images are copies of others, and left out: 4.png, 5.png, 6.png"
    ]
    assert [image.digest for image in bank.images] == [image.digest for image in expected.images]
    assert bank.judgement == expected.judgement
    twice = extractor.make_reference(normals(3), calibrate=[*normals(5, first=200), *normals(2, first=200)])
    assert twice.judgement == extractor.make_reference(normals(3), calibrate=normals(5, first=200)).judgement
    tiles = extractor.make_reference([*images, images[0]], tiles=(1, 2))
    assert (tiles.num_images, len(tiles)) == (4, len(extractor.make_reference(images, tiles=(1, 2))))
    assert extractor.make_reference([*images, images[0]], augment_references="auto").num_images == 4


def test_a_rate_that_cannot_be_promised_is_told_before_the_images_are_read(
    extractor: ADPretrainFeatureExtractor,
) -> None:
    unread: list[Any] = [("0.png", lambda: pytest.fail("it was read"))] * 3
    with pytest.raises(InputError, match="0.01 cannot be promised by 3 calibration images"):
        extractor.calibrate(extractor.make_reference(normals(3)), unread, false_alarms=0.01)


def test_images_without_a_residual_calibrate_too(tiny_folder: Path) -> None:
    """A bank that knows no digests does not recognise its image, and projectors that are the identity leave 0."""
    extractor = ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), image_size=32)
    bank = extractor.make_reference(random_image(1))
    unknown = ReferenceBank(bank.patches, fingerprint=bank.fingerprint, num_images=1)
    calibration = extractor.calibrate(unknown, random_image(1)).judgement.calibration
    assert calibration is not None and calibration.scores == (0,)
    assert calibration.typical == 0 and calibration.confidence(1.0) == 1


def test_a_reference_is_calibrated_when_it_is_set(extractor: ADPretrainFeatureExtractor) -> None:
    extractor.set_reference(normals(4), calibrate=normals(4, first=200))
    assert extractor.score(normals(1)).p_values.shape == (1,)


@pytest.mark.parametrize(
    "change",
    [lambda bank: bank.compact(0.5), lambda bank: bank.without_image(0), lambda bank: bank.to(dtype=torch.bfloat16)],
)
def test_a_change_voids_the_calibration(extractor: ADPretrainFeatureExtractor, change: object) -> None:
    bank = extractor.make_reference(normals(3), image_score="top", calibrate=normals(4, first=200))
    changed = change(bank).judgement  # type: ignore[operator]
    assert changed == Judgement("top")
    assert bank.to("cpu", torch.float32).judgement.calibration is not None


def test_a_calibration_of_another_extractor_is_left_aside(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The patches are the same, and so they are accepted; the projectors are others, and so are the scores."""
    one, other = (make_extractor(tiny_folder, seed=seed) for seed in (1, 2))
    bank = one.make_reference(normals(3), calibrate=normals(4, first=200))
    result = other.set_reference(bank).score(normals(1))
    assert "calibration was made by another extractor" in caplog.text
    with pytest.raises(InputError, match="has no calibration that was made by this extractor"):
        result.is_anomalous()
    half = make_extractor(tiny_folder, seed=1).to(torch.bfloat16)
    assert half.scoring_identity != one.scoring_identity
    assert one.scoring_identity == make_extractor(tiny_folder, seed=1).scoring_identity


def test_anomalies_among_the_calibration_images_are_noticed(
    extractor: ADPretrainFeatureExtractor, caplog: pytest.LogCaptureFixture
) -> None:
    shades = [100, 120, 140, 101, 121, 141, 102, 122, 142]
    grey = [Image.fromarray(np.full((40, 40, 3), shade, np.uint8)) for shade in shades]
    bank = extractor.make_reference(grey[:3])
    extractor.calibrate(bank, grey[3:])
    assert "far above" not in caplog.text
    extractor.calibrate(bank, [*grey[3:], random_image(1)])
    assert "1 of 7 calibration images score far above the others, the highest is image 6:" in caplog.text


def test_what_cannot_be_calibrated_with(extractor: ADPretrainFeatureExtractor) -> None:
    images = normals(3)
    with pytest.raises(InputError, match="no calibration images were given"):
        extractor.make_reference(images, calibrate=iter([]))
    with pytest.raises(InputError, match="calibrate=True reads the images twice: give a list"):
        extractor.make_reference(iter(images), calibrate=True)
    with pytest.raises(InputError, match="are the reference's own, and it cannot leave one out"):
        extractor.make_reference(images[:1], calibrate=True)
    with pytest.raises(InputError, match="are the reference's own, and it cannot leave one out"):
        extractor.calibrate(extractor.make_reference(images).compact(0.5), images)
    with pytest.raises(InputError, match="0.01 cannot be promised by 3 calibration images: it needs at least 99"):
        extractor.calibrate(extractor.make_reference(images), normals(3, first=200), false_alarms=0.01)
    with pytest.raises(InputError, match="made by another extractor"):
        extractor.calibrate(ReferenceBank([torch.ones(4, 32)] * 2, fingerprint="other"), images)
