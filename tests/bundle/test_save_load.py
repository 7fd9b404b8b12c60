"""Bundles on disk: what is written, and how strictly it is read."""

from __future__ import annotations

import json
import re

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank
from adpretrain_hf.backbones import load_backbone
from adpretrain_hf.bundle import BundlePusher, describe_bundle, variants_among
from adpretrain_hf.cli import main
from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.integrations.ray import ADPretrainScores
from adpretrain_hf.integrations.sklearn import ADPretrainTransformer
from tests.conftest import make_extractor, random_image
from tests.tiny import save_tiny, tiny_model
from training.pretrain import make_extractor as make_training_extractor
from training.settings import PretrainSettings

load = ADPretrainFeatureExtractor.from_pretrained


def features_of(extractor: ADPretrainFeatureExtractor) -> torch.Tensor:
    return extractor.set_reference([random_image(1)])(random_image(0))["layer4"]


def test_files_of_a_bundle(bundle):
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    assert names == [
        "README.md",
        "backbone/config.json",
        "backbone/model.safetensors",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_round_trip_is_bit_identical(bundle, extractor):
    assert load(bundle).config == extractor.config
    assert torch.equal(features_of(load(bundle)), features_of(extractor))


def test_saving_again_changes_no_byte(bundle, tmp_path):
    load(bundle).save_pretrained(tmp_path / "again")
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(bundle)).read_bytes(), path.name


def test_two_variants_share_a_bundle(bundle, tiny_folder):
    norm = make_extractor(tiny_folder, seed=2)
    norm.variant = "norm"
    norm.save_pretrained(bundle)
    config, names = describe_bundle(bundle)
    assert variants_among(names, config) == ["angle", "norm"]
    assert load(bundle).variant == "angle"
    assert load(bundle, variant="norm").variant == "norm"
    assert torch.equal(features_of(load(bundle, variant="norm")), features_of(norm))
    assert not torch.equal(features_of(load(bundle, variant="angle")), features_of(norm))


def test_a_bank_serves_both_variants(bundle, tiny_folder):
    norm = make_extractor(tiny_folder, seed=2)
    norm.variant = "norm"
    norm.save_pretrained(bundle)
    load(bundle).make_reference([random_image(1)]).save(bundle / "references" / "screw.safetensors")
    bank = ReferenceBank.load(bundle / "references" / "screw.safetensors")
    assert load(bundle, variant="norm").set_reference(bank).reference is bank


def test_another_extractors_variants_are_not_mixed_up(bundle, tiny_folder):
    norm = make_extractor(tiny_folder, seed=2)
    norm.variant = "norm"
    norm.save_pretrained(bundle)
    other = make_extractor(tiny_folder, num_reference_tokens=8)
    with pytest.raises(InputError, match=r"holds the variants \['norm'\].*differs in \['num_reference_tokens'\]"):
        other.save_pretrained(bundle)
    assert torch.equal(features_of(load(bundle, variant="norm")), features_of(norm))


def test_another_extractors_banks_and_card_are_not_mixed_up(bundle, tiny_folder):
    norm = make_extractor(tiny_folder, seed=2)
    norm.set_reference([random_image(1)], category="screw").save_pretrained(bundle, references=True)
    other = make_extractor(tiny_folder, image_size=48)
    with pytest.raises(InputError, match=r"holds references/screw.safetensors of an .*differs in \['image_size'\]"):
        other.save_pretrained(bundle)
    renamed = make_extractor(tiny_folder, backbone="acme/other")
    with pytest.raises(InputError, match=r"holds README.md of an extractor .*differs in \['backbone'\]"):
        renamed.save_pretrained(bundle)


def test_the_card_says_whether_anything_was_trained(extractor, tiny_folder, tmp_path):
    extractor.save_pretrained(tmp_path / "trained")
    new = ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), image_size=32, num_heads=4)
    new.save_pretrained(tmp_path / "new")
    trained, untrained = ((tmp_path / name / "README.md").read_text() for name in ("trained", "new"))
    assert "Nothing was trained" in untrained and "Nothing was trained" not in trained
    assert "it does not know the data" in trained and "\nlicense:" not in trained


