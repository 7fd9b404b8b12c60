"""open_clip's towers, converted, against the originals, and the refusal of whatever cannot be converted."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from adpretrain_hf.backbones import describe, load_backbone
from adpretrain_hf.errors import InputError
from tests.backbones.converted import Trap, difference, maps

open_clip = pytest.importorskip("open_clip")
from adpretrain_hf.backbones import open_clip as towers  # noqa: E402

QuickGELU = open_clip.transformer.QuickGELU
POSITIONS = nn.Parameter(torch.zeros(10, 64))
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def randomise(module: nn.Module) -> None:
    """Leaves no norm at one and no bias at zero, so that no two parts can be mistaken for each other."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 2 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.3 * noise


def tower(**overrides: Any) -> Any:
    sizes = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "heads": 4, "mlp_ratio": 3.0}
    visual = open_clip.transformer.VisionTransformer(**(sizes | overrides)).eval()
    randomise(visual)
    return visual


def converted(visual: nn.Module) -> CLIPVisionModel:
    return towers.convert_open_clip_tower(visual, visual.state_dict())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip has the architectures "tiny" and "tiny-quickgelu" for one test."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    for name, quick in (("tiny", False), ("tiny-quickgelu", True)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(TINY | {"quick_gelu": quick}))
        open_clip.add_model_config(path)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def original(visual: Any, images: Tensor) -> list[Tensor]:
    return visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"]


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_parity(images: Tensor, quick: bool) -> None:
    right, wrong = (QuickGELU, nn.GELU) if quick else (nn.GELU, QuickGELU)
    visual, other = tower(act_layer=right), tower(act_layer=wrong)
    model = converted(visual)
    assert model.config.hidden_act == ("quick_gelu" if quick else "gelu")
    assert model.config.intermediate_size == 192 and not model.training
    assert difference(maps(model, images), original(visual, images)) <= 1e-5
    assert difference(maps(converted(other), images), original(visual, images)) > 1e-3


def test_options_are_read_off_the_tower(images: Tensor) -> None:
    visual = tower(
        norm_layer=functools.partial(open_clip.transformer.LayerNorm, eps=0.1),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),
        pos_embed_type="sin_cos_2d",
        patch_dropout=0.5,
        heads=2,
        patch_size=8,
    )
    model = converted(visual)
    assert model.config.layer_norm_eps == 0.1 and model.config.hidden_act == "gelu_pytorch_tanh"
    assert difference(maps(model, images), original(visual, images)) <= 1e-5


def test_pooler_is_left_out(images: Tensor) -> None:
    visual = tower(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=3, output_dim=32)
    model = converted(visual)
    assert difference(maps(model, images), original(visual, images)) <= 1e-5
    assert torch.equal(model.post_layernorm.weight, torch.ones(64))


def test_last_norm_is_kept_or_identity() -> None:
    visual = tower()
    assert torch.equal(converted(visual).post_layernorm.bias, visual.ln_post.bias)
    visual.prune_intermediate_layers([1], prune_norm=True)
    model = converted(visual)
    assert model.config.num_hidden_layers == 2
    assert torch.equal(model.post_layernorm.bias, torch.zeros(64))


def test_tensors_are_owned_and_saved(images: Tensor, tmp_path: Path) -> None:
    visual = tower()
    model = converted(visual)
    before = maps(model, images)
    randomise(visual.transformer.resblocks[0].attn.double())
    visual.class_embedding.data.zero_()
    assert difference(maps(model, images), before) == 0
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path)
    loaded = CLIPVisionModel.from_pretrained(tmp_path).eval()
    assert difference(maps(loaded, images), before) == 0


