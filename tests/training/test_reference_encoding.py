"""ReferenceEncoder: the same bits in any company, errors that name the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.matching import to_rows
from tests.conftest import make_extractor
from tests.tiny import save_tiny
from tests.training.references import make_encoder
from training.reference_encoding import ReferenceEncoder


def random_encoder(extractor: Any, size: int = 32, **options: Any) -> ReferenceEncoder:
    """An encoder of random images."""
    images = torch.randn(20, 3, size, size, generator=torch.Generator().manual_seed(0))
    return ReferenceEncoder(extractor, lambda position: images[position], **options)


def encoded(encoder: ReferenceEncoder, positions: list[int]) -> dict[int, Tensor]:
    return dict(encoder.encode(positions))


def mix_the_batch(module: nn.Module, inputs: Any, maps: list[Tensor]) -> list[Tensor]:
    """Makes tokens depend on the rest of the batch, as the order of sums can, but plainly."""
    return [level + level.mean(0, keepdim=True) for level in maps]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_patches_are_the_rounded_tokens(extractor, dtype):
    encoder = random_encoder(extractor, dtype=dtype)
    patches = encoded(encoder, [4, 2])
    assert list(patches) == [4, 2] and encoder.shape == (4, 16, 32)
    for position, own in patches.items():
        image = encoder._load(position)[None]
        expected = torch.stack([to_rows(level) for level in extractor.encode(image)]).to(dtype)
        assert own.dtype == dtype and torch.equal(own, expected)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_bits_do_not_depend_on_the_company(extractor, batch_size, autocast):
    encoder = random_encoder(extractor, batch_size=batch_size, autocast=autocast)
    together, backwards = encoded(encoder, list(range(20))), encoded(encoder, list(range(20))[::-1])
    for position in range(20):
        (alone,) = encoded(encoder, [position]).values()
        assert torch.equal(alone, together[position]) and torch.equal(alone, backwards[position])


def test_batches_are_given_up_where_rows_depend_on_each_other(extractor, caplog):
    assert random_encoder(extractor, batch_size=1).batch_size == 1 and not caplog.records
    extractor.backbone.register_forward_hook(mix_the_batch)
    encoder = random_encoder(extractor, batch_size=8)
    assert encoder.batch_size == 1 and "one by one: in batches of 8" in caplog.text
    together = encoded(encoder, [1, 2, 3])
    assert all(torch.equal(encoded(encoder, [p])[p], together[p]) for p in (1, 2, 3))


def pixels_alone(module: nn.Module, inputs: tuple[Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Tokens that are the patches' corner pixels: no sum, whose order could depend on the batch."""
    return [inputs[0][:, :1, ::8, ::8].expand_as(level) for level in maps]


def test_batches_are_used_where_rows_are_independent_and_filled_up(extractor):
    sizes = []
    extractor.backbone.register_forward_hook(pixels_alone)
    encoder = random_encoder(extractor, batch_size=8)
    assert encoder.batch_size == 8
    extractor.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert len(encoded(encoder, list(range(11)))) == 11
    assert sizes == [8, 8]


def test_the_callers_autocast_and_gradients_do_not_matter(extractor):
    encoder = random_encoder(extractor)
    plain = encoded(encoder, [0])[0]
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert torch.equal(encoded(encoder, [0])[0], plain)
    assert not plain.requires_grad
    assert not torch.equal(encoded(random_encoder(extractor, autocast=torch.bfloat16), [0])[0], plain)


def test_fingerprint_tells_apart_what_gives_other_bits(tmp_path, tiny_folder, extractor):
    changed_in_memory = make_extractor(tiny_folder)
    with torch.no_grad():
        next(changed_in_memory.backbone.parameters()).add_(1)
    encoders = [
        random_encoder(extractor),
        random_encoder(extractor, dtype=torch.bfloat16),
        random_encoder(extractor, autocast=torch.bfloat16),
        random_encoder(make_extractor(tiny_folder, image_size=64)),
        random_encoder(make_extractor(tiny_folder, layers=(1, 2))),
        random_encoder(make_extractor(tiny_folder, normalize_tokens=False)),
        random_encoder(make_extractor(tiny_folder).double()),
        random_encoder(make_extractor(save_tiny(tmp_path / "other", seed=1))),
        random_encoder(changed_in_memory),
    ]
    fingerprints = [encoder.fingerprint for encoder in encoders]
    assert len(set(fingerprints)) == len(encoders)
    other_projectors = make_extractor(tiny_folder, seed=5)
    assert random_encoder(other_projectors).fingerprint == fingerprints[0]


def test_an_unreadable_image_is_named(tiny_folder, image_folder):
    for path in (image_folder / "sub").iterdir():
        path.rename(image_folder / path.name)
    (image_folder / "sub").rmdir()
    (image_folder / "1.png").write_bytes(b"no image")
    encoder = make_encoder(tiny_folder, image_folder)
    with pytest.raises(ImageError, match=r"1.png cannot be read"):
        encoded(encoder, [0, 1, 2])
    errors: list[tuple[int, str]] = []
    left = dict(encoder.encode([0, 1, 2], lambda position, error: errors.append((position, str(error)))))
    assert list(left) == [0, 2] and errors[0][0] == 1 and "1.png" in errors[0][1]


def test_a_file_that_cannot_be_opened_is_an_image_error(extractor, tmp_path: Path):
    encoder = ReferenceEncoder(extractor, lambda position: torch.load(tmp_path / "gone.pt"))
    with pytest.raises(ImageError, match=r"reference image 3 cannot be read: .*gone.pt"):
        encoded(encoder, [3])


def test_errors(extractor):
    with pytest.raises(InputError, match="dtype is torch.int8, expected one of"):
        random_encoder(extractor, dtype=torch.int8)
    with pytest.raises(InputError, match="batch_size is 0, expected at least 1"):
        random_encoder(extractor, batch_size=0)
    with pytest.raises(InputError, match=r"images of shapes \[\(3, 40, 40\)\], expected \(3, 32, 32\)"):
        encoded(random_encoder(extractor, size=40), [0])


def test_tokens_that_float16_cannot_hold(tiny_folder):
    extractor = make_extractor(tiny_folder, normalize_tokens=False)
    extractor.backbone.register_forward_hook(lambda module, inputs, maps: [1e5 * level for level in maps])
    with pytest.raises(InputError, match=r"image 2 do not fit torch.float16, .*use bfloat16"):
        encoded(random_encoder(extractor), [2])
    assert encoded(random_encoder(extractor, dtype=torch.bfloat16), [2])[2].isfinite().all()