def test_a_card_that_is_there_stays(extractor, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    extractor.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_without_the_hub_what_is_in_the_cache_is_described(hub, bundle, extractor, tmp_path):
    BundlePusher(bundle, "acme/described", token="hf_owner").push()
    load("acme/described", cache_dir=tmp_path / "cache")
    config, names = describe_bundle("acme/described", cache_dir=tmp_path / "cache", local_files_only=True)
    assert config == extractor.config
    assert variants_among(names, config) == ["angle"] and "backbone/config.json" in names
    cached = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    missing = r"what is cached of acme/described has no variant 'norm'.*: expected one of \['angle'\], or connect to"
    with pytest.raises(BundleError, match=missing):
        load("acme/described", variant="norm", **cached)
    with pytest.raises(BundleError, match=r"cached of acme/described has no references .*, or connect to the network"):
        load("acme/described", references=True, **cached)


def test_in_a_cache_no_other_variant_stands_for_the_default_one(hub, bundle, tiny_folder, tmp_path):
    norm = make_extractor(tiny_folder, seed=2)
    norm.variant = "norm"
    norm.save_pretrained(bundle)
    BundlePusher(bundle, "acme/two", token="hf_owner").push()
    load("acme/two", variant="norm", cache_dir=tmp_path / "cache")
    with pytest.raises(BundleError, match=r"what is cached of acme/two has no variant 'angle'"):
        load("acme/two", cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_stopped_save_leaves_the_old_bundle(bundle, tiny_folder, monkeypatch):
    before = features_of(load(bundle))
    other = make_extractor(tiny_folder, seed=3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adpretrain_hf.bundle.save.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(bundle)
    assert torch.equal(features_of(load(bundle)), before)
    assert not list(bundle.rglob(".*"))


def test_weights_of_another_backbone_are_refused(bundle, tmp_path):
    load_backbone(save_tiny(tmp_path / "other", seed=9), (1, 2, 3, 4)).save(bundle / "backbone")
    with pytest.raises(BundleError, match="has other weights than the bundle was made with: their digest is"):
        load(bundle)


def test_a_backbone_that_was_left_out_does_not_stay_behind(bundle, tiny_folder):
    extractor = make_extractor(tiny_folder)
    extractor.config = extractor.config.replace(backbone_revision="0123abc")
    extractor.save_pretrained(bundle, include_backbone=False)
    assert not (bundle / "backbone").exists()


def test_the_command_line_does_not_overwrite_a_bundle(bundle, tiny_folder, capsys):
    before = (bundle / "model.safetensors").read_bytes()
    assert main(["new", "--backbone", str(tiny_folder), "--output", str(bundle)]) == 1
    assert "holds a bundle already, whose projectors would be lost" in capsys.readouterr().err
    assert (bundle / "model.safetensors").read_bytes() == before


class TestLoading:
    def test_dtype_by_name(self, bundle):
        assert load(bundle, dtype="bfloat16").dtype == torch.bfloat16
        for wrong in ("int8", "bf17", torch.int8):
            with pytest.raises(InputError, match="expected float16, bfloat16, float32 or float64"):
                load(bundle, dtype=wrong)

    def test_values_that_do_not_fit_the_precision(self, bundle):
        path = bundle / "model.safetensors"
        tensors = load_file(path)
        tensors["levels.2.mlp.fc1.weight"][0, 0] = 1e6
        save_file(tensors, path)
        with pytest.raises(BundleError, match="NaN or infinite values"):
            load(bundle, dtype=torch.float16)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, bundle, dtype):
        extractor = load(bundle, dtype=dtype)
        assert {parameter.dtype for parameter in extractor.parameters()} == {dtype}

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_saved_in_less_precision_it_takes_its_own_banks(self, bundle, tmp_path, precision):
        """Wherever it was rounded: at loading, later, or once more."""
        whole, half = load(bundle), load(bundle, dtype=precision)
        bank = half.make_reference([random_image(0)])
        half.save_pretrained(tmp_path / "half")
        load(bundle).to(half.dtype).save_pretrained(tmp_path / "rounded")
        load(tmp_path / "half", dtype="float32").save_pretrained(tmp_path / "again")
        expected = half.set_reference(bank).score([random_image(1)]).scores
        for name in ("half", "rounded", "again"):
            saved = load(tmp_path / name, dtype=precision)
            assert torch.equal(saved.set_reference(bank).score([random_image(1)]).scores, expected)
            assert (
                saved.set_reference(whole.make_reference([random_image(0)])).reference.fingerprint == bank.fingerprint
            )
        change = load_file(tmp_path / "half" / "backbone" / "model.safetensors")
        next(iter(change.values())).view(-1)[0] += 1
        save_file(change, tmp_path / "half" / "backbone" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BundleError, match="has other weights than the bundle was made with"):
            load(tmp_path / "half")

    def test_other_weights_have_another_identity(self, bundle, tmp_path):
        changed = load(bundle)
        next(changed.backbone.parameters()).data += 1
        changed.save_pretrained(tmp_path / "changed")
        with pytest.raises(InputError, match="the reference bank was made by another extractor"):
            load(tmp_path / "changed").set_reference(load(bundle).make_reference([random_image(0)]))

    def test_float32_is_the_default_whatever_the_files_hold(self, bundle, tmp_path):
        load(bundle, dtype=torch.float16).save_pretrained(tmp_path / "half")
        assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
        assert load(tmp_path / "half").dtype == torch.float32

    def test_device(self, bundle):
        assert load(bundle, device="cpu").device == torch.device("cpu")
        assert load(bundle, device=torch.device("meta")).device.type == "meta"
        with pytest.raises(
            InputError, match=r"the device gpu cannot be used: expected cpu, cuda, cuda:1 \.\.\. \(Expected"
        ):
            load(bundle, device="gpu")

    def test_a_gpu_is_the_default_of_all_that_computes(self, bundle, tmp_path, monkeypatch, capsys):
        """Where there is none, one that is said to be there is asked for, and found missing."""
        random_image(0).save(tmp_path / "0.png")
        words = ("score", str(bundle), str(tmp_path / "0.png"), "--reference", str(tmp_path / "0.png"), "--output")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for begin in (
            lambda: load(bundle),
            lambda: ADPretrainFeatureExtractor.from_backbone(str(bundle / "backbone"), num_heads=4),
            lambda: ADPretrainTransformer(bundle).fit([tmp_path / "0.png"]),
            lambda: ADPretrainScores(bundle, tmp_path / "0.png"),
            lambda: make_training_extractor(PretrainSettings(data=("x",), backbone=str(bundle / "backbone"))),
        ):
            with pytest.raises(InputError, match="the device cuda cannot be used"):
                begin()
        assert main([*words, str(tmp_path / "out")]) == 1
        assert "the device cuda cannot be used" in capsys.readouterr().err

    def test_image_size(self, bundle):
        extractor = load(bundle, image_size=64)
        assert extractor.image_size == 64
        assert extractor.set_reference([random_image(1)])(random_image(0))["layer1"].shape == (1, 32, 8, 8)
        with pytest.raises(InputError, match="image_size is 60, expected a multiple of patch_size=8"):
            load(bundle, image_size=60)

    def test_path_as_text(self, bundle):
        assert load(str(bundle)).config == load(bundle).config

    def test_is_frozen_and_in_eval_mode(self, bundle):
        extractor = load(bundle)
        assert not extractor.training
        assert not any(parameter.requires_grad for parameter in extractor.parameters())


class TestRefusals:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(MissingPathError, match="no bundle at .*nothing here.*neither a folder nor the id"):
            load(tmp_path / "nothing here")

    def test_not_a_bundle(self, tmp_path, tiny_folder):
        with pytest.raises(BundleError, match=r"is not an ADPretrain bundle: there is no config.json"):
            load(tmp_path)
        with pytest.raises(BundleError, match="format_version is None.*not an ADPretrain bundle"):
            load(tiny_folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 7}, "config.json: format_version is 7, this version of adpretrain-hf reads 1"),
            ({"layers": [4, 1]}, r"config.json: layers is \(4, 1\)"),
            ({"surprise": 1}, r"config.json: unknown configuration fields \['surprise'\]"),
            ({"layers": [1, 2, 3, 9]}, "level 9 was asked for, but .*backbone.* has blocks 1 to 4"),
            (
                {"layers": [1, 2, 3]},
                "model.safetensors does not fit its configuration: missing .*unexpected .*levels.3",
            ),
            ({"num_reference_tokens": 7}, r"reference_tokens: got \(24, 32\), expected \(7, 32\)"),
            ({"hidden_size": 64}, "of another shape"),
        ],
    )
    def test_configuration_that_does_not_fit(self, bundle, change, message):
        config = json.loads((bundle / "config.json").read_text()) | change
        config["residual_scale"] = []
        (bundle / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            load(bundle)

    def test_broken_json(self, bundle):
        (bundle / "config.json").write_text("{")
        with pytest.raises(BundleError, match="config.json is not valid JSON"):
            load(bundle)

    def test_unknown_variant(self, bundle):
        with pytest.raises(
            BundleError,
            match=r"bundle has no variant 'nrom' \(model.nrom.safetensors is missing\): expected one of \['angle'\]",
        ):
            load(bundle, variant="nrom")
        with pytest.raises(InputError, match="variant is '../x', expected letters"):
            load(bundle, variant="../x")

    def test_all_that_is_wrong_with_the_weights_is_listed_at_once(self, bundle):
        path = bundle / "model.safetensors"
        tensors = load_file(path)
        del tensors["levels.0.mlp.fc1.bias"], tensors["levels.3.reference_tokens"]
        tensors |= {"surplus": torch.zeros(2), "levels.1.mlp.fc2.bias": torch.zeros(5)}
        save_file(tensors, path)
        expected = (
            r"missing \['levels.0.mlp.fc1.bias', 'levels.3.reference_tokens'\], unexpected \['surplus'\].*"
            r"levels.1.mlp.fc2.bias: got \(5,\), expected \(32,\)"
        )
        with pytest.raises(BundleError, match=expected):
            load(bundle)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_not_finite(self, bundle, value):
        path = bundle / "model.safetensors"
        tensors = load_file(path)
        tensors["levels.2.mlp.fc1.weight"][0, 0] = value
        save_file(tensors, path)
        with pytest.raises(BundleError, match=r"NaN or infinite values in \['levels.2.mlp.fc1.weight'\]"):
            load(bundle)

    def test_tensors_of_another_kind(self, bundle):
        path = bundle / "model.safetensors"
        tensors = load_file(path)
        tensors["levels.2.mlp.fc1.bias"] = torch.zeros(128, dtype=torch.int64)
        save_file(tensors, path)
        with pytest.raises(BundleError, match="levels.2.mlp.fc1.bias: got torch.int64, expected floats"):
            load(bundle)

    @pytest.mark.parametrize("content", [b"", b"hello, world", None])
    def test_files_that_are_not_whole(self, bundle, content):
        path = bundle / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9] if content is None else content)
        with pytest.raises(BundleError, match=r"model.safetensors is not a whole safetensors file"):
            load(bundle)

    def test_no_backbone_and_no_network(self, bundle, extractor):
        import shutil

        shutil.rmtree(bundle / "backbone")
        config = json.loads((bundle / "config.json").read_text())
        config |= {"backbone": "somebody/dinov2", "backbone_revision": "0123abc"}
        (bundle / "config.json").write_text(json.dumps(config))
        expected = (
            r"was saved without its backbone, and 'somebody/dinov2' \(revision 0123abc\) cannot be loaded: "
            "connect to the network once, or save the bundle with include_backbone=True"
        )
        with pytest.raises(BundleError, match=expected):
            load(bundle)


