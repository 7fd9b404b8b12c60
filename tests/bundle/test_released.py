"""The authors' checkpoints as bundles: exact, total, and never run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.backbones import load_pickle
from adpretrain_hf.bundle import BundlePusher, convert, fetch_released
from adpretrain_hf.bundle.released import read_released
from adpretrain_hf.cli import main
from adpretrain_hf.errors import InputError
from tests.conftest import GOLDEN

RELEASED = GOLDEN / "checkpoints_pro_angle.pth"
BACKBONE = str(GOLDEN / "dinov2_tiny")
EXPECTED_SCORES = {"img_auc": 0.987, "pix_auc": 0.85, "pix_pro": 0.91}


def test_whole_path_equals_the_authors(golden, tmp_path, capsys):
    arguments = ["convert", "--backbone", BACKBONE, "--levels", "1,2,3,4", "--angle", str(RELEASED)]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "variants angle" in capsys.readouterr().out
    extractor = ADPretrainFeatureExtractor.from_pretrained(tmp_path).set_reference(golden["e2e.references"])
    for level, features in enumerate(extractor(golden["e2e.images"]).values()):
        expected = golden[f"e2e.features.{level}"]
        assert (features - expected).norm() / expected.norm() <= 1e-3
    assert (extractor.score(golden["e2e.images"]).maps - golden["e2e.map"]).abs().max() <= 1e-4


def test_precision_and_scores_are_kept(tmp_path):
    config = convert(BACKBONE, {"angle": RELEASED}, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert config.reported_scores["angle"] == pytest.approx(EXPECTED_SCORES)
    assert not config.normalize_tokens
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["reported_scores"] == config.reported_scores


def test_both_variants_in_one_bundle(tmp_path):
    content = released()
    content["projectors"]["l1_proj.x_ref"] = content["projectors"]["l1_proj.x_ref"] + 1
    norm = tmp_path / "norm.pth"
    torch.save(content, norm)
    arguments = ["convert", "--backbone", BACKBONE, "--angle", str(RELEASED), "--norm", str(norm)]
    assert main([*arguments, "--output", str(tmp_path / "bundle")]) == 0
    load = ADPretrainFeatureExtractor.from_pretrained
    angle, other = (load(tmp_path / "bundle", variant=variant) for variant in ("angle", "norm"))
    assert angle.config.default_variant == "angle"
    assert set(angle.config.reported_scores) == {"angle", "norm"}
    difference = other.projectors[0].reference_tokens - angle.projectors[0].reference_tokens
    torch.testing.assert_close(difference, torch.ones(2048, 48), atol=0.02, rtol=0)


def test_both_variants_take_the_place_of_one_of_another_configuration(tmp_path):
    convert(BACKBONE, {"angle": RELEASED}, tmp_path)
    config = convert(BACKBONE, {"angle": RELEASED, "norm": RELEASED}, tmp_path)
    assert ADPretrainFeatureExtractor.from_pretrained(tmp_path, variant="norm").config == config


def test_stopped_between_the_variants_there_is_no_bundle_yet(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adpretrain_hf.bundle.released.write_projectors", full)
    with pytest.raises(OSError, match="No space left"):
        convert(BACKBONE, {"angle": RELEASED, "norm": RELEASED}, tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "config.json").exists()


def test_norm_alone_is_the_default_variant(tmp_path):
    convert(BACKBONE, {"norm": RELEASED}, tmp_path)
    assert ADPretrainFeatureExtractor.from_pretrained(tmp_path).variant == "norm"


def test_scores_pickled_under_numpy_2_are_read(tmp_path):
    torch.save(released() | {"img_auc": np.float64(0.5), "pix_auc": np.float32(0.25)}, tmp_path / "a.pth")
    _, scores = read_released(tmp_path / "a.pth")
    assert scores == {"img_auc": 0.5, "pix_auc": 0.25}


class Malicious:
    """Makes a folder when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["projectors", "img_auc", "surplus"])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_run(tmp_path, place):
    trap = tmp_path / "trap"
    torch.save(released() | {place: Malicious(trap)}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil.pth: refused, for it asks for the global posix.mkdir"):
        convert(BACKBONE, {"angle": tmp_path / "evil.pth"}, tmp_path / "bundle")
    assert not trap.exists()
    assert not (tmp_path / "bundle").exists()


def test_numpys_globals_are_allowed_nowhere_else(tmp_path):
    before = _names(torch.serialization.get_safe_globals())
    read_released(RELEASED)
    torch.save({"a": Malicious(tmp_path / "trap")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="asks for the global posix.mkdir"):
        read_released(tmp_path / "evil.pth")
    with pytest.raises(InputError, match="asks for the global numpy"):
        load_pickle(RELEASED)
    assert _names(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.pth: "),
        (b"not a pickle at all", "a.pth: "),
        ({"weights": torch.zeros(1)}, "not a released ADPretrain checkpoint: expected {'projectors'"),
        ([1, 2], "not a released ADPretrain checkpoint: expected {'projectors'"),
        ({"projectors": {"l1_proj.x_ref": torch.zeros(3)}}, r"missing l1_proj.x_ref of shape \(1, N, C\)"),
        ({"projectors": {"l1_proj.x_ref": torch.zeros(1, 3, 48)}}, r"missing \['l1_proj.layers.0.cross_attn.in_proj"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content, message):
    path = tmp_path / "a.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=message):
        convert(BACKBONE, {"angle": path}, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_nothing_is_written_if_one_of_the_variants_does_not_fit(tmp_path):
    content = released()
    del content["projectors"]["l4_proj.x_ref"]
    torch.save(content, tmp_path / "norm.pth")
    with pytest.raises(InputError, match=r"missing \['l4_proj.x_ref'\]"):
        convert(BACKBONE, {"angle": RELEASED, "norm": tmp_path / "norm.pth"}, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_projectors_of_another_width_are_refused(tmp_path, tiny_folder):
    with pytest.raises(InputError, match="checkpoints_pro_angle.pth does not fit its configuration.*48"):
        convert(str(tiny_folder), {"angle": RELEASED}, tmp_path / "bundle")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(RELEASED.read_bytes()[:-1000])
    with pytest.raises(InputError, match="a.pth: "):
        read_released(tmp_path / "a.pth")


def test_the_release_is_fetched_from_the_hub(hub, tmp_path):
    api = HfApi(token="hf_owner")
    api.create_repo("acme/release")
    for variant in ("angle", "norm"):
        name = f"dino-base/checkpoints_pro_{variant}.pth"
        api.upload_file(repo_id="acme/release", path_or_fileobj=RELEASED, path_in_repo=name)
    hub.fault("GET /_cdn/", corrupt=True)
    found = fetch_released("dinov2-base", "acme/release", cache_dir=tmp_path)
    assert {variant: path.read_bytes() for variant, path in found.items()} == {
        "angle": RELEASED.read_bytes(),
        "norm": RELEASED.read_bytes(),
    }
    with pytest.raises(InputError, match="at revision 'main' is not ADPretrain's release: it lacks a file"):
        fetch_released("dinov2-large", "acme/release", cache_dir=tmp_path)


def test_from_the_authors_file_to_the_hub_and_back(golden, hub, tmp_path):
    convert(BACKBONE, {"angle": RELEASED}, tmp_path / "bundle")
    BundlePusher(tmp_path / "bundle", "acme/converted", token="hf_owner").push()
    extractor = ADPretrainFeatureExtractor.from_pretrained("acme/converted", cache_dir=tmp_path / "cache")
    extractor.set_reference(golden["e2e.references"])
    for level, features in enumerate(extractor(golden["e2e.images"]).values()):
        expected = golden[f"e2e.features.{level}"]
        assert (features - expected).norm() / expected.norm() <= 1e-3


def test_usage(tmp_path, capsys):
    arguments = ["convert", "--backbone", BACKBONE, "--output", str(tmp_path)]
    assert main(arguments) == 1
    assert "give either --from-hub or the files" in capsys.readouterr().err
    assert main([*arguments, "--from-hub", "x/y", "--angle", str(RELEASED)]) == 1
    with pytest.raises(InputError, match="no released checkpoints for 'dinov2-giant': expected one of dinov2-base"):
        fetch_released("dinov2-giant")
    with pytest.raises(InputError, match="no checkpoint was given"):
        convert(BACKBONE, {}, tmp_path)


def _names(safe_globals: list) -> set[str]:
    return {str(one) for one in safe_globals}


def released() -> dict:
    """The stored checkpoint's content, without its numpy scalars."""
    return {"projectors": read_released(RELEASED)[0]}


def test_an_entry_that_is_no_number_is_refused(tmp_path):
    content = read_released(RELEASED)[0]
    torch.save({"projectors": content, "note": "best so far"}, tmp_path / "noted.pth")
    with pytest.raises(InputError, match=r"noted\.pth: not a released ADPretrain checkpoint: expected numbers beside"):
        read_released(tmp_path / "noted.pth")
