"""ADPretrainConfig: presets, derivation from a backbone, and every range it checks."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.backbones import CLIP, IMAGENET
from adpretrain_hf.backbones.sources import split_source
from adpretrain_hf.bundle.released import FOLDERS
from adpretrain_hf.config import PRESETS, quarter_levels
from adpretrain_hf.errors import BundleError, InputError
from tests.conftest import GOLDEN
from tests.tiny import FAMILIES, save_tiny

VALID = {"backbone": "some/backbone", "hidden_size": 64, "patch_size": 14, "layers": (3, 6, 9, 12)}


@pytest.mark.parametrize(
    ("name", "hidden_size", "patch_size", "layers", "grid"),
    [
        ("dinov2-base", 768, 14, (3, 6, 9, 12), 16),
        ("dinov2-large", 1024, 14, (6, 12, 18, 24), 16),
        ("clip-base", 768, 16, (3, 6, 9, 12), 14),
        ("clip-large", 1024, 14, (6, 12, 18, 24), 16),
        ("imagebind", 1280, 14, (8, 16, 24, 32), 16),
        ("dinov2-small", 384, 14, (3, 6, 9, 12), 16),
        ("dinov2-giant", 1536, 14, (10, 20, 30, 40), 16),
    ],
)
def test_preset_is_the_published_one(name, hidden_size, patch_size, layers, grid):
    config = ADPretrainConfig.preset(name)
    assert (config.hidden_size, config.patch_size, config.layers) == (hidden_size, patch_size, layers)
    assert config.image_size // config.patch_size == grid
    assert config.num_heads == 16
    assert config.num_reference_tokens == 2048
    assert config.residual_scale == (1.0, 1.0, 1.0, 1.0)


def test_released_presets_do_not_normalize_tokens_and_new_ones_do():
    published = {"dinov2-base", "dinov2-large", "clip-base", "clip-large", "imagebind"}
    assert {name for name in PRESETS if not ADPretrainConfig.preset(name).normalize_tokens} == published


def test_clip_family_has_clip_statistics():
    assert ADPretrainConfig.preset("imagebind").mean == ADPretrainConfig.preset("clip-base").mean == CLIP[0]
    assert ADPretrainConfig.preset("dinov2-base").mean == IMAGENET[0]


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown preset 'dinov9': expected one of dinov2-base, dinov2-large"):
        ADPretrainConfig.preset("dinov9")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "", "backbone is '', expected a non-empty text"),
        ("hidden_size", 0, "hidden_size is 0, expected an integer >= 1"),
        ("hidden_size", True, "hidden_size is True, expected an integer"),
        ("hidden_size", 64.0, "hidden_size is 64.0, expected an integer"),
        ("patch_size", -14, "patch_size is -14, expected an integer >= 1"),
        ("layers", (), r"layers is \(\), expected block numbers >= 1 in rising order"),
        ("layers", (0, 3), r"layers is \(0, 3\), expected block numbers >= 1"),
        ("layers", (6, 3), r"layers is \(6, 3\), expected block numbers >= 1 in rising order"),
        ("layers", (3, 3), r"layers is \(3, 3\)"),
        ("layers", "3,6", "layers is '3,6', expected a list or tuple of integers"),
        ("layers", ("3", 6), r"layers is \('3', 6\), expected a list or tuple of integers"),
        ("layers", (3.0, 6.0), r"layers is \(3.0, 6.0\), expected a list or tuple of integers"),
        ("layers", (None,), r"layers is \(None,\), expected a list or tuple of integers"),
        ("layers", 3, "layers is 3, expected a list or tuple of integers"),
        ("mean", (10**400, 0, 0), "mean is .*expected a list or tuple of numbers"),
        ("backbone_revision", 5, "backbone_revision is 5, expected a non-empty text, or None"),
        ("backbone_digest", ["a"], "backbone_digest is .*expected a non-empty text, or None"),
        ("format_version", True, "format_version is True, this version"),
        ("reported_scores", {"angle": {"img_auc": float("nan")}}, "reported_scores is .*finite number"),
        ("image_size", 225, "image_size is 225, expected a multiple of patch_size=14: 224 or 238"),
        ("num_heads", 5, "num_heads is 5, expected a divisor of hidden_size=64"),
        ("num_reference_tokens", 0, "num_reference_tokens is 0, expected an integer >= 1"),
        ("mean", (0.5, 0.5), r"mean is \(0.5, 0.5\), expected 3 finite numbers"),
        ("mean", (0.5, 0.5, float("nan")), "mean is .* expected 3 finite numbers"),
        ("std", (0.5, 0.0, 0.5), "std is .* expected 3 finite numbers > 0"),
        ("resize_mode", "stretch", r"resize_mode is 'stretch', expected one of \('crop', 'resize'\)"),
        ("decode", "quick", r"decode is 'quick', expected one of \('exact', 'fast'\)"),
        ("normalize_tokens", "yes", "normalize_tokens is 'yes', expected True or False"),
        (
            "residual_scale",
            (1.0, 2.0),
            r"residual_scale is \(1.0, 2.0\), expected one finite factor > 0 for each of the 4",
        ),
        ("residual_scale", (1.0, 1.0, 1.0, -1.0), "residual_scale is .*expected one finite factor > 0"),
        ("default_variant", "a/b", "variant is 'a/b', expected letters, digits"),
        ("format_version", 2, "format_version is 2, this version of adpretrain-hf reads 1"),
    ],
)
def test_value_out_of_range_is_named_with_its_range(field, value, message):
    with pytest.raises(InputError, match=message):
        ADPretrainConfig(**VALID | {field: value})


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ADPretrainConfig(**VALID).image_size = 448  # type: ignore[misc]


def test_json_round_trip_is_exact():
    config = ADPretrainConfig(**VALID, residual_scale=(0.1, 1 / 3, 2.0, 7.0), backbone_revision="abc")
    assert ADPretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_model_type_of_transformers_may_stand_in_the_file():
    config = ADPretrainConfig(**VALID)
    assert ADPretrainConfig.from_dict({"model_type": "adpretrain"} | config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2', expected 'adpretrain': it is not an ADPretrain bundle"),
        ({"format_version": 99}, "format_version is 99, this version of adpretrain-hf reads 1"),
        ({"format_version": None}, "format_version is None.*not an ADPretrain bundle"),
        ({"colour": "red"}, r"unknown configuration fields \['colour'\]"),
        ({"image_size": 100}, "image_size is 100, expected a multiple"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(change, message):
    values = ADPretrainConfig(**VALID).to_dict() | change
    with pytest.raises(BundleError, match=message):
        ADPretrainConfig.from_dict(values)


def test_from_dict_names_missing_fields():
    values = ADPretrainConfig(**VALID).to_dict()
    del values["hidden_size"], values["layers"]
    with pytest.raises(BundleError, match=r"\['hidden_size', 'layers'\] are missing"):
        ADPretrainConfig.from_dict(values)


def test_numbers_of_numpy_are_numbers_and_equal_settings_are_equal():
    config = ADPretrainConfig(**VALID, mean=(0, 0, 0))
    other = ADPretrainConfig(**VALID | {"layers": np.array([3, 6, 9, 12])}, mean=np.zeros(3, np.float32))
    assert config == other and hash(config) == hash(other) and config.fingerprint == other.fingerprint
    assert json.dumps(other.to_dict())


def test_the_number_of_levels_can_be_changed():
    assert ADPretrainConfig(**VALID).replace(layers=(1, 2)).residual_scale == (1.0, 1.0)
    with pytest.raises(InputError, match="one finite factor > 0 for each of the 2 levels"):
        ADPretrainConfig(**VALID, residual_scale=(1, 2, 3, 4)).replace(layers=(1, 2))


def test_replace_checks_again():
    with pytest.raises(InputError, match="image_size is 10"):
        ADPretrainConfig(**VALID).replace(image_size=10)
    with pytest.raises(InputError, match=r"unknown configuration fields \['size'\]"):
        ADPretrainConfig(**VALID).replace(size=10)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_backbone_derives_sizes_and_levels(family, tmp_path):
    config = ADPretrainConfig.from_backbone(str(save_tiny(tmp_path, family)))
    assert (config.hidden_size, config.patch_size, config.layers) == (32, 8, (1, 2, 3, 4))
    assert config.image_size == (224 if "dino" in family else 32)  # a fixed position grid keeps its own size
    assert config.normalize_tokens
    expected = {"clip_vision_model": CLIP[0], "siglip_vision_model": (0.5, 0.5, 0.5), "vit": (0.5, 0.5, 0.5)}
    assert config.mean == expected.get(family, IMAGENET[0])


def test_from_backbone_takes_statistics_that_lie_beside_the_weights(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    config = ADPretrainConfig.from_backbone(str(tmp_path))
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": null}')
    config = ADPretrainConfig.from_backbone(str(tmp_path))
    assert (config.mean, config.std) == ((0.5, 0.5, 0.5), IMAGENET[1])


@pytest.mark.parametrize("text", ["{", "[]", '{"image_mean": "red"}', '{"image_std": [1, 2]}'])
def test_from_backbone_names_statistics_that_cannot_be_read(text, tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=r"preprocessor_config.json does not tell the mean and std of three colours"):
        ADPretrainConfig.from_backbone(str(tmp_path))


def test_from_backbone_takes_a_preset_by_name():
    whole = ADPretrainConfig.from_backbone("clip-base")
    assert whole.resize_mode == "resize"
    assert whole.replace(resize_mode="crop") == ADPretrainConfig.preset("clip-base")


def test_released_checkpoints_keep_the_published_crop_and_all_else_is_the_whole_image():
    modes = {name: ADPretrainConfig.preset(name).resize_mode for name in PRESETS}
    ours = {"dinov2-small": "resize", "dinov2-giant": "resize"}
    assert modes == dict.fromkeys(FOLDERS, "crop") | ours
    assert ADPretrainConfig(**VALID).resize_mode == "resize"


def test_from_backbone_refuses_a_level_beyond_the_depth():
    with pytest.raises(InputError, match=r"layers is \(1, 9\), expected block numbers from 1 to 4, the depth"):
        ADPretrainConfig.from_backbone(str(GOLDEN / "dinov2_tiny"), layers=(1, 9))


def test_from_backbone_refuses_what_is_no_backbone(tmp_path):
    with pytest.raises(InputError, match="no backbone at .*expected a transformers config.json in it"):
        ADPretrainConfig.from_backbone(str(tmp_path))
    with pytest.raises(InputError, match="no backbone at 'no-such/model'"):
        ADPretrainConfig.from_backbone("no-such/model")


def test_from_backbone_refuses_a_text_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2}')
    with pytest.raises(InputError, match="is a 'bert' model without a single patch_size, image_size"):
        ADPretrainConfig.from_backbone(str(tmp_path))


@given(st.integers(1, 100))
def test_quarter_levels_end_at_the_last_block_and_rise(depth):
    levels = quarter_levels(depth)
    assert levels[-1] == depth
    assert list(levels) == sorted(set(levels))
    assert len(levels) == min(depth, 4)


def test_fingerprint_follows_what_shapes_a_token_and_nothing_else():
    config = ADPretrainConfig(**VALID)
    changes = [{"image_size": 28}, {"layers": (3, 6)}, {"normalize_tokens": False}, {"resize_mode": "crop"}]
    for change in (*changes, {"decode": "fast"}):
        change |= {"residual_scale": ()}
        assert config.replace(**change).fingerprint != config.fingerprint
    assert config.replace(backbone="other").fingerprint != config.fingerprint
    assert config.replace(num_reference_tokens=8, default_variant="norm").fingerprint == config.fingerprint


def test_fingerprint_of_exact_decoding_is_that_of_banks_from_before_there_was_a_choice():
    config = ADPretrainConfig(**VALID, backbone_digest="00", resize_mode="crop")
    assert config.fingerprint == "9269646c3518dddf"


def test_fingerprint_goes_by_the_weights_where_they_are_known():
    config = ADPretrainConfig(**VALID, backbone_digest="00")
    assert config.replace(backbone="the/same/elsewhere").fingerprint == config.fingerprint
    assert config.replace(backbone_digest="11").fingerprint != config.fingerprint


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("facebook/dinov2-base", ("transformers", "facebook/dinov2-base")),
        ("open_clip:ViT-B-16/openai", ("open_clip", "ViT-B-16/openai")),
        ("imagebind:/a/b.pth", ("imagebind", "/a/b.pth")),
        ("C:/models/dinov2", ("transformers", "C:/models/dinov2")),
    ],
)
def test_split_source(source, expected):
    assert split_source(source) == expected