def save_slim(extractor, folder, backbone):
    """Saves an extractor without its backbone, which is said to come from elsewhere."""
    extractor.config = extractor.config.replace(backbone=str(backbone), backbone_revision="main")
    extractor.save_pretrained(folder, include_backbone=False)
    return folder


class TestWithoutItsBackbone:
    def test_it_is_found_by_its_name(self, extractor, tmp_path, tiny_folder):
        slim = save_slim(extractor, tmp_path / "slim", tiny_folder)
        assert not (slim / "backbone").exists()
        assert torch.equal(features_of(load(slim)), features_of(extractor))

    def test_other_weights_of_that_name_are_refused(self, extractor, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_tiny(tmp_path / "somebody" / "dinov2", seed=9)
        slim = save_slim(extractor, tmp_path / "slim", "somebody/dinov2")
        place = re.escape(repr(str(tmp_path / "somebody" / "dinov2")))
        with pytest.raises(
            BundleError, match=f"the backbone at {place} has other weights than the bundle was made with"
        ):
            load(slim)

    def test_other_weights_on_the_hub_are_refused(self, hub, extractor, tmp_path):
        api = HfApi(token="hf_owner")
        api.create_repo("acme/other-weights")
        api.upload_folder(repo_id="acme/other-weights", folder_path=save_tiny(tmp_path / "other", seed=9))
        slim = save_slim(extractor, tmp_path / "slim", "acme/other-weights")
        with pytest.raises(BundleError, match="the backbone at 'acme/other-weights' has other weights than the bundle"):
            load(slim, cache_dir=tmp_path / "cache")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_more_precise_weights_are_rounded_as_they_were(self, tiny_folder, tmp_path, dtype):
        made = ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), dtype=dtype, image_size=32, num_heads=4)
        made.save_pretrained(tmp_path / "whole")
        whole, slim = load(tmp_path / "whole"), load(save_slim(made, tmp_path / "slim", tiny_folder))
        assert slim.dtype == torch.float32 and slim.config.fingerprint == whole.config.fingerprint
        assert torch.equal(features_of(slim), features_of(whole))
        assert load(tmp_path / "slim", dtype=dtype).dtype == dtype

    def test_less_precise_weights_are_others(self, extractor, tmp_path):
        tiny_model("dinov2").half().save_pretrained(tmp_path / "half")
        slim = save_slim(extractor, tmp_path / "slim", tmp_path / "half")
        with pytest.raises(BundleError, match="has other weights than the bundle was made with.* a less precise copy"):
            load(slim)

    def test_a_configuration_without_a_digest_takes_what_it_finds(self, extractor, tmp_path):
        slim = save_slim(extractor, tmp_path / "slim", save_tiny(tmp_path / "other", seed=9))
        config = json.loads((slim / "config.json").read_text()) | {"backbone_digest": None}
        (slim / "config.json").write_text(json.dumps(config))
        assert not torch.equal(features_of(load(slim)), features_of(extractor))


