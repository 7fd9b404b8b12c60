"""transformers' Auto classes and pipelines on a bundle, for real: what they give is what the extractor gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
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

    def test_saves_what_the_bundle_holds(self, bundle, tmp_path):
        AutoImageProcessor.from_pretrained(bundle).save_pretrained(tmp_path / "saved")
        saved, own = (json.loads((f / "preprocessor_config.json").read_text()) for f in (tmp_path / "saved", bundle))
        assert saved == own

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
