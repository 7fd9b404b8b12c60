"""The report's pictures: strips of the best and worst maps, curves and histograms, patches in the plane."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.training.evaluation.made_up import NAMES, made_up_cell, made_up_patches, made_up_result, made_up_shown
from training.evaluation.figures import project, scores_figure, strips


def decoded(address: str) -> bytes:
    return base64.b64decode(address.partition(",")[2], validate=True)


class TestStrips:
    def test_are_best_first_and_worst_last(self) -> None:
        cell = made_up_cell()
        result, shown = made_up_result(cell), replace(made_up_shown(cell, number=5), indices=np.array([3, 1, 0, 2, 5]))
        ranks, captions, _ = zip(*strips(result, shown), strict=True)
        assert ranks == ("best", "best", "best", "worst", "worst")
        named = [caption.rpartition(", pixel AUROC ")[0] for caption in captions]
        assert named == [f"{NAMES[i]}, score {result.scores[i]:.4g}" for i in (3, 1, 0, 2, 5)]

    def test_tell_how_well_an_anomaly_is_found_where_its_mask_is_known(self) -> None:
        cell = made_up_cell()
        shown = made_up_shown(cell, number=3)
        masks = shown.masks & np.array([True, False, True])[:, None, None]
        maps = masks.astype(np.float16)
        maps[2] = 0
        captions = [caption for _, caption, _ in strips(made_up_result(cell), replace(shown, masks=masks, maps=maps))]
        found = [caption.partition(", pixel AUROC ")[2] for caption in captions]
        assert found == ["100.0", "", "50.0"]

    @pytest.mark.parametrize(("number", "ranks"), [(0, []), (1, ["best"]), (2, ["best", "worst"])])
    def test_of_few_images(self, number: int, ranks: list[str]) -> None:
        cell = made_up_cell()
        assert [rank for rank, _, _ in strips(made_up_result(cell), made_up_shown(cell, number))] == ranks

    def test_show_image_mask_and_map(self) -> None:
        cell = made_up_cell()
        shown = made_up_shown(cell, number=1, side=128)
        ((_, _, address),) = strips(made_up_result(cell), shown)
        picture = np.asarray(Image.open(io.BytesIO(decoded(address))).convert("RGB"), dtype=float)
        assert picture.shape == (128, 3 * 128 + 2 * 2, 3)
        image, mask, anomaly = (picture[:, start : start + 128] for start in (0, 130, 260))
        marked = shown.masks[0]
        assert np.abs(image.mean(-1) - shown.images[0].mean(-1)).mean() < 20  # of JPEG, on noise
        assert mask[marked].mean() > 230 and mask[~marked].mean() < 10
        red, blue = anomaly[marked][:, 0].mean(), anomaly[marked][:, 2].mean()
        assert red > image[marked][:, 0].mean() + 60 and red > blue + 20


class TestPlots:
    def test_a_curve_for_each_kind(self) -> None:
        cells = [made_up_cell(), replace(made_up_cell(features="pretrained"), variant="a$b")]
        results = [made_up_result(cell) for cell in cells]
        one, two = (decoded(scores_figure(some)) for some in (results[:1], results))
        for colour in (b"#8a8a8a", b"#1d5fa8"):  # of raw and pretrained features
            assert (colour in one, colour in two) == (colour == b"#8a8a8a", True)
        # A panel each, beside the curves'.
        assert [len(re.findall(rb'id="axes_\d+"', svg)) for svg in (one, two)] == [2, 3]

    def test_equal_scores_can_be_drawn(self) -> None:
        result = replace(made_up_result(made_up_cell()), scores=[0.5] * 12)
        ElementTree.fromstring(decoded(scores_figure([result])))


class TestProjections:
    def test_clouds_that_are_far_apart_stay_so(self) -> None:
        sample = made_up_patches("visa", "candle", "pretrained")
        places, labels = project(sample)
        assert places.shape == (60, 2) and np.isfinite(places).all()
        assert np.array_equal(labels, sample.is_anomalous)
        between = np.linalg.norm(places[labels].mean(0) - places[~labels].mean(0))
        assert between > 2 * max(places[kind].std(0).max() for kind in (labels, ~labels))

    def test_large_ones_are_drawn_from(self) -> None:
        places, labels = project(made_up_patches("visa", "candle", "raw", number=600))
        assert places.shape == (200, 2)
        assert 40 < labels.sum() < 95  # of both kinds, as in the sample

    @pytest.mark.parametrize("number", [4, 7])
    def test_the_smallest(self, number: int) -> None:
        places, _ = project(made_up_patches("visa", "candle", "raw", number))
        assert places.shape == (number, 2) and np.isfinite(places).all()
