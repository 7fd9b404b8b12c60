"""transformers' Auto classes and pipelines on a bundle, for real: what they give is what the extractor gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import BundleError, InputError
from adpretrain_hf.integrations.transformers import ADPretrainImageProcessor, ADPretrainModel, ADPretrainModelConfig
from tests.conftest import BUNDLE, PHOTOS, ROOT, make_extractor, random_image

TASK = "image-feature-extraction"


def load(bundle, **arguments):
    return ADPretrainFeatureExtractor.from_pretrained(bundle, **arguments).set_reference([random_image(9)])


class TestModel:
    def test_output(self, bundle):
        model = AutoModel.from_pretrained(bundle).set_reference([random_image(9)])
        assert isinstance(model, ADPretrainModel) and not model.training
        images = torch.randn(2, 3, 32, 48)
        output, features = model(pixel_values=images), load(bundle)(images)
        assert output[0] is output.last_hidden_state
        assert len(output.feature_maps) == len(output.hidden_states) == len(features) == 4
        for maps, states, expected in zip(output.feature_maps, output.hidden_states, features.values(), strict=True):
            assert torch.equal(maps, expected)
            assert states.shape == (2, 24, 32) and torch.equal(states[1, 7], expected[1, :, 1, 1])
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])

    def test_without_a_reference_the_error_names_the_call(self, bundle):
        with pytest.raises(InputError, match=r"no reference is set: call set_reference\(images\)"):
            AutoModel.from_pretrained(bundle)(torch.zeros(1, 3, 32, 32))

    def test_a_reference_with_tiles_is_refused(self, bundle):
        model = AutoModel.from_pretrained(bundle)
        model.set_reference([random_image(9, 96, 64)], tiles=(2, 3), tile_reference="all")
        with pytest.raises(InputError, match=r"the reference has tiles, and images come here whole: .*extractor.score"):
            model(torch.zeros(1, 3, 32, 32))

    def test_arguments_reach_the_extractor(self, bundle):
        model = AutoModel.from_pretrained(bundle, variant="norm", dtype=torch.bfloat16, image_size=64)
        assert (model.extractor.variant, model.dtype, model.extractor.image_size) == ("norm", torch.bfloat16, 64)
        images = torch.randn(1, 3, 32, 32)
        angle, norm = (AutoModel.from_pretrained(bundle, variant=name) for name in ("angle", "norm"))
        given = [model.set_reference([random_image(9)])(images).last_hidden_state for model in (angle, norm)]
        assert not torch.equal(*given)
        assert torch.equal(norm(images).feature_maps[3], load(bundle, variant="norm")(images)["layer4"])

    def test_weights_are_those_of_the_file_and_frozen(self, bundle):
        model = AutoModel.from_pretrained(bundle)
        expected = ADPretrainFeatureExtractor.from_pretrained(bundle).state_dict()
        given = model.state_dict()
        assert set(given) == {f"extractor.{name}" for name in expected}
        assert all(torch.equal(given[f"extractor.{name}"], tensor) for name, tensor in expected.items())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.requires_grad_()
        opened = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert opened and all(name.startswith("extractor.projectors.") for name in opened)
        assert not model.train().extractor.backbone.training

    def test_a_missing_weight_is_an_error_not_a_random_one(self, own_bundle):
        from safetensors.torch import load_file, save_file

        tensors = load_file(own_bundle / "model.safetensors")
        missing = sorted(tensors)[0]
        save_file(
            {name: tensor for name, tensor in tensors.items() if name != missing}, own_bundle / "model.safetensors"
        )
        with pytest.raises(BundleError, match=rf"missing \['{missing}'\]"):
            AutoModel.from_pretrained(own_bundle)

    def test_saves_a_bundle(self, bundle, tmp_path):
        AutoModel.from_pretrained(bundle, variant="norm").save_pretrained(tmp_path / "saved")
        images = torch.randn(1, 3, 32, 32)
        given = load(tmp_path / "saved", variant="norm")(images)
        assert torch.equal(given["layer4"], load(bundle, variant="norm")(images)["layer4"])

    def test_cannot_be_made_of_a_configuration(self, bundle):
        config = AutoConfig.from_pretrained(bundle)
        assert isinstance(config, ADPretrainModelConfig) and config.layers == [1, 2, 3, 4]
        with pytest.raises(InputError, match=r"load one with AutoModel.from_pretrained\(bundle\)"):
            AutoModel.from_config(config)

    def test_a_bundle_without_a_model_type_is_loaded_by_name(self, own_bundle):
        config = json.loads((own_bundle / "config.json").read_text())
        del config["model_type"]
        (own_bundle / "config.json").write_text(json.dumps(config))
        assert ADPretrainModel.from_pretrained(own_bundle).config.hidden_size == 32
        with pytest.raises(ValueError, match="Should have a `model_type` key"):
            AutoModel.from_pretrained(own_bundle)

    def test_from_the_hub(self, bundle, hub, tmp_path):
        api = HfApi(token="hf_owner")
        api.create_repo("acme/auto")
        api.upload_folder(repo_id="acme/auto", folder_path=bundle)
        model = AutoModel.from_pretrained("acme/auto", cache_dir=tmp_path / "cache").set_reference([random_image(9)])
        processor = AutoImageProcessor.from_pretrained("acme/auto", cache_dir=tmp_path / "cache")
        features = model(**processor(random_image(3), return_tensors="pt")).feature_maps[0]
        assert torch.equal(features, load(bundle)(random_image(3))["layer1"])

    def test_from_the_hub_by_a_pipeline(self, bundle, hub, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        api = HfApi(token="hf_owner")
        api.create_repo("acme/piped")
        api.upload_folder(repo_id="acme/piped", folder_path=bundle)
        features = pipeline(TASK, model="acme/piped", device="cpu")
        features.model.set_reference([random_image(9)])
        expected = load(bundle)(random_image(3))["layer4"].flatten(2).transpose(1, 2)
        torch.testing.assert_close(features(random_image(3), return_tensors=True), expected, atol=1e-6, rtol=1e-6)


@pytest.fixture(params=["a folder", "the Hub"])
def place(request, bundle, hub) -> str:
    """The bundle's folder, and the id of a repository with the same files."""
    if request.param == "a folder":
        return str(bundle)
    api, name = HfApi(token="hf_owner"), f"acme/{bundle.parent.name}"
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=bundle)
    return name


