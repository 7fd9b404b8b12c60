"""Backbones: tokens of the authors' code, six families of transformers, and what is left of a network."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from adpretrain_hf.backbones import Backbone, load_backbone, load_saved_backbone
from adpretrain_hf.backbones.position_grid import resample_grid
from adpretrain_hf.errors import BundleError, InputError
from tests.conftest import GOLDEN
from tests.tiny import FAMILIES, SIZES, save_tiny, tiny_model

PREFIX = {"dinov2_with_registers": 5, "dinov3_vit": 4, "siglip_vision_model": 0}
FC1 = "encoder.layer.0.mlp.fc1.weight"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(tmp_path):
    load_backbone(save_tiny(tmp_path / "upstream"), (1, 2)).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("side", [224, 280])
def test_dinov2_tokens_equal_the_authors(golden, side):
    backbone = load_backbone(GOLDEN / "dinov2_tiny", (1, 2, 3, 4))
    for level, maps in enumerate(backbone(golden[f"dinov2.image.{side}"])):
        expected = golden[f"dinov2.tokens.{side}.{level}"]
        assert (maps.flatten(2).transpose(1, 2) - expected).abs().max() <= 1e-5


def test_the_librarys_own_position_rule_would_not_do(golden):
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(GOLDEN / "dinov2_tiny")
    tokens = model(golden["dinov2.image.224"], output_hidden_states=True).hidden_states[1][:, 1:]
    assert (tokens - golden["dinov2.tokens.224.0"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48), (64, 24)])
def test_maps_are_the_raw_residual_stream_without_prefix_tokens(family, height, width):
    model = tiny_model(family)
    images = torch.randn(2, 3, height, width)
    more = {} if family.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        if family == "dinov2":  # its positions follow another rule: compare with the same network, uncut
            states = Backbone(tiny_model(family), (4,)).model(images, output_hidden_states=True).hidden_states
        else:
            states = model(images, output_hidden_states=True, **more).hidden_states
        maps = Backbone(model, (1, 3))(images)
    for n, level in zip((1, 3), maps, strict=True):
        assert level.shape == (2, 32, height // 8, width // 8)
        tokens = states[n][:, PREFIX.get(family, 1) :]
        row = tokens.unflatten(1, (height // 8, width // 8)).permute(0, 3, 1, 2)
        torch.testing.assert_close(level, row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "model", [hf.ViTMSNModel(hf.ViTMSNConfig(**SIZES)), hf.ChineseCLIPVisionModel(hf.ChineseCLIPVisionConfig(**SIZES))]
)
def test_images_that_are_not_square_in_a_family_without_a_line_of_its_own(model):
    assert Backbone(model, (1,))(torch.randn(1, 3, 32, 48))[0].shape == (1, 32, 4, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_computed_after_the_last_level(family):
    backbone = Backbone(tiny_model(family), (1, 2))
    names = [name for name, _ in backbone.model.named_parameters()]
    blocks = {name.split(".layer.")[-1].split(".layers.")[-1].split("layers.")[-1].split(".")[0] for name in names}
    assert {block for block in blocks if block.isdigit()} == {"0", "1"}
    assert not [name for name in names if "post_layernorm" in name or "pooler" in name or name.startswith("head")]
    assert not [name for name in names if name.startswith(("layernorm.", "norm."))]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_frozen_whatever_train_is_told(family):
    backbone = Backbone(tiny_model(family), (2,))
    assert backbone.train() is backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_again_it_is_the_same(family, tmp_path):
    backbone = load_backbone(save_tiny(tmp_path / "upstream", family), (1, 3))
    backbone.save(tmp_path / "saved")
    again = load_saved_backbone(tmp_path / "saved", (1, 3))
    images = torch.randn(1, 3, 32, 32)
    for a, b in zip(backbone(images), again(images), strict=True):
        assert torch.equal(a, b)
    assert backbone.digest() == again.digest()


def test_saved_files_hold_nothing_that_is_not_used(saved):
    names = load_file(saved / "model.safetensors").keys()
    assert not [name for name in names if "mask_token" in name or name.startswith("layernorm") or ".2." in name]
    assert json.loads((saved / "config.json").read_text())["num_hidden_layers"] == 2


def test_attention_is_sdpa(tiny_folder):
    assert load_backbone(tiny_folder, (1,)).model.config._attn_implementation == "sdpa"


def test_a_model_with_two_towers_gives_its_vision_tower(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    from tests.tiny import SIZES

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        state = model.vision_model(images, output_hidden_states=True).hidden_states[2][:, 1:]
    level = load_backbone(tmp_path, (2,))(images)[0]
    torch.testing.assert_close(level.flatten(2).transpose(1, 2), state, atol=1e-6, rtol=1e-6)


def test_half_precision(tiny_folder):
    backbone = load_backbone(tiny_folder, (1, 4), dtype=torch.bfloat16)
    maps = backbone(torch.randn(1, 3, 32, 32).bfloat16())
    assert all(level.dtype == torch.bfloat16 and level.isfinite().all() for level in maps)


def test_digest_tells_weights_apart_and_not_precisions(tmp_path):
    half = load_backbone(save_tiny(tmp_path / "a"), (1,), dtype=torch.float16)
    half.save(tmp_path / "half")
    assert load_saved_backbone(tmp_path / "half", (1,), dtype=torch.float32).digest() == half.digest()
    assert load_backbone(save_tiny(tmp_path / "b", seed=1), (1,), dtype=torch.float16).digest() != half.digest()


def test_a_repository_without_a_model_is_refused(hub, tmp_path):
    HfApi(token="hf_owner").create_repo("acme/no-model")
    with pytest.raises(InputError, match="no backbone at 'acme/no-model': .* is not a transformers model: it lacks"):
        load_backbone("acme/no-model", (1,), cache_dir=tmp_path)


def test_a_level_beyond_the_depth_is_refused(tiny_folder):
    with pytest.raises(InputError, match="level 5 was asked for, but .* has blocks 1 to 4"):
        load_backbone(tiny_folder, (1, 5))


def test_a_network_of_another_kind_is_refused():
    model = tiny_model("vit")
    model.config.num_register_tokens = 2
    with pytest.raises(InputError, match="gave 17 tokens for a grid of 4 x 4 patches and 3 prefix tokens"):
        Backbone(model, (1,))(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weight: {FC1: None}, "does not fit its configuration: missing .*fc1.weight"),
        (lambda weight: {FC1: weight[:, :-1].clone()}, "of another shape .*fc1.weight"),
        (lambda weight: {FC1: weight.where(weight < weight.max(), torch.nan)}, r"NaN or infinite values in .*fc1"),
        (lambda weight: {"surplus": torch.zeros(1)}, "unexpected .*surplus"),
    ],
)
def test_damaged_backbone_is_refused(saved, damage, message):
    tensors = load_file(saved / "model.safetensors")
    tensors |= damage(tensors[FC1])
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match=message):
        load_saved_backbone(saved, (1, 2))


def test_truncated_backbone_is_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="cannot be loaded"):
        load_saved_backbone(saved, (1, 2))


def test_pickled_weights_are_not_read(tmp_path):
    save_tiny(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded.*safetensors"):
        load_backbone(tmp_path, (1,))


@pytest.mark.parametrize("bars", [True, False])
def test_loading_says_nothing_and_leaves_the_librarys_settings(tiny_folder, capfd, monkeypatch, bars):
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", bars)
    logging.set_verbosity_warning()  # the default
    load_backbone(tiny_folder, (1,))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, bars)


def test_loading_half_precision_is_nothing_to_torchs_default(tmp_path, monkeypatch):
    load_backbone(save_tiny(tmp_path / "upstream"), (1,), dtype=torch.float16).save(tmp_path / "half")
    set_default, seen = torch.set_default_dtype, []
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: seen.append(dtype) or set_default(dtype))
    for dtype in (torch.float32, torch.float16):
        assert load_saved_backbone(tmp_path / "half", (1,), dtype=dtype).model.dtype == dtype
        load_backbone(tmp_path / "half", (1,), dtype=dtype)
    assert set(seen) <= {torch.float32}


def run(program, *arguments):
    return subprocess.check_output([sys.executable, "-c", program, *map(str, arguments)], text=True, cwd=ROOT)


def test_threads_may_be_the_first_to_load(tiny_folder):
    program = """