def test_types_are_kept_or_widened() -> None:
    half = converted(tower().to(torch.bfloat16))
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    mixed = tower()
    mixed.conv1.to(torch.float16)
    mixed.ln_pre.to(torch.bfloat16)
    model = converted(mixed)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        ({"no_ln_pre": True}, {}, "without ln_pre"),
        ({"ls_init_value": 0.1}, {}, "LayerScale"),
        ({"scale_attn": True}, {}, "CustomResidualAttentionBlock"),
        ({"qk_norm": True}, {}, "CustomResidualAttentionBlock"),
        ({"image_size": (64, 32)}, {}, r"unequal image height and width: \[32, 64\]"),
        ({"patch_size": (16, 8)}, {}, r"unequal patch sizes and strides: \[8, 16\]"),
        ({}, {"conv1": nn.Conv2d(3, 64, 16, stride=8, bias=False)}, r"unequal patch sizes and strides: \[8, 16\]"),
        ({}, {"conv1": nn.Conv2d(3, 64, 16, 16, padding=1, bias=False)}, "patchification Conv2d.*padding"),
        ({}, {"transformer.resblocks.1.mlp.c_fc": nn.Linear(64, 100)}, r"unequal MLP widths: \[100, 192\]"),
        ({}, {"transformer.resblocks.0.attn.num_heads": 8}, r"unequal numbers of heads: \[4, 8\]"),
        ({}, {"ln_pre.eps": 1e-6}, r"unequal LayerNorm eps: \[1e-06, 1e-05\]"),
        ({}, {"transformer.resblocks.2.mlp.gelu": nn.ReLU()}, r"activation ReLU\(\)"),
        ({}, {"transformer.resblocks.2.mlp.gelu": QuickGELU()}, r"unequal activations: \['gelu', 'quick_gelu'\]"),
        ({}, {"transformer.resblocks.0.attn.add_zero_attn": True}, "the attention MultiheadAttention"),
        ({}, {"register_tokens": nn.Parameter(torch.zeros(4, 64))}, r"missing \[\], unexpected \['register_tokens'\]"),
        ({}, {"positional_embedding": POSITIONS}, r"position_embedding.weight: got \(10, 64\), expected \(17, 64\)"),
    ],
)
def test_towers_that_cannot_be_expressed(overrides: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    visual = tower(**overrides)
    for path, value in changes.items():
        owner, _, name = path.rpartition(".")
        setattr(visual.get_submodule(owner), name, value)
    with pytest.raises(InputError, match=message):
        converted(visual)


def test_other_networks_are_named() -> None:
    with pytest.raises(InputError, match=r"cannot express a Linear.*choose another architecture"):
        converted(nn.Linear(1, 1))
    with pytest.raises(InputError, match="cannot express a ModifiedResNet"):
        towers.open_clip_vision_config("RN50/openai")
    with pytest.raises(InputError, match="cannot express ViT-B-16-SigLIP, a timm tower"):
        towers.from_open_clip("ViT-B-16-SigLIP/webli")


def saved(path: Path, arch: str = "tiny", wrap: str = "") -> Any:
    """Saves a random model of the architecture as a checkpoint, and returns its tower."""
    model = open_clip.create_model(arch)
    randomise(model)
    state = {wrap + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if wrap else state, path)
    return model.visual


@pytest.mark.parametrize("wrap", ["", "module."])
def test_checkpoint_file(tiny: None, images: Tensor, tmp_path: Path, wrap: str) -> None:
    path = tmp_path / "tiny.pt"
    visual = saved(path, wrap=wrap)
    model = towers.from_open_clip(f"tiny/{path}")
    path.unlink()  # nothing may stay mapped
    assert model.config.num_attention_heads == 4 and model.config.hidden_act == "gelu"
    assert difference(maps(model, images), original(visual.eval(), images)) <= 1e-5


def test_tag_activation_must_fit(tiny: None, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visual = saved(tmp_path / "quick.pt", arch="tiny-quickgelu")
    quick = {"file": str(tmp_path / "quick.pt"), "quick_gelu": True}
    known = open_clip.pretrained._PRETRAINED
    for arch in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(known, arch, {"quick": quick, "exact": quick | {"quick_gelu": False}})
    model = towers.from_open_clip("tiny-quickgelu/quick")
    assert difference(maps(model, images), original(visual.eval(), images)) <= 1e-5
    with pytest.raises(InputError, match=r"'quick' needs QuickGELU, but tiny has GELU: use tiny-quickgelu$"):
        towers.from_open_clip("tiny/quick")
    with pytest.raises(InputError, match=r"'exact' needs GELU, but tiny-quickgelu has QuickGELU: use tiny$"):
        towers.from_open_clip("tiny-quickgelu/exact")
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    with pytest.raises(InputError, match="use the downloaded file in place of the tag"):
        towers.from_open_clip("tiny/quick")


def test_published_tag_with_the_wrong_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: pytest.fail("downloaded too early"))
    with pytest.raises(InputError, match="'openai' needs QuickGELU, but ViT-B-16 has GELU: use ViT-B-16-quickg"):
        towers.from_open_clip("ViT-B-16/openai")


def test_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(tag: dict[str, Any]) -> str:
        raise FileNotFoundError("no route")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(InputError, match=r"could not download 'openai' \(no route\): give the path"):
        towers.from_open_clip("ViT-B-16-quickgelu/openai")


def test_unknown_names(tiny: None) -> None:
    with pytest.raises(InputError, match=r"no architecture 'ViT-B16'; expected .*list_models\(\): ViT-B-16, "):
        towers.from_open_clip("ViT-B16/openai")
    with pytest.raises(InputError, match=r"'opnai' is no file and no tag of ViT-B-16-quickgelu; .*: openai, "):
        towers.from_open_clip("ViT-B-16-quickgelu/opnai")
    with pytest.raises(InputError, match="no tag of tiny; expected a path or one of: none"):
        towers.open_clip_vision_config("tiny/openai")


def test_checkpoints_that_do_not_match(tiny: None, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    saved(path)
    state = torch.load(path, weights_only=True)
    positions = state["visual.positional_embedding"]
    # open_clip itself would resample these positions in silence.
    torch.save(state | {"visual.positional_embedding": positions[:5]}, path)
    with pytest.raises(InputError, match=r"position_embedding.weight: got \(5, 64\), expected \(17,"):
        towers.from_open_clip(f"tiny/{path}")
    torch.save(state | {"visual.class_embedding": torch.ones(64, dtype=torch.int8)}, path)
    message = r"class_embedding: got torch.int8, expected floats.*: give the checkpoint of this architecture"
    with pytest.raises(InputError, match=message):
        towers.from_open_clip(f"tiny/{path}")
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith("visual.")}, path)
    with pytest.raises(InputError, match=r"missing \[.*class_embedding.*positional_embedding.*\], unexpected \[\]"):
        towers.from_open_clip(f"tiny/{path}")
    torch.save({key: tensor for key, tensor in state.items() if key != "visual.ln_post.bias"}, path)
    with pytest.raises(InputError, match=r"missing \[.ln_post\.bias.\], unexpected \[\]"):
        towers.from_open_clip(f"tiny/{path}")