class TestArguments:
    """What users and programs of transformers pass to any model is honoured, or refused by its name."""

    @pytest.mark.parametrize(
        "given",
        [
            {"low_cpu_mem_usage": True},
            {"use_safetensors": True},
            {"weights_only": True},
            {"trust_remote_code": True},
            {"attn_implementation": "sdpa"},
            {"device_map": None, "use_safetensors": None, "quantization_config": None},
        ],
        ids=str,
    )
    def test_that_hold_anyway(self, place, given):
        model = AutoModel.from_pretrained(place, **given)
        assert (model.dtype, model.device.type) == (torch.float32, "cpu")

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_precision(self, place, name):
        for value, expected in (("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", torch.float32)):
            assert AutoModel.from_pretrained(place, **{name: value}).dtype == expected

    @pytest.mark.parametrize("device_map", ["meta", {"": "meta"}, {"a": "meta", "b": "meta"}, torch.device("meta")])
    def test_device(self, place, device_map):
        assert AutoModel.from_pretrained(place, device_map=device_map).device.type == "meta"

    def test_device_by_itself(self, bundle):
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert AutoModel.from_pretrained(bundle, device_map="auto").device.type == expected
        assert pipeline(TASK, model=str(bundle), device_map="cpu").model.device.type == "cpu"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"use_safetensors": False}, "use_safetensors=False cannot be honoured by a bundle, expected True"),
            ({"output_loading_info": True}, "output_loading_info=True cannot be honoured by a bundle, expected False"),
            ({"attn_implementation": "eager"}, "attn_implementation"),
            (
                {"device_map": {"a": "cpu", "b": "meta"}},
                "device_map=.* cannot be honoured by a bundle, expected one dev",
            ),
            ({"device_map": "disk"}, "device_map='disk' cannot be honoured"),
            ({"layers": [1, 2]}, "layers cannot be honoured: a bundle is loaded as its configuration says"),
            ({"num_labels": 3}, "id2label, label2id cannot be honoured"),
            ({"output_attentions": True}, "output_attentions cannot be honoured"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
            ({"nonsense": 1}, "nonsense"),
        ],
        ids=str,
    )
    def test_that_a_bundle_cannot_honour(self, place, given, message):
        with pytest.raises((InputError, TypeError), match=message):
            AutoModel.from_pretrained(place, **given)

    def test_at_calling(self, bundle):
        model = AutoModel.from_pretrained(bundle).set_reference([random_image(9)])
        images = torch.randn(1, 3, 32, 32)
        states = model(images, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        assert len(states) == 4 and model(images, output_hidden_states=False).hidden_states is None
        last, hidden, maps = model(images, return_dict=False)
        assert torch.equal(last, hidden[-1]) and len(maps) == 4
        assert isinstance(
            AutoModel.from_pretrained(bundle, return_dict=False).set_reference([random_image(9)])(images), tuple
        )
        assert len(AutoModel.from_pretrained(bundle, output_hidden_states=True).config.layers) == 4
        with pytest.raises(InputError, match="output_attentions=True cannot be honoured by a bundle"):
            model(images, output_attentions=True)
        with pytest.raises(TypeError, match="bool_masked_pos"):
            model(images, bool_masked_pos=None)

    @pytest.mark.parametrize(
        "given",
        [
            {"safe_serialization": True},
            {"is_main_process": True, "save_function": torch.save, "state_dict": None},
            {"max_shard_size": "5GB"},
            {"variant": "angle", "token": "hf_owner"},
            {"save_peft_format": False, "save_original_format": True},
        ],
        ids=lambda given: next(iter(given)),
    )
    def test_at_saving(self, bundle, tmp_path, given):
        AutoModel.from_pretrained(bundle).save_pretrained(tmp_path / "saved", **given)
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(load(tmp_path / "saved")(images)["layer4"], load(bundle)(images)["layer4"])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"safe_serialization": False}, "safe_serialization=False cannot be honoured by a bundle, expected True"),
            ({"variant": "norm"}, "variant='norm' cannot be honoured: the projectors are 'angle'"),
            ({"max_shard_size": "1KB"}, "max_shard_size='1KB' cannot be honoured: a bundle's files are not cut"),
            ({"nonsense": 1}, "nonsense"),
        ],
        ids=str,
    )
    def test_at_saving_that_a_bundle_cannot_honour(self, bundle, tmp_path, given, message):
        with pytest.raises((InputError, TypeError), match=message):
            AutoModel.from_pretrained(bundle).save_pretrained(tmp_path / "saved", **given)
        assert not (tmp_path / "saved").exists()

    def test_other_processes_of_a_training_write_nothing(self, bundle, tmp_path):
        AutoModel.from_pretrained(bundle).save_pretrained(tmp_path / "saved", is_main_process=False)
        assert not (tmp_path / "saved").exists()

    def test_tensors_in_place_of_the_models_own(self, bundle, tmp_path):
        model = AutoModel.from_pretrained(bundle)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: tensor + (0.01 if ".projectors." in name else 0) for name, tensor in before.items()}
        model.save_pretrained(tmp_path / "saved", state_dict=state, is_main_process=True)
        saved = AutoModel.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        del state["extractor.projectors.levels.0.mlp.fc1.bias"]
        with pytest.raises(
            BundleError, match=r"state_dict: missing \['projectors.levels.0.mlp.fc1.bias'\].*whole model"
        ):
            model.save_pretrained(tmp_path / "part", state_dict=state)

    def test_a_checkpoint_of_trainer_is_resumed_from(self, bundle, tiny_folder, tmp_path):
        """Trainer reads ``model.safetensors`` itself, and loads it without asking whether its names fit."""
        trained = make_extractor(tiny_folder, seed=5)
        trained.save_pretrained(tmp_path / "checkpoint-1")
        model = AutoModel.from_pretrained(bundle)
        result = model.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), False)
        assert not result.missing_keys and not result.unexpected_keys
        own = model.extractor.projectors.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in trained.projectors.state_dict().items())


