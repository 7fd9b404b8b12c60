"""The extractor end to end: the authors' numbers, its interface, precision, threads, and what feature_info promises."""

from __future__ import annotations

import gc
import math
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from adpretrain_hf import ADPretrainConfig, ADPretrainFeatureExtractor, ReferenceBank
from adpretrain_hf.backbones import Backbone
from adpretrain_hf.bundle.released import from_released
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.scoring import ScoredImage
from tests.benchmarks.peak_memory import peak_memory
from tests.conftest import GOLDEN, PHOTOS, make_extractor, random_image
from tests.tiny import save_tiny


@pytest.fixture
def authors(released):
    """The tiny DINOv2 with the stored checkpoint's projectors, as published."""
    extractor = ADPretrainFeatureExtractor.from_backbone(str(GOLDEN / "dinov2_tiny"), normalize_tokens=False)
    projectors = {name: tensor.float() for name, tensor in from_released(released).items()}
    extractor.projectors.load_state_dict(projectors)
    return extractor


def references(number: int = 3) -> list[Image.Image]:
    return [random_image(100 + seed) for seed in range(number)]


def test_some_levels_are_those_of_all(tiny_folder):
    extractor = make_extractor(tiny_folder).set_reference([random_image(0)])
    every, some = extractor([random_image(1)]), extractor([random_image(1)], layers=("layer2", "layer4"))
    assert list(some) == ["layer2", "layer4"]
    assert all(torch.equal(level, every[name]) for name, level in some.items())
    for layers in ((), ("layer4", "layer2"), ("layer9",)):
        with pytest.raises(InputError, match=r"layers are .*, expected some of \('layer1', .*\), in their order"):
            extractor([random_image(1)], layers=layers)
        with pytest.raises(InputError, match="in their order"):
            extractor.extract([random_image(1)], layers=layers)


def test_some_levels_are_extracted(tiny_folder):
    extractor = make_extractor(tiny_folder, residual_scale=(1, 2, 3, 4)).set_reference([random_image(0)])
    run = {"images": [random_image(1), random_image(2)], "progress": False}
    every = list(extractor.extract(**run))
    for some, features in zip(extractor.extract(**run, layers=("layer2", "layer3")), every, strict=True):
        assert list(some) == ["layer2", "layer3"] and all(torch.equal(some[name], features[name]) for name in some)


def test_some_levels_are_loaded(bundle, tmp_path):
    """What they give, and what banks of all levels give them, is what all give."""
    load = ADPretrainFeatureExtractor.from_pretrained
    whole, some = load(bundle), load(bundle, layers=("layer1", "layer3"))
    assert some.layers == ("layer1", "layer3") and some.out_dims == [32, 32] and len(some.projectors) == 2
    numbers = [sum(one.numel() for one in extractor.parameters()) for extractor in (some, whole)]
    assert numbers[0] < 0.8 * numbers[1]
    images = [random_image(1), random_image(2)]
    bank = whole.make_reference([random_image(0)])
    expected = whole.set_reference(bank)(images)
    for reference in (bank, [random_image(0)]):
        features = some.set_reference(reference)(images)
        assert list(features) == ["layer1", "layer3"]
        assert all(torch.equal(level, expected[name]) for name, level in features.items())
    assert all(torch.equal(level, expected[name]) for name, level in some(images, [bank, bank]).items())
    assert torch.equal(some(images, layers=("layer3",))["layer3"], expected["layer3"])
    assert not torch.equal(some.score(images).scores, whole.score(images).scores)
    with pytest.raises(InputError, match=r"made by another extractor: .*resize_mode='crop', decode='exact'\)\. Make"):
        whole.set_reference(some.reference)
    whole.set_reference(bank, category="nut").save_pretrained(bundle, references=True)
    assert torch.equal(load(bundle, layers=("layer2",), references=True)(images)["layer2"], expected["layer2"])
    assert load(bundle, layers=whole.layers).whole is None
    with pytest.raises(InputError, match="of some of a bundle's levels cannot be saved: load it without `layers`"):
        some.save_pretrained(tmp_path / "some")
    with pytest.raises(
        InputError, match=r"layers are \('layer9',\), expected some of \('layer1', .*\), in their order"
    ):
        load(bundle, layers=("layer9",))


