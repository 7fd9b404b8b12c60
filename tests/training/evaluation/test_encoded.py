"""Encoded images: each is encoded once, features are the extractor's, masks lie on what they mark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import ImageError, InputError, MissingPathError
from tests.conftest import make_extractor, random_image
from training.evaluation.encoded import EncodedBackbone, EncodedImages, feature_maker

NUMBER = 5


class Counting(nn.Module):
    """A backbone that counts the images it is given."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.images = backbone, 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.images += len(images)
        return self.backbone(images)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five images of 48 x 40 pixels."""
    for number in range(NUMBER):
        random_image(number, 40, 48).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(NUMBER)]


def entry(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else {"bytes": None, "path": str(path)}


def encode(extractor: ADPretrainFeatureExtractor, paths: list[Path], masks: Any = None) -> EncodedImages:
    file = paths[0].parent / f"{len(paths)}.bin"
    return EncodedImages(extractor, list(map(entry, paths)), list(map(entry, masks or [None] * len(paths))), file)


def places(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_each_image_is_encoded_once_when_it_is_asked_for(
    extractor: ADPretrainFeatureExtractor, paths: list[Path]
) -> None:
    counting = Counting(extractor.backbone)
    extractor.set_submodule("backbone", counting)
    encoded = encode(extractor, paths)
    first = encoded.tokens(places(3, 1))
    assert counting.images == 2
    again = encoded.tokens(places(1, 3, 0))
    assert counting.images == 3
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[1]) and torch.equal(one[1], other[0])
    assert encoded.size == (32, 32)
    assert not list(paths[0].parent.glob("*.bin"))  # a program that is killed leaves no tokens behind


def test_an_image_is_encoded_the_same_in_any_company(extractor: ADPretrainFeatureExtractor, paths: list[Path]) -> None:
    together = encode(extractor, paths).tokens(places(*range(NUMBER)))
    alone = encode(extractor, paths).tokens(places(4))
    assert all(torch.equal(one[4], other[0]) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("normalize_tokens", [False, True])
@pytest.mark.parametrize("kind", ["raw", "residual", "pretrained"])
def test_features_are_the_extractors(tiny_folder: Path, paths: list[Path], kind: str, normalize_tokens: bool) -> None:
    extractor = make_extractor(tiny_folder, normalize_tokens=normalize_tokens)
    extractor.set_reference(paths[:2])
    images = extractor.preprocess(paths[2:])
    with torch.no_grad():
        expected = {
            "raw": extractor.backbone(images),
            "residual": extractor.residuals(extractor.encode(images)),
            "pretrained": list(extractor(images).values()),
        }
        got = feature_maker(encode(extractor, paths), extractor, kind, [0, 1])(places(2, 3, 4))
    close(got, expected[kind])


def test_a_reference_is_compared_with_the_others(extractor: ADPretrainFeatureExtractor, paths: list[Path]) -> None:
    got = feature_maker(encode(extractor, paths), extractor, "residual", [3, 0, 1])(places(0))
    others = extractor.make_reference([paths[3], paths[1]])
    close(got, extractor.residuals(extractor.encode(extractor.preprocess(paths[0])), others))
    assert all(level.abs().max() > 0.1 for level in got)
    alone = feature_maker(encode(extractor, paths), extractor, "residual", [0])
    assert all(level.abs().max() < 1e-5 for level in alone(places(0)))  # there is no other


def test_a_backbone_looks_up_what_is_encoded_and_encodes_the_rest(
    extractor: ADPretrainFeatureExtractor, paths: list[Path]
) -> None:
    encoded = encode(extractor, paths)
    encoded.encode(range(NUMBER))
    counting = Counting(extractor.backbone)
    backbone = EncodedBackbone(counting, [encode(extractor, paths[:1]), encoded])
    images = extractor.preprocess(paths)
    changed = images.clone()
    changed[2] += 1
    close(backbone(changed), extractor.backbone(changed))
    assert counting.images == 1
    backbone(images)
    assert counting.images == 1


@pytest.mark.parametrize("size", [(45, 24), (41, 67)])
@pytest.mark.parametrize("mode", ["crop", "resize"])
def test_masks_lie_on_what_they_mark(tiny_folder: Path, mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    """An image that is its own mask, black and white, has the same edges but for what resizing blurs."""
    extractor = make_extractor(tiny_folder, resize_mode=mode)
    width, height = size
    marked = np.zeros((height, width), dtype=np.uint8)
    marked[: height // 3, width // 2 : 3 * width // 4] = 1  # a class's number, not 255
    Image.fromarray(255 * marked).convert("RGB").save(tmp_path / "0.png")
    Image.fromarray(marked).save(tmp_path / "mask.png")
    encoded = encode(extractor, [tmp_path / "0.png"] * 2, [tmp_path / "mask.png", None])
    mask, none = encoded.masks(places(0, 1)).numpy()
    assert not none.any()
    image = extractor.preprocess(tmp_path / "0.png")[0].mean(0).numpy()
    assert mask.shape == image.shape == encoded.size
    middle, extent = (image.max() + image.min()) / 2, np.ptp(image)
    blurred = abs(image - middle) < extent / 4
    assert np.array_equal(mask[~blurred], image[~blurred] > middle)
    assert blurred.mean() < 0.25


def test_images_of_different_shapes_are_refused(tiny_folder: Path, paths: list[Path]) -> None:
    Image.new("RGB", (64, 200)).save(paths[3])
    with pytest.raises(
        InputError, match=r"different shapes .* cannot be compared, such as .*: give --resize-mode crop"
    ):
        encode(make_extractor(tiny_folder, resize_mode="resize"), paths).encode(range(NUMBER))


def test_what_cannot_be_used_is_an_error_or_left_out_and_told(
    extractor: ADPretrainFeatureExtractor, paths: list[Path], tmp_path: Path
) -> None:
    paths[1].write_bytes(b"nothing")
    paths[2].unlink()
    Image.new("L", (39, 48)).save(tmp_path / "mask.png")
    masks = [None, None, None, tmp_path / "mask.png", None]
    for place, error, message in (
        (1, ImageError, r"1\.png"),
        (2, MissingPathError, r"no such image: .*2\.png"),
        (3, ImageError, r"mask\.png has 39 x 48 pixels, its image .*3\.png 40 x 48: expected the same"),
    ):
        with pytest.raises(error, match=message):
            encode(extractor, paths, masks).encode([place])
    told: list[int] = []
    encoded = encode(extractor, paths, masks)
    assert encoded.encode(range(NUMBER), on_error=lambda place, error: told.append(place)) == [0, 4]
    assert told == [1, 2, 3]


def test_images_without_a_name_are_told_apart(extractor: ADPretrainFeatureExtractor, paths: list[Path]) -> None:
    entries = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    encoded = EncodedImages(extractor, entries, [None] * NUMBER, paths[0].parent / "unnamed.bin")
    close(encoded.tokens(places(4, 2)), encode(extractor, paths).tokens(places(4, 2)))