class TestImageProcessor:
    @pytest.mark.parametrize("mode", ["crop", "resize"])
    def test_prepares_images_exactly_as_the_extractor(self, tiny_folder, tmp_path, mode):
        make_extractor(tiny_folder, resize_mode=mode).save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        assert isinstance(processor, ADPretrainImageProcessor)
        extractor = ADPretrainFeatureExtractor.from_pretrained(tmp_path)
        transparent = random_image(1, 90, 60).convert("RGBA")
        for image in (random_image(3, 90, 60), transparent, random_image(4, 60, 90).convert("L")):
            for tensors in (None, "pt", "np"):
                given = torch.as_tensor(processor(image, return_tensors=tensors)["pixel_values"])
                assert torch.equal(given, extractor.preprocess(image))
        two = [random_image(5, 70, 50), random_image(6, 70, 50)]
        assert torch.equal(processor(two, return_tensors="pt").pixel_values, extractor.preprocess(two))

    def test_on_a_photograph(self):
        path = PHOTOS / "brick" / "train" / "good" / "000.jpg"
        given = AutoImageProcessor.from_pretrained(BUNDLE)(Image.open(path), return_tensors="pt").pixel_values
        assert torch.equal(given, ADPretrainFeatureExtractor.from_pretrained(BUNDLE).preprocess(path))

    def test_another_size(self, bundle):
        processor = AutoImageProcessor.from_pretrained(bundle, image_size=64)
        assert processor(random_image(1)).pixel_values.shape == (1, 3, 64, 64)

    def test_another_mode_is_kept_beside_a_bundle_that_has_its_own(self, own_bundle):
        wide = random_image(1, 90, 45)
        processor = AutoImageProcessor.from_pretrained(own_bundle, resize_mode="resize")
        processor.save_pretrained(own_bundle)
        for again in (processor, AutoImageProcessor.from_pretrained(own_bundle)):
            assert again(wide).pixel_values.shape == (1, 3, 32, 64)
        model = AutoModel.from_pretrained(own_bundle, resize_mode="resize")
        assert model.config.resize_mode == model.extractor.config.resize_mode == "resize"

    def test_another_decoding(self, bundle, tmp_path):
        random_image(1, 300, 200).save(tmp_path / "image.jpg")
        processors = [AutoImageProcessor.from_pretrained(bundle, decode=name) for name in ("exact", "fast")]
        exact, fast = (one(tmp_path / "image.jpg").pixel_values for one in processors)
        assert exact.shape == fast.shape and 0 < (exact - fast).abs().mean() < 0.1

    def test_a_crop_of_whole_images_is_refused(self, bundle, tmp_path):
        assert AutoImageProcessor.from_pretrained(bundle, do_center_crop=True)
        whole = tmp_path / "whole"
        AutoImageProcessor.from_pretrained(bundle, resize_mode="resize").save_pretrained(whole)
        assert AutoImageProcessor.from_pretrained(whole, do_center_crop=False)
        with pytest.raises(InputError, match="do_center_crop cannot be honoured"):
            AutoImageProcessor.from_pretrained(whole, do_center_crop=True)

    def test_saves_what_the_bundle_holds(self, bundle, tmp_path):
        AutoImageProcessor.from_pretrained(bundle).save_pretrained(tmp_path / "saved")
        saved, own = (json.loads((f / "preprocessor_config.json").read_text()) for f in (tmp_path / "saved", bundle))
        assert saved == own

    def test_loads_what_it_saved(self, bundle, tmp_path):
        for size in (32, 64):
            folder = tmp_path / str(size)
            AutoImageProcessor.from_pretrained(bundle, image_size=size).save_pretrained(folder)
            assert AutoImageProcessor.from_pretrained(folder)(random_image(1)).pixel_values.shape == (1, 3, size, size)

    def test_a_size_that_was_saved_into_a_bundle(self, own_bundle):
        AutoImageProcessor.from_pretrained(own_bundle, image_size=64).save_pretrained(own_bundle)
        assert AutoImageProcessor.from_pretrained(own_bundle)(random_image(1)).pixel_values.shape == (1, 3, 64, 64)
        assert ADPretrainFeatureExtractor.from_pretrained(own_bundle).image_size == 32

    def test_a_preparation_of_another_kind_is_refused(self, own_bundle):
        path = own_bundle / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
        with pytest.raises(BundleError, match=r"preprocessor_config.json: do_normalize cannot be other than \[True\]"):
            AutoImageProcessor.from_pretrained(own_bundle)

    def test_is_not_pushed_alone(self, bundle, tmp_path):
        processor = AutoImageProcessor.from_pretrained(bundle)
        for push in (
            lambda: processor.push_to_hub("acme/x"),
            lambda: processor.save_pretrained(tmp_path, push_to_hub=True),
        ):
            with pytest.raises(InputError, match="push the bundle"):
                push()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"size": {"shortest_edge": 64}}, "size cannot be honoured: .*image_size=... sets the side"),
            ({"do_normalize": False, "do_resize": False}, "do_normalize, do_resize cannot be honoured"),
            ({"nonsense": 1}, "nonsense"),
        ],
        ids=str,
    )
    def test_overrides_are_refused_wherever_the_bundle_lies(self, place, given, message):
        with pytest.raises((InputError, TypeError), match=message):
            AutoImageProcessor.from_pretrained(place, **given)

    def test_overrides_that_change_nothing(self, place):
        given = {"do_normalize": True, "size": {"shortest_edge": 32}, "use_fast": False, "trust_remote_code": True}
        processor = AutoImageProcessor.from_pretrained(place, **given)
        assert processor(random_image(1)).pixel_values.shape == (1, 3, 32, 32)

    def test_unknown_arguments_are_refused(self, bundle):
        with pytest.raises(TypeError, match="do_resize"):
            AutoImageProcessor.from_pretrained(bundle)(random_image(1), do_resize=False)