import sys, threading
from adpretrain_hf.backbones import load_backbone
loaded = []
load = lambda: loaded.append(load_backbone(sys.argv[1], (1,)))
threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(loaded))"""
    assert run(program, tiny_folder) == "4\n"


def test_pickled_after_use_and_read_in_another_process(tmp_path):
    images = torch.randn(1, 3, 32, 32)
    backbones = [Backbone(tiny_model(family), (1, 3)) for family in FAMILIES]
    expected = [backbone(images) for backbone in backbones]
    (tmp_path / "all").write_bytes(pickle.dumps((backbones, images)))
    program = """
import pickle, sys, torch
backbones, images = pickle.load(open(sys.argv[1], "rb"))
torch.save([backbone(images) for backbone in backbones], sys.argv[2])"""
    run(program, tmp_path / "all", tmp_path / "found")
    torch.testing.assert_close(torch.load(tmp_path / "found"), expected)


def test_grid_is_resampled_once_per_size(tiny_folder, monkeypatch):
    from adpretrain_hf.backbones import position_grid

    backbone = load_backbone(tiny_folder, (1,))
    calls = []
    monkeypatch.setattr(
        position_grid, "resample_grid", lambda positions, h, w: calls.append((h, w)) or resample_grid(positions, h, w)
    )
    for side in (40, 40, 48, 40):
        backbone(torch.randn(1, 3, side, 32))
    assert calls == [(5, 4), (6, 4)]


def test_grid_that_fits_is_left_alone():
    positions = torch.randn(1, 17, 8)
    assert resample_grid(positions, 4, 4) is positions
    assert resample_grid(positions, 3, 5).shape == (1, 16, 8)


def test_moving_the_network_moves_its_grids(tiny_folder):
    backbone = load_backbone(tiny_folder, (1,))
    images = torch.randn(1, 3, 40, 40)
    before = backbone(images)[0]
    after = backbone.bfloat16()(images.bfloat16())[0]
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before, atol=0.1, rtol=0.1)


def test_copies_are_independent(tmp_path):
    shutil.copytree(GOLDEN / "dinov2_tiny", tmp_path / "copy")
    a, b = load_backbone(tmp_path / "copy", (1,)), load_backbone(tmp_path / "copy", (1,))
    with torch.no_grad():
        next(a.parameters()).add_(1)
    assert a.digest() != b.digest()


@pytest.mark.parametrize("size", [(36, 32), (32, 36), (4, 32)])
def test_sizes_that_patches_do_not_fill_are_refused(tiny_folder, size):
    with pytest.raises(
        InputError, match=rf"got images of {size[0]} x {size[1]} pixels, expected multiples of the patch"
    ):
        load_backbone(tiny_folder, (1,))(torch.randn(1, 3, *size))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_after_the_last_level_that_is_wanted_are_not_computed(family):
    backbone, images, run = Backbone(tiny_model(family), (1, 2, 4)), torch.randn(2, 3, 32, 32), []
    every = backbone(images)
    blocks = next(one for one in backbone.model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == 4)
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    for layers in ((1,), (2,), (1, 2), (4,), (1, 2, 4), None):
        run.clear()
        some = backbone(images, layers)
        assert run == list(range(1, (layers or (4,))[-1] + 1))
        expected = [every[(1, 2, 4).index(level)] for level in layers or (1, 2, 4)]
        assert all(map(torch.equal, some, expected)) and len(some) == len(expected)
    backbone.double()  # what is shared follows
    assert torch.equal(backbone(images.double(), (2,))[0], backbone(images.double())[1])
    backbone.keep((2,))
    run.clear()
    assert torch.equal(backbone(images.double())[0], backbone(images.double(), (2,))[0]) and run == [1, 2, 1, 2]
    assert not [name for name, _ in backbone.named_parameters() if ".3." in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_some_levels_before_all(family):
    backbone, other = (Backbone(tiny_model(family), (1, 2, 4)) for _ in range(2))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images, (1,))[0], other(images)[0])
    assert all(map(torch.equal, backbone(images), other(images)))
