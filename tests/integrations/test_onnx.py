"""Graphs of an extractor with its references against itself: torch.export, torch.compile, ONNX; and its copies."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor, matching
from adpretrain_hf.errors import InputError
from adpretrain_hf.integrations.onnx import FeaturesAndScores, export_onnx
from adpretrain_hf.quantization import quantize
from tests.conftest import make_extractor, random_image
from tests.tiny import FAMILIES, save_tiny

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def extractor(tiny_folder):
    """Two levels, calibrated, and used before: what a first forward leaves behind must not disturb an export."""
    extractor = make_extractor(tiny_folder, layers=(1, 2))
    settings = {"category": "screw", "image_score": "top", "top": 0.01}
    bank = extractor.make_reference([random_image(1), random_image(2)], **settings)
    normals = [random_image(seed) for seed in range(100, 110)]
    extractor.set_reference(extractor.calibrate(bank, normals, false_alarms=0.5))
    extractor(torch.randn(1, 3, 32, 32))
    return extractor


@pytest.fixture(scope="module")
def onnx_file(extractor, tmp_path_factory):
    return export_onnx(extractor, tmp_path_factory.mktemp("onnx") / "sub" / "tiny.onnx")


@pytest.fixture(scope="module")
def session(onnx_file):
    return pytest.importorskip("onnxruntime").InferenceSession(onnx_file)


def assert_same(given, expected):
    assert list(given) == list(expected)
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], **CLOSE)


class TestTorch:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_export_of_every_family(self, family, tmp_path):
        extractor = make_extractor(save_tiny(tmp_path, family), layers=(1,)).set_reference([random_image(1)])
        batch = {"images": {0: torch.export.Dim("batch")}}
        program = torch.export.export(extractor, (torch.randn(2, 3, 32, 32),), dynamic_shapes=batch).module()
        for number in (1, 3):
            images = torch.randn(number, 3, 32, 32)
            assert_same(program(images), extractor(images))

    def test_export_matches_a_bank_of_many_blocks(self, tiny_folder, monkeypatch):
        monkeypatch.setattr(matching, "_REFERENCE_CHUNK", 7)
        monkeypatch.setattr(matching, "_QUERY_CHUNK", 5)
        extractor = make_extractor(tiny_folder, layers=(1,)).set_reference([random_image(1)])
        images = torch.randn(2, 3, 32, 32)
        assert_same(torch.export.export(extractor, (images,)).module()(images), extractor(images))

    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )  # a C++ compiler
    def test_compile(self, tiny_folder, backend):
        extractor = make_extractor(tiny_folder, layers=(1,)).set_reference([random_image(1)])
        compiled = torch.compile(extractor, fullgraph=True, dynamic=False, backend=backend)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert_same(compiled(images), extractor(images))

    @pytest.mark.parametrize("strict", [True, False])
    def test_a_trace_is_refused_with_the_way_to_go(self, extractor, strict):
        images = torch.randn(1, 3, 32, 32)
        with pytest.raises(InputError, match=r"use torch.export.export\(extractor, \(images,\)\) instead"):
            torch.jit.trace(extractor, images, strict=strict)

    def test_the_older_exporter_may_trace(self, extractor, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        images = torch.randn(2, 3, 32, 32)
        torch.onnx.export(
            FeaturesAndScores(extractor), (images,), tmp_path / "old.onnx", dynamo=False, input_names=["images"]
        )
        given = onnxruntime.InferenceSession(tmp_path / "old.onnx").run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.as_tensor(given[0]), extractor(images)["layer1"], **CLOSE)


class TestOnnx:
    @pytest.mark.parametrize("number", [1, 2, 5])
    def test_equals_the_extractor(self, extractor, session, number):
        images = torch.randn(number, 3, 32, 32)
        with torch.no_grad():
            expected = FeaturesAndScores(extractor, extractor.reference.judgement)(images, torch.tensor(0.5))
        given = session.run(None, {"images": images.numpy(), "threshold": np.array(0.5, dtype=np.float32)})
        for values, tensor in zip(given, expected, strict=True):
            np.testing.assert_allclose(values, tensor.numpy(), **CLOSE)

    def test_scores_and_decisions_are_the_extractors(self, extractor, session):
        images = [random_image(seed) for seed in range(4, 24)]  # no references, which a graph does not recognise
        prepared = {"images": extractor.preprocess(images).numpy()}
        expected = extractor.score(images)
        scores, anomalous = session.run(["score", "anomalous"], prepared)
        np.testing.assert_allclose(scores, expected.scores.numpy(), **CLOSE)
        assert 0 < anomalous.sum() < 20
        assert anomalous.tolist() == expected.is_anomalous().tolist()
        for threshold, number in ((0.0, 20), (9.0, 0)):
            given = prepared | {"threshold": np.array(threshold, dtype=np.float32)}
            assert session.run(["anomalous"], given)[0].sum() == number

    def test_the_metadata_tell_how_images_are_prepared_and_judged(self, extractor, session):
        about, own = json.loads(session.get_modelmeta().custom_metadata_map["adpretrain"]), extractor.config
        assert about == {
            "category": "screw",
            "variant": "angle",
            "image_score": "top",
            "image_size": 32,
            "patch_size": 8,
            "resize_mode": "crop",
            "mean": [*own.mean],
            "std": [*own.std],
            "fingerprint": own.fingerprint,
            "calibration": {
                "images": 10,
                "threshold": extractor.reference.judgement.calibration.threshold(),
                "false_alarms": 0.5,
                "scale": extractor.reference.judgement.calibration.scale,
                "approximate": False,
            },
        }

    def test_names_and_shapes(self, session):
        shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
        batch = shapes["images"][0]
        assert isinstance(batch, str)
        assert shapes == {
            "images": [batch, 3, 32, 32],
            "layer1": [batch, 32, 4, 4],
            "layer2": [batch, 32, 4, 4],
            "anomaly_map": [batch, 32, 32],
            "score": [batch],
            "anomalous": [batch],
        }
        assert [value.name for value in session.get_overridable_initializers()] == ["threshold"]

    def test_one_whole_file(self, onnx_file):
        assert [path.name for path in onnx_file.parent.iterdir()] == ["tiny.onnx"]

    def test_weights_in_a_second_file_and_another_image_size(self, tiny_folder, tmp_path, monkeypatch):
        onnxruntime = pytest.importorskip("onnxruntime")
        from torch.onnx._internal.exporter import _onnx_program

        monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)  # 2 GB are too many for a test
        extractor = make_extractor(tiny_folder, layers=(1,)).set_reference([random_image(1)])
        path = export_onnx(extractor, tmp_path / "large.onnx", image_size=(24, 40))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
        images = torch.randn(1, 3, 24, 40)
        session = onnxruntime.InferenceSession(path)
        (given,) = session.run(["layer1"], {"images": images.numpy()})
        np.testing.assert_allclose(given, extractor(images)["layer1"].numpy(), **CLOSE)
        # without a calibration there is nothing to decide by
        assert [value.name for value in session.get_outputs()] == ["layer1", "anomaly_map", "score"]
        assert session.get_overridable_initializers() == []
        assert "calibration" not in json.loads(session.get_modelmeta().custom_metadata_map["adpretrain"])

    def test_what_cannot_be_exported_is_refused(self, extractor, tiny_folder, tmp_path):
        with pytest.raises(InputError, match=r"no reference is set: call set_reference\(images\) before export_onnx"):
            export_onnx(make_extractor(tiny_folder), tmp_path / "a.onnx")
        with pytest.raises(
            InputError, match=r"got images of 30 x 32 pixels, expected .* multiples of the patch size 8"
        ):
            export_onnx(extractor, tmp_path / "a.onnx", image_size=(30, 32))
        with pytest.raises(InputError, match=r"the patch size 8, \(24 or 32\) x \(24 or 32\)"):
            export_onnx(extractor, tmp_path / "a.onnx", image_size=30)
        with pytest.raises(InputError, match="a false-alarm rate of 0.01 cannot be promised by 10 calibration images"):
            export_onnx(extractor, tmp_path / "a.onnx", false_alarms=0.01)
        other = make_extractor(tiny_folder, layers=(1, 2), seed=2).set_reference(extractor.reference)
        with pytest.raises(InputError, match="no calibration that was made by this extractor"):
            export_onnx(other, tmp_path / "a.onnx", false_alarms=0.1)
        fast = make_extractor(tiny_folder, layers=(1,), decode="fast").set_reference([random_image(1)])
        with pytest.raises(InputError, match=r"references that were decoded fast .* with decode='exact' \(--decode"):
            export_onnx(fast, tmp_path / "x.onnx")
        for size in (0, "32", (32,)):
            with pytest.raises(InputError, match="image_size is .*, expected an integer >= 1, or two: the height and"):
                export_onnx(extractor, tmp_path / "x.onnx", image_size=size)
        with pytest.raises(InputError, match="layers of 8 bits cannot be exported"):
            export_onnx(quantize(other).set_reference([random_image(1)]), tmp_path / "a.onnx")
        half = make_extractor(tiny_folder).bfloat16().set_reference([random_image(1)])
        with pytest.raises(InputError, match="ONNX has no bfloat16 for all of it: export float32 or float16"):
            export_onnx(half, tmp_path / "a.onnx")
        assert not list(tmp_path.iterdir())


class TestCopies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_copied_and_pickled_after_use(self, family, tmp_path):
        extractor = make_extractor(save_tiny(tmp_path / family, family)).set_reference([random_image(1)])
        images = torch.randn(2, 3, 32, 32)
        expected = extractor(images)
        torch.save(extractor, tmp_path / "extractor.pt")
        loaded = torch.load(tmp_path / "extractor.pt", weights_only=False)
        for other in (copy.deepcopy(extractor), loaded):
            assert isinstance(other, ADPretrainFeatureExtractor)
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(other(images).values(), expected.values(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(extractor(images).values(), expected.values(), strict=True))

    def test_a_copy_is_a_copy(self, tiny_folder):
        extractor = make_extractor(tiny_folder).set_reference([random_image(1)])
        images = torch.randn(1, 3, 32, 32)
        before = extractor(images)["layer1"]
        other = copy.deepcopy(extractor)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(extractor(images)["layer1"], before)
        assert not torch.equal(other(images)["layer1"], before)