def test_vision_config(tiny: None, tmp_path: Path) -> None:
    published = describe("open_clip:ViT-L-14-quickgelu/openai")
    assert (published.hidden_size, published.depth, published.patch_size, published.image_size) == (1024, 24, 14, 224)
    assert (published.mean, published.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert describe("open_clip:ViT-L-14/laion2b_s32b_b82k").mean == (0.5, 0.5, 0.5)
    (tmp_path / "tiny.pt").touch()  # a file tells no statistics, and is not read for the sizes
    small = describe(f"open_clip:tiny/{tmp_path / 'tiny.pt'}")
    assert (small.hidden_size, small.depth, small.patch_size, small.image_size) == (64, 3, 16, 64)
    assert (small.mean, small.std) == (published.mean, published.std)


def test_code_in_a_checkpoint_is_not_run(tiny: None, tmp_path: Path) -> None:
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(InputError, match=r"trap\.pt: refused, for it asks for the global posix\.mkdir"):
        towers.from_open_clip(f"tiny/{tmp_path / 'trap.pt'}")
    assert not (tmp_path / "sprung").exists()


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, towers.__name__)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    source, advice = "open_clip:ViT-B-16/openai", r"pip install adpretrain-hf\[open-clip\]"
    with pytest.raises(InputError, match=advice):
        load_backbone(source, (1,))
    with pytest.raises(InputError, match=advice):
        describe(source)
