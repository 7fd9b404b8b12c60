"""What feature_info promises against what the extractor gives, and against timm's own reading of the same entries."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_extractor, random_image

QUESTIONS = [None, 0, 1, -1, [1], [1, 0], (0, 1)]


@pytest.fixture
def extractor(tiny_folder):
    return make_extractor(tiny_folder, layers=(2, 3)).set_reference([random_image(1)])


def test_promises_hold(extractor):
    info = extractor.feature_info
    features = extractor(torch.randn(2, 3, 32, 48))
    assert len(info) == len(features) == 2
    for entry, maps in zip(info.get_dicts(), features.values(), strict=True):
        assert maps.shape == (2, entry["num_chs"], 32 // entry["reduction"], 48 // entry["reduction"])


def test_the_named_module_gives_the_features(extractor):
    given = {}
    for index, name in enumerate(extractor.feature_info.module_name()):
        module = extractor.get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, output, index=index: given.update({index: output}))
    features = extractor(torch.randn(1, 3, 32, 32))
    for index, maps in enumerate(features.values()):
        assert torch.equal(given[index], maps)


@pytest.mark.parametrize("idx", QUESTIONS)
def test_answers_as_timm_does(extractor, idx):
    timm = pytest.importorskip("timm")
    ours = extractor.feature_info
    theirs = timm.models.FeatureInfo(ours.get_dicts(), out_indices=ours.out_indices)
    for question in ("channels", "reduction", "module_name", "get_dicts"):
        arguments = {"idx": idx}
        assert getattr(ours, question)(**arguments) == getattr(theirs, question)(**arguments)
    assert ours.get_dicts(["num_chs"], idx) == theirs.get_dicts(["num_chs"], idx)
    assert [ours[place] for place in range(len(ours))] == [theirs[place] for place in range(len(theirs))]


def test_agrees_with_the_attributes(extractor):
    assert extractor.feature_info.channels() == extractor.out_dims == [32, 32]
    assert extractor.feature_info.reduction() == extractor.reductions == [8, 8]
    assert extractor.feature_info.get("index", [1]) == [1]
