"""Settings: flags, JSON, and errors that name the flag."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from adpretrain_hf.errors import InputError
from training.settings import PretrainSettings, add_flags, differing, from_flags


def parse(*words: str) -> PretrainSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(words))


def test_no_flags_are_the_defaults():
    assert parse() == PretrainSettings()


def test_flags_of_every_kind():
    settings = parse(
        "--data",
        "a",
        "synthetic",
        "--levels",
        "2",
        "4",
        "--no-normalize-tokens",
        "--learning-rate",
        "1e-3",
        "--seed",
        "7",
    )
    assert settings == PretrainSettings(
        data=("a", "synthetic"), levels=(2, 4), normalize_tokens=False, learning_rate=1e-3, seed=7
    )


def test_every_flag_has_help():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser)
    text = parser.format_help()
    for field in dataclasses.fields(PretrainSettings):
        assert f"--{field.name.replace('_', '-')}" in text


def test_json_round_trip():
    settings = PretrainSettings(data=("x", "y"), levels=(1, 2), references=(8,), validation_categories=("a",))
    assert PretrainSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("text", ["[]", "{", '{"no_such": 1}', "3"])
def test_json_that_is_something_else(text):
    with pytest.raises(InputError, match="not the settings of a pretraining run"):
        PretrainSettings.from_json(text)


def test_differing_names_the_flags():
    old, new = PretrainSettings(), PretrainSettings(batch_size=8, levels=(1,))
    assert differing(old, new) == ["--levels () -> (1,)", "--batch-size 32 -> 8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs is 0, expected an integer >= 1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0, expected a number > 0"),
        ({"workers": -1}, "--workers is -1, expected a number >= 0"),
        ({"references": (0, 4)}, r"--references is \(0, 4\), expected integers >= 1"),
        ({"references": ()}, "--references is"),
        ({"paint_defects": 1.5}, "--paint-defects is 1.5, expected a share from 0 to 1"),
        ({"precision": "float16"}, "--precision is 'float16', expected float32 or bfloat16"),
        ({"batch_size": 6, "accumulate": 4}, "--batch-size is 6, expected a multiple of accumulate=4"),
        ({"data": ()}, "--data is"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        PretrainSettings(**change)