class TestAgainstTheAuthors:
    def test_features(self, golden, authors):
        authors.set_reference(golden["e2e.references"])
        for level, features in enumerate(authors(golden["e2e.images"]).values()):
            expected = golden[f"e2e.features.{level}"]
            assert (features - expected).norm() / expected.norm() <= 1e-3

    def test_map(self, golden, authors):
        result = authors.set_reference(golden["e2e.references"]).score(golden["e2e.images"])
        assert (result.maps - golden["e2e.map"]).abs().max() <= 1e-4
        torch.testing.assert_close(result.scores, golden["e2e.map"].amax(dim=(1, 2)), atol=1e-4, rtol=0)

    def test_saved_and_loaded_again(self, golden, authors, tmp_path):
        authors.save_pretrained(tmp_path)
        again = ADPretrainFeatureExtractor.from_pretrained(tmp_path)
        ours = authors(golden["e2e.images"], golden["e2e.references"])
        theirs = again(golden["e2e.images"], golden["e2e.references"])
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_promises_before_the_first_forward_hold(extractor):
    features = extractor.set_reference(references())(extractor.preprocess(random_image(0)))
    assert tuple(features) == extractor.layers == ("layer1", "layer2", "layer3", "layer4")
    for maps, width, reduction in zip(features.values(), extractor.out_dims, extractor.reductions, strict=True):
        side = extractor.image_size // reduction
        assert maps.shape == (1, width, side, side)
        assert maps.dtype == extractor.dtype and maps.device == extractor.device


def test_a_new_extractor_gives_the_residuals(tiny_folder):
    extractor = ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), image_size=32, num_heads=4)
    extractor.set_reference(references())
    images = extractor.preprocess([random_image(1), random_image(2)])
    residuals = extractor.reference.residuals(extractor.encode(images))
    for features, residual in zip(extractor(images).values(), residuals, strict=True):
        assert torch.equal(features, residual)


def test_tokens_have_unit_length_where_the_configuration_says_so(tiny_folder):
    images = torch.randn(2, 3, 32, 32)
    for level in make_extractor(tiny_folder).encode(images):
        torch.testing.assert_close(level.norm(dim=1), torch.ones(2, 4, 4))
    for level in make_extractor(tiny_folder, normalize_tokens=False).encode(images):
        assert (level.norm(dim=1) - 1).abs().min() > 0.1


def test_residual_scale_multiplies_each_level(tiny_folder):
    plain = make_extractor(tiny_folder)
    scaled = make_extractor(tiny_folder, residual_scale=(1, 2, 0.5, 3))
    bank = plain.make_reference(references())
    features = plain.encode(torch.randn(1, 3, 32, 32))
    pairs = zip(plain.residuals(features, bank), scaled.residuals(features, bank), (1, 2, 0.5, 3), strict=True)
    for one, other, scale in pairs:
        torch.testing.assert_close(one * scale, other)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 24), (8, 8)])