def test_a_path_on_this_machine_is_not_recorded(tiny_folder, tmp_path, monkeypatch):
    made = make_extractor(tiny_folder)
    assert made.config.backbone == tiny_folder.name
    made.save_pretrained(tmp_path / "bundle")
    said = "".join(path.read_text() for path in (tmp_path / "bundle").rglob("*.*") if path.suffix in (".json", ".md"))
    assert str(tiny_folder.parent) not in said
    monkeypatch.chdir(tiny_folder)
    assert make_extractor(".").config.backbone == tiny_folder.name
    # One that was recorded by an earlier version is not pushed.
    config = json.loads((tmp_path / "bundle" / "config.json").read_text()) | {"backbone": str(tiny_folder)}
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BundleError, match=f"says where the backbone lies on this machine.*write '{tiny_folder.name}' there"
    ):
        BundlePusher(tmp_path / "bundle", "acme/never")


def test_without_backbone_and_without_a_commit_is_refused(extractor, tmp_path):
    with pytest.raises(InputError, match="has no commit on the Hub to fetch it from again"):
        extractor.save_pretrained(tmp_path / "slim", include_backbone=False)


def test_transformers_image_processor_prepares_images_alike(bundle):
    pytest.importorskip("torchvision")
    from transformers import BitImageProcessor

    processor = BitImageProcessor.from_pretrained(bundle)
    image = random_image(3, 90, 60)
    theirs = processor(image, return_tensors="pt").pixel_values
    ours = load(bundle).preprocess(image)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02  # its own resizing differs in the last grey levels


