"""References of a step: who may be one, encoded to the same bits in any company, drawn anew for every image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.matching import nearest_residual, to_rows
from tests.conftest import make_extractor
from tests.tiny import save_tiny
from tests.training.references import make_encoder
from training.content_keys import content_keys
from training.reference_cache import ReferenceCache
from training.reference_encoding import ReferenceEncoder
from training.reference_pool import ReferencePool
from training.references import References
from training.samples import Samples
from training.settings import PretrainSettings
from training.training_data import TrainingData, load_training_data

# The pool: who is in it, what is drawn, and what is said where nothing can be


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


def test_a_pool_among_some_positions():
    mixed = images(4) + images(2, "cap", anomalous=True)
    assert pool_of(mixed, among=[3, 1, 1]).members == [1, 3]
    with pytest.raises(InputError, match=r"1 categories and views have no normal image .*: cap C1\."):
        pool_of(mixed)


def test_a_pool_without_what_cannot_be_read():
    pool = pool_of(images(3) + images(1, "cap"))
    smaller = pool.without([1])
    assert smaller.members == [0, 2, 3] and pool.members == [0, 1, 2, 3]
    assert set(smaller.draw("bolt", "C1", 50, np.random.default_rng(0))) == {0, 2}
    with pytest.raises(InputError, match="no normal image to be a reference: cap C1"):
        pool.without([3])


def test_a_pool_says_what_it_lacks():
    with pytest.raises(InputError, match=r"12 categories .*: bolt0 C1, .*, bolt9 C1 and 2 more"):
        pool_of([(f"bolt{number}", "C1", True) for number in range(12)])
    with pytest.raises(InputError, match="got 2 categories, 1 views and 2 labels"):
        ReferencePool(["a", "b"], ["C1"], [False, False])
    with pytest.raises(InputError, match="pool_size is 0, expected at least 1, or None"):
        pool_of(images(1), pool_size=0)
    with pytest.raises(InputError, match="no references of category 'cap' and view 'C1'"):
        pool_of(images(1)).draw("cap", "C1", 1, np.random.default_rng(0))


# The encoder: the same bits in any company, errors that name the image


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
def test_encoded_patches_are_the_rounded_tokens(extractor, dtype):
    encoder = random_encoder(extractor, dtype=dtype)
    patches = encoded(encoder, [4, 2])
    assert list(patches) == [4, 2] and encoder.shape == (4, 16, 32)
    for position, own in patches.items():
        image = encoder._load(position)[None]
        expected = torch.stack([to_rows(level) for level in extractor.encode(image)]).to(dtype)
        assert own.dtype == dtype and torch.equal(own, expected)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_encoded_bits_do_not_depend_on_the_company(extractor, batch_size, autocast):
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


def test_an_encoder_says_what_it_cannot_take(extractor):
    with pytest.raises(InputError, match="dtype is torch.int8, expected one of"):
        random_encoder(extractor, dtype=torch.int8)
    with pytest.raises(InputError, match="batch_size is 0, expected at least 1"):
        random_encoder(extractor, batch_size=0)
    with pytest.raises(InputError, match=r"images of shapes \[\(3, 40, 40\)\], expected \(3, 32, 32\)"):
        encoded(random_encoder(extractor, size=40), [0])


def test_tokens_that_float16_cannot_hold_are_refused(tiny_folder):
    extractor = make_extractor(tiny_folder, normalize_tokens=False)
    extractor.backbone.register_forward_hook(lambda module, inputs, maps: [1e5 * level for level in maps])
    with pytest.raises(InputError, match=r"image 2 do not fit torch.float16, .*use bfloat16"):
        encoded(random_encoder(extractor), [2])
    assert encoded(random_encoder(extractor, dtype=torch.bfloat16), [2])[2].isfinite().all()


# Of a step: the same in any batch and process, of the image's own kind, never the image itself


@pytest.fixture(scope="module")
def data(synthetic_set) -> TrainingData:
    return load_training_data(PretrainSettings(data=(str(synthetic_set),), resolution="256"), Path("unused"))


def make_references(data: TrainingData, backbone: Path, **changes) -> tuple[References, ReferenceCache]:
    settings = PretrainSettings(**({"references": (1, 3), "seed": 5} | changes))
    extractor = ADPretrainFeatureExtractor.from_backbone(str(backbone), image_size=64, num_reference_tokens=8)
    samples = Samples(data.dataset, data.positions, extractor.config)
    columns = (data.dataset[name] for name in ("category", "view", "is_anomalous"))
    pool = ReferencePool(*columns, among=data.positions)
    encoder = ReferenceEncoder(extractor, samples.load_normal, dtype=torch.float32)
    cache = ReferenceCache(encoder, content_keys(data.dataset["image"]), memory_bytes=10**8)
    return References(data, pool, cache, settings), cache


def test_references_do_not_depend_on_the_rest_of_the_batch(data, tiny_folder):
    references, _ = make_references(data, tiny_folder)
    positions = data.positions[:6]
    together = references.draw(positions, 2, 7)
    for position, own in zip(positions, together, strict=True):
        (alone,) = make_references(data, tiny_folder)[0].draw([position], 2, 7)
        assert all(torch.equal(one, other) for one, other in zip(own, alone, strict=True))


def test_numbers_are_drawn_for_each_step_and_images_anew_for_each_epoch(data, tiny_folder):
    references, _ = make_references(data, tiny_folder)
    rows = [len(references.draw(data.positions[:1], 0, step)[0][0]) // 64 for step in range(20)]
    assert set(rows) == {1, 3}
    fixed, _ = make_references(data, tiny_folder, references=(3,))
    first, second = (fixed.draw(data.positions[:4], epoch, 0) for epoch in (0, 1))
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))


def test_references_are_normal_images_of_the_same_kind_and_never_the_image_itself(data, tiny_folder):
    references, cache = make_references(data, tiny_folder, references=(2,))
    rows = data.dataset.select(data.positions)
    for position, row in list(zip(data.positions, rows, strict=True))[:8]:
        kin = [
            other
            for other, its in zip(data.positions, rows, strict=True)
            if other != position and its["view"] == row["view"] and not its["is_anomalous"]
        ]
        allowed = [cache.get([other])[0] for other in kin]
        (own,) = references.draw([position], 0, 0)
        for part in own[0].chunk(2):
            assert any(torch.equal(part, patches) for patches in allowed)


def test_measured_scale_makes_normal_residuals_one_long(data, tiny_folder):
    references, cache = make_references(data, tiny_folder)
    centers, scale = references.measure()
    residuals = list(references.normal_residuals())
    for level, (factor, center) in enumerate(zip(scale, centers, strict=True)):
        rows = factor * torch.cat([residual[level][0, :, 0].T for residual in residuals])
        assert rows.norm(dim=1).mean().item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(rows.mean(dim=0), center, rtol=1e-4, atol=1e-5)
    unscaled = make_references(data, tiny_folder, scale_residuals=False)[0].measure()
    assert unscaled[1] == [1.0] * 4
    torch.testing.assert_close(unscaled[0][2] * scale[2], centers[2], rtol=1e-4, atol=1e-5)
    assert (
        nearest_residual(cache.get([data.positions[0]])[0].T[None, :, None], cache.get([data.positions[0]])[0])
        .eq(0)
        .all()
    )