def test_input_need_not_be_square(extractor, height, width):
    extractor.set_reference(torch.randn(2, 3, height, width))
    images = torch.randn(2, 3, height, width)
    for maps in extractor(images).values():
        assert maps.shape == (2, 32, height // 8, width // 8)
    assert extractor.score(images).maps.shape == (2, height, width)


def test_images_of_any_kind_give_the_same_features(extractor, tmp_path):
    image = random_image(5)
    image.save(tmp_path / "a.png")
    extractor.set_reference(references())
    prepared = extractor(extractor.preprocess(image))
    pixels = np.asarray(image)
    kinds = [image, [image], tmp_path / "a.png", str(tmp_path / "a.png"), tmp_path, pixels]
    kinds += [torch.from_numpy(pixels.copy()).permute(2, 0, 1), (image for _ in range(1))]
    for kind in kinds:
        assert torch.equal(extractor(kind)["layer2"], prepared["layer2"])


class TestReference:
    def test_it_must_be_set(self, extractor):
        images = extractor.preprocess(random_image(0))
        for call in (extractor, extractor.score, extractor.extract):
            with pytest.raises(InputError, match=r"no reference is set: call set_reference\(images\)"):
                call(images)

    def test_none_is_refused_and_the_old_one_stays(self, extractor):
        extractor.set_reference(references())
        kept = extractor.reference
        for nothing in ([], iter([]), torch.zeros(0, 3, 32, 32)):
            with pytest.raises(InputError, match="at least one"):
                extractor.set_reference(nothing)
        assert extractor.reference is kept

    def test_against_itself_an_image_keeps_no_residual(self, extractor, tiny_folder):
        fresh = ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), image_size=32, num_heads=4)
        images = fresh.preprocess(references(4))
        assert all(level.abs().max() < 1e-5 for level in fresh.set_reference(images)(images).values())

    def test_kinds_are_equal(self, extractor, tmp_path):
        for number, image in enumerate(references()):
            image.save(tmp_path / f"{number}.png")
        extractor.make_reference(references()).save(tmp_path / "bank.safetensors")
        image = extractor.preprocess(random_image(0))
        expected = extractor.set_reference(references())(image)
        bank = ReferenceBank.load(tmp_path / "bank.safetensors")
        for kind in (tmp_path, sorted(tmp_path.glob("*.png")), bank, tmp_path / "bank.safetensors"):
            assert torch.equal(extractor.set_reference(kind)(image)["layer4"], expected["layer4"])
        assert torch.equal(extractor(image, references())["layer4"], expected["layer4"])

    def test_many_images_make_the_same_bank_as_one_batch(self, extractor):
        images = extractor.preprocess(references(5))
        one, many = extractor.make_reference(images), extractor.make_reference(images, batch_size=2)
        assert (len(one), one.num_images) == (len(many), many.num_images) == (5 * 16, 5)
        for a, b in zip(one.patches, many.patches, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_one_bank_for_each_image(self, extractor):
        banks = [extractor.make_reference(references(k)) for k in (1, 2)]
        images = extractor.preprocess([random_image(7), random_image(8)])
        mixed = extractor(images, [banks[1], banks[0]])["layer3"]
        torch.testing.assert_close(mixed[:1], extractor(images[:1], banks[1])["layer3"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[1:], extractor(images[1:], banks[0])["layer3"], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("other", ["backbone", "levels", "image size", "preparation"])
    def test_that_of_another_extractor_is_refused(self, extractor, tiny_folder, tmp_path, other):
        if other == "backbone":
            another = make_extractor(save_tiny(tmp_path / "other", seed=9))
        else:
            change = {
                "levels": {"layers": (1, 2, 4)},
                "image size": {"image_size": 64},
                "preparation": {"resize_mode": "resize"},
            }
            another = make_extractor(tiny_folder, **change[other])
        bank = another.make_reference(references())
        message = f"{another.config.fingerprint}, this extractor's is {extractor.config.fingerprint}"
        with pytest.raises(InputError, match=message):
            extractor.set_reference(bank)
        with pytest.raises(InputError, match="was made by another extractor"):
            extractor(torch.zeros(1, 3, 32, 32), bank)

    def test_another_training_of_the_projectors_may_use_it(self, extractor, tiny_folder):
        bank = make_extractor(tiny_folder, seed=5, num_reference_tokens=8).make_reference(references())
        assert extractor.set_reference(bank).reference is bank

    def test_it_follows_the_extractor(self, extractor):
        extractor.set_reference(references()).double()
        assert extractor(torch.randn(1, 3, 32, 32))["layer1"].dtype == torch.float64


class TestManyImages:
    def test_extract_is_forward_one_by_one(self, extractor, image_folder):
        extractor.set_reference(references())
        prepared = extractor.preprocess(image_folder)
        expected = extractor(prepared)
        results = list(extractor.extract(image_folder, batch_size=2, progress=False))
        assert len(results) == 5
        for row, features in enumerate(results):
            assert tuple(features) == extractor.layers
            torch.testing.assert_close(features["layer2"], expected["layer2"][row], atol=1e-5, rtol=1e-4)

    def test_extract_reads_a_generator_only_as_far_as_needed(self, extractor):
        read = []

        def images():
            for number in range(1000):
                read.append(number)
                yield random_image(number)

        stream = extractor.set_reference(references()).extract(images(), batch_size=4, progress=False)
        next(stream)
        stream.close()
        assert len(read) <= 16

    @pytest.mark.parametrize("batch_size", [0, -1, 2.5])
    def test_batch_size_must_be_positive(self, extractor, batch_size):
        extractor.set_reference(references())
        for method in (extractor.extract, extractor.score):
            with pytest.raises(InputError, match=f"batch_size is {batch_size}, expected an integer >= 1"):
                method(references(), batch_size=batch_size)

    def test_score_gives_maps_at_the_images_size(self, extractor):
        extractor.set_reference(references())
        same = extractor.score([random_image(1, 50, 40), random_image(2, 50, 40)])
        assert same.maps.shape == (2, 40, 50) and same.scores.shape == (2,)
        mixed = extractor.score([random_image(1, 50, 40), random_image(2, 33, 99)])
        assert [tuple(anomaly.shape) for anomaly in mixed.maps] == [(40, 50), (99, 33)]
        torch.testing.assert_close(mixed.scores[0], same.scores[0])

    def test_batches_do_not_change_scores(self, extractor, image_folder):
        extractor.set_reference(references())
        one, many = (extractor.score(image_folder, batch_size=size).scores for size in (1, 5))
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)

    def test_a_bad_image_is_named(self, extractor, image_folder):
        (image_folder / "1.png").write_bytes(b"")
        extractor.set_reference(references())
        with pytest.raises(ImageError, match="1.png cannot be read as an image"):
            extractor.score(image_folder)

    def test_whole_images_of_many_shapes(self, tiny_folder):
        extractor = make_extractor(tiny_folder, resize_mode="resize")
        images = [random_image(n, w, h) for n, (w, h) in enumerate([(64, 32), (32, 64), (40, 40), (64, 32)])]
        result = extractor.set_reference(images[:2]).score(images, batch_size=4)
        assert [tuple(m.shape) for m in result.maps] == [(32, 64), (64, 32), (40, 40), (32, 64)]
        with pytest.raises(InputError, match="images of different shapes"):
            extractor.preprocess(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\), expected \(B, 3, H, W\)"),
        (torch.zeros(1, 4, 32, 32), r"shape \(1, 4, 32, 32\), expected \(B, 3, H, W\)"),
        (
            torch.zeros(1, 3, 30, 32),
            "30 x 32 pixels, expected a height and width that are multiples of the patch size 8",
        ),
        (torch.zeros(1, 3, 0, 32), "0 x 32 pixels"),
        (torch.full((1, 3, 32, 32), torch.nan), "hold NaN or infinite values"),
        (torch.full((1, 3, 32, 32), torch.inf), "hold NaN or infinite values"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64, expected uint8"),
        (np.zeros((32, 32, 3)), "array of float64, expected uint8 or uint16"),
        (7, "got int as images"),
    ],
)
def test_images_that_cannot_be_used_are_refused(extractor, images, message):
    extractor.set_reference(references())
    for call in (extractor, extractor.score):
        with pytest.raises(InputError, match=message):
            call(images)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half(self, extractor, dtype):
        images = [random_image(1), random_image(2)]
        expected = extractor.set_reference(references()).score(images)
        extractor.to(dtype).set_reference(references())
        assert extractor(images)["layer4"].dtype == dtype
        result = extractor.score(images)
        assert result.maps.dtype == torch.float32
        torch.testing.assert_close(result.scores, expected.scores, atol=0.05, rtol=0.05)

    def test_autocast(self, extractor):
        images = [random_image(1), random_image(2)]
        expected = extractor.set_reference(references()).score(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = extractor.score(images)
        torch.testing.assert_close(result.scores, expected.scores, atol=0.05, rtol=0.05)

    def test_overflow_is_an_error_and_no_score(self, extractor):
        extractor.set_reference(references())
        with torch.no_grad():
            extractor.projectors[0].mlp.fc2.bias.fill_(torch.inf)
        with pytest.raises(InputError, match="the score of image 0 is"):
            extractor.score([random_image(0)])


class TestFrozen:
    def test_the_backbone_stays_closed_whatever_is_opened(self, extractor):
        extractor.requires_grad_(True)
        extractor.backbone.requires_grad_(True)
        assert not any(parameter.requires_grad for parameter in extractor.backbone.parameters())
        assert all(parameter.requires_grad for parameter in extractor.projectors.parameters())

    def test_a_second_view_of_projectors_in_training_does_not_close_them(self, extractor):
        extractor.projectors.requires_grad_()
        ADPretrainFeatureExtractor(extractor.config, extractor.backbone, extractor.projectors)
        assert extractor.projectors[0].reference_tokens.requires_grad

    def test_nothing_is_trained_by_default(self, extractor):
        assert not any(parameter.requires_grad for parameter in extractor.parameters())
        assert not extractor.set_reference(references())(random_image(0))["layer1"].requires_grad

    def test_projectors_can_be_opened_and_the_backbone_stays(self, extractor):
        extractor.train().projectors.requires_grad_()
        assert not extractor.backbone.training
        extractor.set_reference(references())(random_image(0))["layer1"].sum().backward()
        assert extractor.projectors[0].reference_tokens.grad is not None
        assert not any(parameter.requires_grad for parameter in extractor.backbone.parameters())


def test_threads_may_score_at_once(extractor):
    extractor.set_reference(references())
    batches = [[random_image(10 * t + n) for n in range(3)] for t in range(6)]
    expected = [extractor.score(batch).scores for batch in batches]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda t=t: results.update({t: extractor.score(batches[t]).scores}))
        for t in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for t, scores in enumerate(expected):
        torch.testing.assert_close(results[t], scores, atol=1e-6, rtol=1e-6)


def test_a_reference_may_be_changed_while_others_look_at_it(extractor):
    banks = [extractor.make_reference(references(), category=category) for category in ("nut", "screw")]
    errors, done, interval = list[Exception](), threading.Event(), sys.getswitchinterval()

    def look():
        while not done.is_set():
            try:
                (category,) = extractor._matched(None, None)[0]
                assert category in ("nut", "screw") and extractor.reference.category in ("nut", "screw")
            except Exception as error:
                errors.append(error)
                return

    extractor.set_reference(banks[0])
    threads = [threading.Thread(target=look) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for number in range(3000):
            extractor.set_reference(banks[number % 2])
    finally:
        done.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_backbone_that_does_not_fit_its_configuration_is_refused():
    from tests.tiny import tiny_model

    config = ADPretrainConfig(backbone="x", hidden_size=64, patch_size=8, layers=(1, 2))
    with pytest.raises(
        InputError, match="width, patch size and levels are .32, 8, .1, 2.., the configuration's are .64"
    ):
        ADPretrainFeatureExtractor(config, Backbone(tiny_model("vit"), (1, 2)))


def test_projectors_that_do_not_fit_are_refused(extractor):
    config = extractor.config.replace(num_heads=8)
    with pytest.raises(InputError, match="the projectors' reference tokens, width and heads are"):
        ADPretrainFeatureExtractor(config, extractor.backbone, extractor.projectors)


def test_a_bank_without_a_stamp_must_have_the_right_shape(extractor):
    with pytest.raises(InputError, match="has 1 levels of 8 channels, this extractor 4 of 32"):
        extractor.set_reference(ReferenceBank([torch.zeros(3, 8)]))


def test_a_network_that_does_not_fit_is_refused_when_it_is_loaded(tmp_path):
    from transformers import DeiTConfig, DeiTModel

    from tests.tiny import SIZES

    DeiTModel(DeiTConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'deit' gave 18 tokens"):
        ADPretrainFeatureExtractor.from_backbone(str(tmp_path))


def test_photographs_are_told_apart_without_training(tmp_path):
    extractor = ADPretrainFeatureExtractor.from_backbone(str(GOLDEN / "dinov2_tiny"))
    brick = PHOTOS / "brick"
    extractor.set_reference(brick / "train" / "good")
    assert extractor.reference.num_images == 8
    result = extractor.score(brick / "test" / "crack")
    assert result.scores.shape == (3,) and result.maps.shape[0] == 3


# feature_info: what it promises against what is given, and timm's own reading of the same entries


QUESTIONS = [None, 0, 1, -1, [1], [1, 0], (0, 1)]


@pytest.fixture
def two_levels(tiny_folder):
    return make_extractor(tiny_folder, layers=(2, 3)).set_reference([random_image(1)])


def test_promises_of_feature_info_hold(two_levels):
    info = two_levels.feature_info
    features = two_levels(torch.randn(2, 3, 32, 48))
    assert len(info) == len(features) == 2
    for entry, maps in zip(info.get_dicts(), features.values(), strict=True):
        assert maps.shape == (2, entry["num_chs"], 32 // entry["reduction"], 48 // entry["reduction"])


def test_the_module_that_feature_info_names_gives_the_features(two_levels):
    given = {}
    for index, name in enumerate(two_levels.feature_info.module_name()):
        module = two_levels.get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, output, index=index: given.update({index: output}))
    features = two_levels(torch.randn(1, 3, 32, 32))
    for index, maps in enumerate(features.values()):
        assert torch.equal(given[index], maps)


@pytest.mark.parametrize("idx", QUESTIONS)
def test_feature_info_answers_as_timm_does(two_levels, idx):
    timm = pytest.importorskip("timm")
    ours = two_levels.feature_info
    theirs = timm.models.FeatureInfo(ours.get_dicts(), out_indices=ours.out_indices)
    for question in ("channels", "reduction", "module_name", "get_dicts"):
        arguments = {"idx": idx}
        assert getattr(ours, question)(**arguments) == getattr(theirs, question)(**arguments)
    assert ours.get_dicts(["num_chs"], idx) == theirs.get_dicts(["num_chs"], idx)
    assert [ours[place] for place in range(len(ours))] == [theirs[place] for place in range(len(theirs))]


def test_feature_info_agrees_with_the_attributes(two_levels):
    assert two_levels.feature_info.channels() == two_levels.out_dims == [32, 32]
    assert two_levels.feature_info.reduction() == two_levels.reductions == [8, 8]
    assert two_levels.feature_info.get("index", [1]) == [1]


def test_features_of_an_image_are_its_own(extractor, tmp_path):
    extractor.set_reference([random_image(1)])
    for features in extractor.extract([random_image(n) for n in range(4)], batch_size=4, progress=False):
        save_file(features, tmp_path / "one.safetensors")  # it takes nothing that lies in memory in another order
        for level in features.values():
            assert level.untyped_storage().nbytes() == level.numel() * level.element_size()


def test_numpys_integers_and_arrays_and_columns_of_paths_are_taken(bundle, tmp_path):
    for number in range(2):
        random_image(number).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    extractor = ADPretrainFeatureExtractor.from_pretrained(bundle, image_size=np.int64(64)).set_reference(paths[:1])
    assert type(extractor.config.image_size) is int and extractor.config.image_size == 64
    expected = extractor.score(paths).scores
    table = pd.DataFrame({"image": paths})
    arrays = (np.array(paths), np.array(paths, dtype=object), np.array(paths)[:, None])
    for images in (*arrays, table, table["image"]):
        assert torch.equal(extractor.score(images, batch_size=np.int64(2)).scores, expected)
    with pytest.raises(InputError, match=r"got a table of shape \(2, 2\) as images, expected one column of paths"):
        extractor.score(table.assign(label=0))


# What makes scores mean something else: references among the images, parts that are cut off


def pictures(*seeds: int) -> list[Image.Image]:
    return [random_image(seed, 40, 40) for seed in seeds]


@pytest.mark.parametrize("saved", [False, True])
def test_references_that_are_scored_are_compared_with_the_others(extractor, tmp_path, caplog, saved):
    bank = extractor.make_reference(pictures(1, 2, 3))
    if saved:
        bank.save(tmp_path / "bank.safetensors")
        bank = ReferenceBank.load(tmp_path / "bank.safetensors")
    got = extractor.set_reference(bank).score(pictures(7, 2, 1, 2), batch_size=3).scores
    assert caplog.text.count("is a reference itself: such images are compared with the other references") == 1
    for place, seed, others in ((0, 7, (1, 2, 3)), (1, 2, (1, 3)), (2, 1, (2, 3)), (3, 2, (1, 3))):
        expected = extractor.set_reference(pictures(*others)).score(pictures(seed)).scores
        torch.testing.assert_close(got[place : place + 1], expected)


def test_a_reference_against_a_core_set_is_told(extractor, caplog):
    extractor.set_reference(extractor.make_reference(pictures(1, 2, 3)).compact(0.5)).score(pictures(2))
    assert "image 0 is a reference itself, and compared with itself: its score says nothing" in caplog.text


def test_frames_that_are_scored_one_by_one_are_warned_of_once(extractor, caplog):
    extractor.set_reference(pictures(1, 2))
    for seed in (3, 4):
        extractor.score(random_image(seed, 80, 40))
    assert caplog.text.count("50 % of it are cut off and not looked at") == 1


def test_a_bank_that_does_not_know_its_images_is_as_before(extractor, caplog):
    known = extractor.make_reference(pictures(1, 2))
    bank = ReferenceBank(known.patches, num_images=2, fingerprint=known.fingerprint)
    extractor.set_reference(bank).score(pictures(1))
    assert not caplog.text


def test_what_is_cut_off_is_told_once_a_run(extractor, caplog):
    extractor.set_reference(pictures(1)).score([*pictures(2), random_image(3, 80, 40), random_image(4, 120, 40)])
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "image 1: 50 % of it are cut off and not looked at; with resize_mode='resize'"
    )


def test_resize_mode_is_chosen_at_loading(bundle, caplog):
    whole = ADPretrainFeatureExtractor.from_pretrained(bundle, resize_mode="resize")
    wide = random_image(3, 80, 40)
    assert whole.preprocess(wide).shape == (1, 3, 32, 64)
    maps = whole.set_reference(wide).score(random_image(4, 80, 40)).maps
    assert (maps > 0).all()
    assert not caplog.records
    cropped = ADPretrainFeatureExtractor.from_pretrained(bundle)
    with pytest.raises(InputError, match="was made by another extractor"):
        cropped.set_reference(whole.reference)


# Several products


@pytest.fixture
def products(extractor):
    """An extractor with references of two products."""
    return extractor.set_references({"screw": pictures(1, 2, 3), "nut": pictures(4, 5)})


CATEGORIES = ["screw", "nut", "nut", "screw", "nut"]


@pytest.mark.parametrize("as_given", [list, iter, np.array, pd.Series])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_run_of_several_products_is_a_run_of_each(products, as_given, batch_size):
    images = pictures(10, 4, 12, 2, 14)  # the second and the fourth are references of their products themselves
    mixed = products.score(images, categories=as_given(CATEGORIES), batch_size=batch_size)
    features = list(products.extract(images, categories=as_given(CATEGORIES), progress=False))
    for category in ("screw", "nut"):
        rows = [row for row, one in enumerate(CATEGORIES) if one == category]
        products.set_reference(category=category)
        alone = products.score([images[row] for row in rows])
        torch.testing.assert_close(mixed.scores[rows], alone.scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed.maps[rows], alone.maps, atol=1e-5, rtol=1e-4)
        for row, levels in zip(rows, products.extract([images[row] for row in rows], progress=False), strict=True):
            torch.testing.assert_close(features[row]["layer2"], levels["layer2"], atol=1e-5, rtol=1e-4)


def test_prepared_images_have_categories_too(products):
    images = pictures(10, 11, 12, 13, 14)
    expected = products.score(images, categories=CATEGORIES).scores
    assert torch.equal(products.score(products.preprocess(images), categories=CATEGORIES).scores, expected)


def test_an_image_that_is_left_out_takes_its_category_along(products, tmp_path):
    images = [*pictures(10, 11), tmp_path / "none.png", *pictures(13, 14)]
    left_out = []
    stream = products.score_stream(
        images, categories=iter(CATEGORIES), progress=False, on_error=lambda name, error: left_out.append(name)
    )
    assert [one.category for one in stream] == ["screw", "nut", "screw", "nut"]
    assert left_out == [str(tmp_path / "none.png")]


def test_references_of_one_run_are_not_those_that_are_set(extractor, tmp_path):
    banks = {name: extractor.make_reference(pictures(seed)) for name, seed in (("screw", 1), ("nut", 2))}
    for name, bank in banks.items():
        bank.save(tmp_path / f"{name}.safetensors")
    extractor.set_reference(pictures(9))
    expected = [extractor(pictures(7), bank)["layer1"][0] for bank in banks.values()]
    for references in (banks, tmp_path, str(tmp_path)):
        run = {"references": references, "categories": ["screw", "nut"], "progress": False}
        for features, wanted in zip(extractor.extract(pictures(7, 7), **run), expected, strict=True):
            torch.testing.assert_close(features["layer1"], wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(
        extractor.score(pictures(7), references={"nut": banks["nut"]}).scores,
        extractor.set_reference(banks["nut"]).score(pictures(7)).scores,
    )


def test_categories_that_do_not_fit_are_refused(products):
    images = pictures(10, 11)
    for call in (lambda **run: products.score(images, **run), lambda **run: list(products.extract(images, **run))):
        for categories in (["screw", "nuts"], iter(["nuts", "screw"]), "nuts"):
            message = "no reference of the category 'nuts': expected one of nut, screw: did you mean 'nut'?"
            with pytest.raises(InputError, match=message):
                call(categories=categories)
        with pytest.raises(InputError, match="got 3 categories for 2 images, expected one for each"):
            call(categories=["nut"] * 3)
        with pytest.raises(InputError, match="got more categories than images, 2 of them"):
            call(categories=iter(["nut"] * 3))
        with pytest.raises(InputError, match="got fewer categories than images, 1 of them"):
            call(categories=iter(["nut"]))
        with pytest.raises(InputError, match=r"references of several products are set \(screw, nut\): give categories"):
            call()
        with pytest.raises(InputError, match="no categories were given: expected one for each image, of screw, nut"):
            call(references=products.references)
    with pytest.raises(InputError, match="several products are set"):
        products(images)
    assert products.score(images, categories="nut").scores.shape == (2,)


def test_one_of_several_references_is_chosen(products):
    assert products.reference is None
    assert products.set_reference(category="nut").reference is products.references["nut"]
    with pytest.raises(InputError, match="no reference of the category 'bolt': expected one of nut, screw"):
        products.set_reference(category="bolt")
    products.set_reference(pictures(3), category="bolt")
    assert list(products.references) == ["bolt"] and products.reference.category == "bolt"
    products.reference = None
    with pytest.raises(InputError, match="no reference of the category 'bolt': no references are set"):
        products.set_reference(category="bolt")
    assert products.set_references({"pin": pictures(3)}).reference is products.references["pin"]


def test_images_are_added_to_a_reference(products):
    before = products.references["nut"]
    products.add_reference(pictures(6), category="screw").set_reference(category="screw").add_reference(pictures(7, 8))
    assert products.references["nut"] is before
    assert [image.digest for image in products.reference.images] == [
        image.digest for image in products.make_reference(pictures(1, 2, 3, 6, 7, 8)).images
    ]
    with pytest.raises(InputError, match="both reference banks have the images image 0: remove them from one"):
        products.add_reference(pictures(8))
    with pytest.raises(InputError, match="no reference of the category 'bolt'"):
        products.add_reference(pictures(9), category="bolt")
    products.reference = None
    with pytest.raises(InputError, match="no reference is set"):
        products.add_reference(pictures(9))


@pytest.mark.parametrize("references", [{}, [1, 2], random_image(0)])
def test_references_that_are_not_by_category_are_refused(extractor, references):
    with pytest.raises(InputError, match=r"as references of several products, expected \{category: bank or images\}"):
        extractor.set_references(references)


def test_a_folder_without_banks_is_no_references(extractor, tmp_path):
    with pytest.raises(InputError, match=r"no reference banks in .*expected <category>.safetensors"):
        extractor.set_references(tmp_path)
    with pytest.raises(InputError, match="no folder of reference banks at "):
        extractor.set_references(tmp_path / "none")


def test_all_references_follow_the_extractor(products):
    products.double()
    assert products.score(pictures(7), categories="nut").scores.shape == (1,)


def test_notices_know_the_bank_of_each_image(products, caplog):
    products.set_references(products.references | {"pin": pictures(4)})
    images = pictures(4, 4, 1)  # of nut; of pin, where it is the only one; of nut, where it is none
    products.score(images, categories=["nut", "pin", "nut"])
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("image 0 is a reference itself: such images are compared with the other references")
    assert told[1].startswith("image 1 is a reference itself, and compared with itself") and len(told) == 2


def test_decoding_is_chosen_at_loading(bundle, tmp_path):
    random_image(3, 12, 10).resize((96, 80)).save(tmp_path / "image.jpg")
    fast = ADPretrainFeatureExtractor.from_pretrained(bundle, decode="fast")
    exact = ADPretrainFeatureExtractor.from_pretrained(bundle)
    assert not torch.equal(fast.preprocess(tmp_path / "image.jpg"), exact.preprocess(tmp_path / "image.jpg"))
    bank = fast.make_reference(random_image(4))
    assert fast.set_reference(bank).score(tmp_path / "image.jpg").maps.shape == (1, 80, 96)
    with pytest.raises(InputError, match="was made by another extractor"):
        exact.set_reference(bank)
    with pytest.raises(InputError, match="decode is 'quick', expected one of"):
        ADPretrainFeatureExtractor.from_pretrained(bundle, decode="quick")


class TestMaps:
    def test_scores_alone(self, extractor):
        images = [random_image(7), random_image(8, 60, 50)]
        whole = extractor.set_reference(references()).score(images)
        maps, scores = extractor.score(images, maps=False)
        assert maps is None and torch.equal(scores, whole.scores)
        with pytest.raises(InputError, match="no images were given"):
            extractor.score(iter([]), maps=False)

    @pytest.mark.parametrize(("map_size", "size"), [(24, (24, 24)), ((16, 20), (16, 20)), (np.int64(5), (5, 5))])
    def test_of_one_size_for_images_of_several(self, extractor, map_size, size):
        images = [random_image(7), random_image(8, 60, 30)]
        result = extractor.set_reference(references()).score(images, map_size=map_size)
        assert result.maps.shape == (2, *size)
        assert torch.equal(result.scores, extractor.score(images).scores)
        assert (result.maps[1, :, 0] == 0).all() and (result.maps[1, :, size[1] // 2] > 0).all()  # the crop

    @pytest.mark.parametrize("map_size", [0, -1, 2.5, True, "224", (8,), (8, 0), (8, 8, 8), (2.5, 8)])
    def test_another_size_is_refused(self, extractor, map_size):
        with pytest.raises(InputError, match="map_size is .*, expected an integer >= 1, or two"):
            extractor.set_reference(references()).score(random_image(7), map_size=map_size)

    def test_a_size_of_maps_that_are_not_wanted_is_refused(self, extractor):
        with pytest.raises(InputError, match="map_size is 24, and maps=False: expected one or the other"):
            extractor.set_reference(references()).score(random_image(7), map_size=24, maps=False)

    def test_they_are_in_memory_once(self, extractor):
        images = torch.randn(8, 3, 32, 32)
        extractor.set_reference(references()).score(images)
        with peak_memory() as peak:
            maps = extractor.score(images, map_size=(1500, 2000)).maps
        if math.isnan(peak.megabytes):
            pytest.skip("this system does not tell the peak of memory")
        assert maps.nbytes == 96e6
        assert peak.megabytes < 145

    def test_nothing_else_of_an_image_is_kept(self, extractor):
        held = list[int]()

        def images():
            for seed in range(6):
                held.append(sum(isinstance(one, ScoredImage) for one in gc.get_objects()))
                yield random_image(seed)

        extractor.set_reference(references()).score(images(), map_size=4, batch_size=1)
        assert max(held) <= 1