def test_a_bundle_of_one_variant_loads_it_whatever_its_name(tiny_folder, tmp_path):
    norm = make_extractor(tiny_folder)
    norm.variant = "norm"
    norm.save_pretrained(tmp_path / "bundle")
    again = load(tmp_path / "bundle")
    assert again.variant == "norm" and torch.equal(features_of(again), features_of(norm))
    with pytest.raises(BundleError, match=r"has no variant 'angle' .*: expected one of \['norm'\]"):
        load(tmp_path / "bundle", variant="angle")


# References


def test_references_are_saved_and_loaded_where_they_are_asked_for(bundle, tmp_path):
    products = load(bundle).set_references({"käse 1": [random_image(1)], "nut": [random_image(2), random_image(3)]})
    products.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "references").exists()
    products.save_pretrained(tmp_path / "all", references=True)
    assert load(tmp_path / "all").references == {}
    again = load(tmp_path / "all", references=True)
    assert list(again.references) == ["käse 1", "nut"] and again.reference is None
    run = {"images": [random_image(7)] * 2, "categories": ["nut", "käse 1"]}
    assert torch.equal(again.score(**run).scores, products.score(**run).scores)
    again.set_reference([random_image(4)], category="bolt").save_pretrained(tmp_path / "all", references=True)
    assert list(load(tmp_path / "all", references=True).references) == ["bolt", "käse 1", "nut"]


