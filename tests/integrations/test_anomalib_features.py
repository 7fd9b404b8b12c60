"""The features that anomalib's detectors are given: kinds, levels, leave-one-out, and what a state dict keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from adpretrain_hf import ADPretrainFeatureExtractor, ReferenceBank
from adpretrain_hf.errors import InputError
from adpretrain_hf.matching import nearest_residual
from tests.conftest import ROOT, random_image

pytest.importorskip("anomalib")
from adpretrain_hf.integrations.anomalib import DetectorFeatures


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def references() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_kinds_are_the_extractors_own_steps(extractor, images, references):
    extractor.set_reference(references)
    residuals = extractor.residuals(extractor.encode(images))
    expected = {
        "raw": extractor.backbone(images),
        "residual": residuals,
        "pretrained": list(extractor(images).values()),
    }
    for kind, levels in expected.items():
        features = DetectorFeatures(extractor, kind)(images)
        assert list(features) == list(extractor.layers)
        for got, wanted in zip(features.values(), levels, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["residual", "pretrained"])
def test_levels_that_are_not_asked_for_are_not_computed(extractor, images, references, kind, monkeypatch):
    extractor.set_reference(references)
    expected = DetectorFeatures(extractor, kind)(images)
    done = []
    original = nearest_residual
    monkeypatch.setattr(
        "adpretrain_hf.reference.bank.nearest_residual",
        lambda level, *rest: done.append("match") or original(level, *rest),
    )
    for number, projector in enumerate(extractor.projectors):
        projector.register_forward_hook(lambda *_, number=number: done.append(number))
    got = DetectorFeatures(extractor, kind, levels=(2, 4))(images)
    assert done == ["match", "match"] + ([1, 3] if kind == "pretrained" else [])
    for name, level in got.items():
        assert torch.equal(level, expected[name])


def test_levels_are_chosen_by_block_number(extractor, images, references):
    extractor.set_reference(references)
    features = DetectorFeatures(extractor, "pretrained", levels=(2, 4))
    assert features.layers == ["layer2", "layer4"]
    assert features.out_dims == [32, 32]
    assert list(features(images)) == features.layers
    assert torch.equal(features(images)["layer4"], extractor(images)["layer4"])


@pytest.mark.parametrize("levels", ["4", 4, (), (5,), (4, 2), (2, 2)])
def test_wrong_levels_are_refused(extractor, levels):
    with pytest.raises(InputError, match=r"expected some of \[1, 2, 3, 4\], in rising order"):
        DetectorFeatures(extractor, levels=levels)


def test_unknown_kind_is_refused(extractor):
    with pytest.raises(InputError, match="unknown features 'trained': expected one of raw, residual, pretrained"):
        DetectorFeatures(extractor, "trained")


def test_no_reference_is_an_error_except_for_raw_features(extractor, images):
    assert not DetectorFeatures(extractor, "raw").needs_reference
    DetectorFeatures(extractor, "raw")(images)
    with pytest.raises(InputError, match="no reference is set"):
        DetectorFeatures(extractor, "residual")(images)


def test_an_image_of_the_bank_is_compared_with_the_others(extractor, references):
    features = DetectorFeatures(extractor, "residual")
    features.set_reference(references, ["a", "b", "c", "d"])
    batch = references[[2, 0]]
    for names in (["c", "elsewhere"], ["", ""]):  # by its name, or by its tokens
        features.note_own(names)
        for row, others in ((0, [0, 1, 3]), (1, [1, 2, 3])):
            residual = features(batch)["layer1"][row]
            expected = extractor.residuals(extractor.encode(batch[row : row + 1]), references[others])[0][0]
            assert torch.allclose(residual, expected, atol=1e-6)
            assert residual.abs().max() > 0.1
    features.note_own([])
    assert features(batch)["layer1"].abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_a_bank_without_names_are_recognised_in_any_precision(extractor, references, dtype):
    features = DetectorFeatures(extractor.to(dtype), "residual")
    features.set_reference(references)
    features.note_own(["x"] * 3)
    batch = torch.stack([references[3], references[1] + 0.05 * torch.randn(3, 32, 32), references[0]])
    assert features._recognised(extractor.encode(batch)[0], extractor.reference) == [3, None, 0]


@pytest.mark.parametrize("tile_reference", ["window", "all"])
def test_a_bank_of_tiles_is_refused(extractor, tile_reference):
    features = DetectorFeatures(extractor)
    bank = extractor.make_reference([random_image(1, 96, 64)], tiles=(2, 3), tile_reference=tile_reference)
    with pytest.raises(InputError, match=r"anomalib hands over whole images, and the reference has tiles: Ref.*; make"):
        features.set_reference(bank)
    assert extractor.reference is None


def test_a_bank_with_a_region_of_interest_is_refused(extractor):
    bank = extractor.make_reference([random_image(1)], region=[(0, 0), (9, 0), (9, 9)])
    with pytest.raises(InputError, match="the reference has a region of interest: .*; make one without"):
        DetectorFeatures(extractor).set_reference(bank)
    fields = ("patches", "fingerprint", "category", "num_images")
    state = {name: getattr(bank, name) for name in fields} | {"judgement": bank.judgement.to_dict()}
    with pytest.raises(InputError, match="the reference has a region of interest"):  # of an older checkpoint
        DetectorFeatures(extractor).set_extra_state(state)
    assert extractor.reference is None


def test_tiles_are_of_the_image_that_they_were_cut_from(extractor, references):
    features = DetectorFeatures(extractor, "residual")
    features.set_reference(references, ["a", "b", "c", "d"])
    features.note_own(["d", "x"])
    tiles = torch.randn(6, 3, 16, 16)  # three of each image
    others = [extractor.reference.without_image(3)] * 3 + [extractor.reference] * 3
    expected = extractor.residuals(extractor.encode(tiles), others)
    assert torch.equal(features(tiles)["layer1"], expected[0])


def test_residuals_of_nothing_are_told_once(extractor, references, caplog):
    features = DetectorFeatures(extractor, "residual")
    features.set_reference(extractor.make_reference(references).compact(0.99))
    features(references)  # a test is no training
    assert "residuals" not in caplog.text
    for _ in range(2):
        features.note_own([""] * 4)
        features(references)
    assert caplog.text.count("most residuals of the training images are 0: they are references themselves") == 1


def test_the_only_reference_is_compared_with_itself(extractor, references):
    features = DetectorFeatures(extractor, "residual")
    features.set_reference(references[:1], ["a"])
    features.note_own(["a"])
    assert features(references[:1])["layer1"].abs().max() < 1e-5


def test_names_must_be_as_many_as_images(extractor, references):
    with pytest.raises(InputError, match="got 1 names for 4 reference images"):
        DetectorFeatures(extractor).set_reference(references, ["a"])


def test_state_dict_carries_the_bank_and_its_names(tiny_folder, extractor, images, references, tmp_path):
    features = DetectorFeatures(extractor)
    features.set_reference(references, ["a", "b", "c", "d"])
    torch.save(features.state_dict(), tmp_path / "state.pt")
    other = DetectorFeatures(ADPretrainFeatureExtractor.from_backbone(str(tiny_folder), **_like(extractor)))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.names == ("a", "b", "c", "d")
    assert other.extractor.reference.num_images == 4
    assert not other.extractor.reference.compacted
    for got, wanted in zip(other(images).values(), features(images).values(), strict=True):
        assert torch.equal(got, wanted)


def test_state_dict_says_that_a_bank_is_compacted(extractor, references):
    """No image can be left out of such a bank."""
    features = DetectorFeatures(extractor)
    features.set_reference(extractor.make_reference(references).compact(0.5))
    state = features.state_dict()
    features.set_reference(references)
    features.load_state_dict(state)
    assert extractor.reference.compacted


def test_state_without_a_bank_removes_it(extractor, references):
    features = DetectorFeatures(extractor)
    empty = features.state_dict()
    features.set_reference(references)
    features.load_state_dict(empty)
    assert extractor.reference is None


def test_bank_of_another_extractor_is_refused(extractor):
    bank = ReferenceBank([torch.randn(5, 32)] * 4, fingerprint="0123456789abcdef")
    state = DetectorFeatures(extractor).state_dict()
    state["_extra_state"] = {"patches": bank.patches, "fingerprint": bank.fingerprint, "category": "", "num_images": 1}
    with pytest.raises(InputError, match="made by another extractor"):
        DetectorFeatures(extractor).load_state_dict(state)


def _like(extractor):
    config = extractor.config
    return {name: getattr(config, name) for name in ("image_size", "resize_mode", "num_reference_tokens", "num_heads")}


def test_without_anomalib_says_what_to_install():
    """In an interpreter that has everything but anomalib."""
    code = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'anomalib' else find(name, package)\n"
        "import adpretrain_hf.integrations.anomalib\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode != 0
    assert "anomalib is not installed: install it by `pip install adpretrain-hf[anomalib]`" in run.stderr
