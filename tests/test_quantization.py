"""The 8-bit extractor: near the float32 one, with references of its own, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import InputError
from adpretrain_hf.quantization import quantize
from tests.conftest import BUNDLE, PHOTOS


@pytest.fixture(scope="module")
def extractors() -> list[ADPretrainFeatureExtractor]:
    """The embedded bundle in float32 and in 8 bits, each with references that it encoded itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what PyTorch says of its own plans is not for our users
        quantised = quantize(ADPretrainFeatureExtractor.from_pretrained(BUNDLE, variant="norm", image_size=224))
    plain = ADPretrainFeatureExtractor.from_pretrained(BUNDLE, variant="norm", image_size=224)
    return [one.set_reference(PHOTOS / "brick/train/good") for one in (plain, quantised)]


def test_anomaly_maps_stay_near_those_of_float32(extractors):
    plain, quantised = (one.score(PHOTOS / "brick/test", batch_size=4) for one in extractors)
    assert torch.corrcoef(torch.stack([plain.scores, quantised.scores]))[0, 1] > 0.98
    assert torch.corrcoef(torch.stack([plain.maps.flatten(), quantised.maps.flatten()]))[0, 1] > 0.98
    assert not torch.equal(plain.scores, quantised.scores)


def test_every_linear_layer_that_an_image_passes_is_quantised(extractors):
    left = [name for name, module in extractors[1].named_modules() if type(module) is nn.Linear]
    assert left == [f"projectors.levels.{level}.reference_projection" for level in range(3)]


def test_an_image_against_itself_keeps_no_residual(extractors):
    images = extractors[1].preprocess(PHOTOS / "brick/test/good")
    residuals = extractors[1].residuals(extractors[1].encode(images), images)
    assert all(not level.any() for level in residuals)


def test_a_reference_of_float32_is_forgotten(extractor):
    quantised = quantize(extractor.set_reference(torch.randn(1, 3, 32, 32)))
    assert quantised is extractor
    with pytest.raises(InputError, match="no reference"):
        quantised(torch.randn(1, 3, 32, 32))


def test_a_bank_of_float32_is_refused_and_one_of_8_bits_by_float32(extractors):
    exact, fast = extractors
    images = torch.randn(2, 3, 28, 28)
    with pytest.raises(InputError, match="was made by another extractor: .* and 8-bit layers count"):
        fast.set_reference(exact.make_reference(images))
    with pytest.raises(InputError, match="was made by another extractor"):
        exact.set_reference(fast.make_reference(images))


def test_it_cannot_be_saved(extractors, tmp_path):
    with pytest.raises(InputError, match=r"quantised layers cannot be saved: save the one that it was made of"):
        extractors[1].save_pretrained(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_only_float32_is_quantised(extractor):
    with pytest.raises(InputError, match=r"got an extractor in bfloat16 on cpu, expected float32 on the CPU: load it"):
        quantize(extractor.to(torch.bfloat16))