def test_a_bundle_of_one_reference_is_ready(bundle, tmp_path):
    load(bundle).set_reference([random_image(1)], category="nut").save_pretrained(bundle, references=True)
    assert load(bundle, references=True).score([random_image(2)]).scores.shape == (1,)


def test_references_that_do_not_fit_or_are_not_there_are_refused(bundle, extractor, tmp_path):
    with pytest.raises(
        BundleError, match=r"has no references \(references/\*.safetensors\): save it with references=True"
    ):
        load(bundle, references=True)
    with pytest.raises(InputError, match="there are no references to save: set them first"):
        extractor.save_pretrained(bundle, references=True)
    for category in ("", "a/b", "..", "a\\b"):
        extractor.set_reference([random_image(1)], category=category)
        with pytest.raises(InputError, match="the category of a reference is .*, expected a name without slashes"):
            extractor.save_pretrained(bundle, references=True)
    extractor.set_reference([random_image(1)], category="nut").save_pretrained(bundle, references=True)
    with pytest.raises(InputError, match="was made by another extractor"):
        load(bundle, references=True, image_size=64)
    (bundle / "references" / "nut.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="nut.safetensors is not a whole safetensors file"):
        load(bundle, references=True)


def test_references_that_are_pushed_can_be_loaded(hub, bundle, tmp_path):
    extractor = load(bundle).set_reference([random_image(1)], category="nut")
    extractor.push_to_hub("acme/with-references", token="hf_owner", references=True)
    load("acme/with-references", cache_dir=tmp_path / "without")
    assert not list((tmp_path / "without").rglob("nut.safetensors"))
    again = load("acme/with-references", cache_dir=tmp_path / "with", references=True)
    assert all(map(torch.equal, again.references["nut"].patches, extractor.reference.patches))
    extractor.push_to_hub("acme/with-references", token="hf_owner")  # they stay
    assert load("acme/with-references", cache_dir=tmp_path / "with", references=True).reference is not None