class TestPipeline:
    def test_gives_the_last_level(self, bundle):
        features = pipeline(TASK, model=str(bundle), device="cpu")
        assert isinstance(features.image_processor, ADPretrainImageProcessor)
        features.model.set_reference([random_image(9)])
        images = [random_image(1), random_image(2)]
        given = features(images, return_tensors=True, batch_size=2)
        extractor = load(bundle)
        expected = extractor(images)["layer4"].flatten(2).transpose(1, 2)
        torch.testing.assert_close(torch.cat(given), expected, atol=1e-6, rtol=1e-6)
        assert torch.tensor(features(images[0])).shape == (1, 16, 32)

    def test_without_a_reference_the_error_names_the_call(self, bundle):
        with pytest.raises(InputError, match="no reference is set"):
            pipeline(TASK, model=str(bundle), device="cpu")(random_image(1))


def test_one_import_is_all_it_takes():
    code = f"""
import sys
from transformers import AutoImageProcessor, AutoModel, pipeline
calls = [
    lambda: AutoModel.from_pretrained({str(BUNDLE)!r}),
    lambda: AutoImageProcessor.from_pretrained({str(BUNDLE)!r}),
    lambda: pipeline({TASK!r}, model={str(BUNDLE)!r}, device="cpu"),
]
for call in calls:
    try:
        call()
    except ValueError:
        continue
    sys.exit("it worked before the import")
import adpretrain_hf.integrations.transformers
print(*(type(call()).__module__ for call in calls))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    ours = "adpretrain_hf.integrations.transformers"
    assert done.stdout.split() == [ours, ours, "transformers.pipelines.image_feature_extraction"]
