"""Use through forward hooks, as the code of PatchCore's authors takes features from any backbone by module names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import make_extractor, random_image


class LastLayerReached(Exception):
    """Ends a forward pass when there is nothing left to collect."""


class Aggregator:
    """Collects what named modules emit, and stops the forward pass at the last of them."""

    def __init__(self, backbone: nn.Module, names: list[str]) -> None:
        self.backbone = backbone
        self.outputs: dict[str, Tensor] = {}
        for name in names:
            self._find(name).register_forward_hook(self._hook(name, is_last=name == names[-1]))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.outputs.clear()
        with torch.no_grad():
            try:
                self.backbone(images)
            except LastLayerReached:
                return dict(self.outputs)
        raise AssertionError("the last module was not reached")

    def _find(self, name: str) -> nn.Module:
        return dict(self.backbone.named_modules())[name]

    def _hook(self, name, is_last):
        def hook(module, inputs, output):
            self.outputs[name] = output
            if is_last:
                raise LastLayerReached

        return hook


class ByBlockAndIndex(Aggregator):
    """Finds modules by a block's name and an index into it, such as "layer1.0" of a ResNet."""

    def _find(self, name: str) -> nn.Module:
        block, index = name.split(".")
        return self.backbone._modules[block][int(index)]


@pytest.fixture
def extractor(tiny_folder):
    return make_extractor(tiny_folder, layers=(1, 2, 4)).set_reference([random_image(1), random_image(2)])


@pytest.mark.parametrize(
    ("aggregator", "names"),
    [
        (Aggregator, ["projectors.levels.0", "projectors.levels.1", "projectors.levels.2"]),
        (ByBlockAndIndex, ["projectors.0", "projectors.1", "projectors.2"]),
        (Aggregator, ["projectors.levels.0", "projectors.levels.1"]),
    ],
)
def test_a_module_for_each_level_emits_its_features(extractor, aggregator, names):
    images = torch.randn(2, 3, 32, 48)
    expected = list(extractor(images).values())
    collect = aggregator(extractor, names)
    for _ in range(2):  # a pass that was stopped leaves nothing behind that would spoil the next
        outputs = list(collect(images).values())
        assert len(outputs) == len(names)
        for output, features in zip(outputs, expected, strict=False):
            assert output.shape == (2, 32, 4, 6)
            assert torch.equal(output, features)


def test_levels_that_were_not_asked_for_are_not_computed(extractor):
    reached = []
    collect = Aggregator(extractor, ["projectors.levels.0"])
    extractor.projectors[1].register_forward_hook(lambda *_: reached.append(1))
    collect(torch.randn(1, 3, 32, 32))
    assert not reached
