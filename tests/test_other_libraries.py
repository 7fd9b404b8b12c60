"""Converted towers against the code they come from, and the refusal of whatever cannot be converted."""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from adpretrain_hf.checkpoints import read_checkpoint
from adpretrain_hf.errors import InputError
from adpretrain_hf.imagebind import convert_imagebind_trunk, from_imagebind
from adpretrain_hf.open_clip_towers import convert_open_clip_tower, from_open_clip, open_clip_vision_config

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
refused: Callable[..., Any] = functools.partial(pytest.raises, InputError)


def randomise(module: nn.Module) -> None:
    """Leaves no norm at one and no bias at zero, so that no two parts can be mistaken for each other."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 2 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.3 * noise


@pytest.fixture
def tower() -> Callable[..., Any]:
    transformer = pytest.importorskip("open_clip").transformer

    def build(**overrides: Any) -> Any:
        sizes = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "heads": 4, "mlp_ratio": 3.0}
        visual = transformer.VisionTransformer(**(sizes | overrides)).eval()
        randomise(visual)
        return visual

    return build


@pytest.fixture
def open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip, for one test with the architectures "tiny" and "tiny-quickgelu"."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    for name, quick in (("tiny", False), ("tiny-quickgelu", True)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(TINY | {"quick_gelu": quick}))
        open_clip.add_model_config(path)
    return open_clip


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def maps(model: CLIPVisionModel, images: Tensor) -> list[Tensor]:
    """(B, C, h, w) of every block."""
    states = model(images, output_hidden_states=True).hidden_states[1:]
    side = math.isqrt(states[0].shape[1] - 1)
    return [state[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for state in states]


def last_norm(model: CLIPVisionModel) -> Any:
    return getattr(model, "vision_model", model).post_layernorm


@torch.no_grad()
def original(visual: Any, images: Tensor) -> list[Tensor]:
    return visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its block."""
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_parity(tower: Callable[..., Any], images: Tensor, quick: bool) -> None:
    quick_gelu = sys.modules["open_clip"].transformer.QuickGELU
    right, wrong = (quick_gelu, nn.GELU) if quick else (nn.GELU, quick_gelu)
    visual, other = tower(act_layer=right), tower(act_layer=wrong)
    model = convert_open_clip_tower(visual)
    assert model.config.hidden_act == ("quick_gelu" if quick else "gelu")
    assert model.config.intermediate_size == 192 and not model.training
    assert difference(maps(model, images), original(visual, images)) <= 1e-5
    assert difference(maps(convert_open_clip_tower(other), images), original(visual, images)) > 1e-3


def test_options_are_read_off_the_tower(tower: Callable[..., Any], images: Tensor) -> None:
    layer_norm = sys.modules["open_clip"].transformer.LayerNorm
    visual = tower(
        norm_layer=functools.partial(layer_norm, eps=0.1),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),
        pos_embed_type="sin_cos_2d",
        patch_dropout=0.5,
        heads=2,
        patch_size=8,
    )
    model = convert_open_clip_tower(visual)
    assert model.config.layer_norm_eps == 0.1 and model.config.hidden_act == "gelu_pytorch_tanh"
    assert difference(maps(model, images), original(visual, images)) <= 1e-5


def test_pooler_is_left_out(tower: Callable[..., Any], images: Tensor) -> None:
    visual = tower(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=3, output_dim=32)
    model = convert_open_clip_tower(visual)
    assert difference(maps(model, images), original(visual, images)) <= 1e-5
    assert torch.equal(last_norm(model).weight, torch.ones(64))


def test_last_norm_is_kept_or_identity(tower: Callable[..., Any]) -> None:
    visual = tower()
    assert torch.equal(last_norm(convert_open_clip_tower(visual)).bias, visual.ln_post.bias)
    visual.prune_intermediate_layers([1], prune_norm=True)
    model = convert_open_clip_tower(visual)
    assert model.config.num_hidden_layers == 2
    assert torch.equal(last_norm(model).bias, torch.zeros(64))


def test_tensors_are_owned_and_saved(tower: Callable[..., Any], images: Tensor, tmp_path: Path) -> None:
    visual = tower()
    model = convert_open_clip_tower(visual)
    before = maps(model, images)
    randomise(visual.transformer.resblocks[0].attn.double())
    visual.class_embedding.data.zero_()
    assert difference(maps(model, images), before) == 0
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path)
    loaded = CLIPVisionModel.from_pretrained(tmp_path).eval()
    assert difference(maps(loaded, images), before) == 0


def test_types_are_kept_or_widened(tower: Callable[..., Any]) -> None:
    half = convert_open_clip_tower(tower().to(torch.bfloat16))
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    mixed = tower()
    mixed.conv1.to(torch.float16)
    mixed.ln_pre.to(torch.bfloat16)
    model = convert_open_clip_tower(mixed)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def widen(visual: Any) -> None:
    visual.transformer.resblocks[1].mlp.c_fc = nn.Linear(64, 100)


def overlap(visual: Any) -> None:
    visual.conv1 = nn.Conv2d(3, 64, 16, stride=8, bias=False)


def pad(visual: Any) -> None:
    visual.conv1 = nn.Conv2d(3, 64, 16, stride=16, padding=1, bias=False)


def relu(visual: Any) -> None:
    visual.transformer.resblocks[2].mlp.gelu = nn.ReLU()


def mix(visual: Any) -> None:
    visual.transformer.resblocks[2].mlp.gelu = sys.modules["open_clip"].transformer.QuickGELU()


def zero_attention(visual: Any) -> None:
    visual.transformer.resblocks[0].attn.add_zero_attn = True


def regroup(visual: Any) -> None:
    visual.transformer.resblocks[0].attn.num_heads = 8


def eps(visual: Any) -> None:
    visual.ln_pre.eps = 1e-6


def register(visual: Any) -> None:
    visual.register_tokens = nn.Parameter(torch.zeros(4, 64))


def cut(visual: Any) -> None:
    visual.positional_embedding = nn.Parameter(torch.zeros(10, 64))


@pytest.mark.parametrize(
    ("overrides", "change", "message"),
    [
        ({"no_ln_pre": True}, None, "without ln_pre"),
        ({"ls_init_value": 0.1}, None, "LayerScale"),
        ({"scale_attn": True}, None, "CustomResidualAttentionBlock"),
        ({"qk_norm": True}, None, "CustomResidualAttentionBlock"),
        ({"image_size": (64, 32)}, None, r"unequal image height and width: \[32, 64\]"),
        ({"patch_size": (16, 8)}, None, r"unequal patch sizes and strides: \[8, 16\]"),
        ({}, overlap, r"unequal patch sizes and strides: \[8, 16\]"),
        ({}, pad, "patchification Conv2d.*padding"),
        ({}, widen, r"unequal MLP widths: \[100, 192\]"),
        ({}, regroup, r"unequal numbers of heads: \[4, 8\]"),
        ({}, eps, r"unequal LayerNorm eps: \[1e-06, 1e-05\]"),
        ({}, relu, r"activation ReLU\(\)"),
        ({}, mix, r"unequal activations: \['gelu', 'quick_gelu'\]"),
        ({}, zero_attention, "the attention MultiheadAttention"),
        ({}, register, "missing none; unknown register_tokens; expected exactly"),
        ({}, cut, r"position_embedding.weight torch.float32 \(10, 64\), expected \(17, 64\)"),
    ],
)
def test_towers_that_cannot_be_expressed(
    tower: Callable[..., Any], overrides: dict[str, Any], change: Callable[[Any], None] | None, message: str
) -> None:
    visual = tower(**overrides)
    if change:
        change(visual)
    with refused(match=message):
        convert_open_clip_tower(visual)


def test_other_networks_are_named(tower: Callable[..., Any]) -> None:
    with refused(match=r"cannot express a Linear.*choose another architecture"):
        convert_open_clip_tower(nn.Linear(1, 1))
    with refused(match="cannot express a ModifiedResNet"):
        open_clip_vision_config("RN50")
    with refused(match="cannot express ViT-B-16-SigLIP, a timm tower"):
        from_open_clip("ViT-B-16-SigLIP", None)


def saved(open_clip: Any, path: Path, arch: str = "tiny", wrap: str = "") -> Any:
    """Saves a random model of the architecture as a checkpoint, and returns its tower."""
    model = open_clip.create_model(arch)
    randomise(model)
    state = {wrap + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if wrap else state, path)
    return model.visual


@pytest.mark.parametrize("wrap", ["", "module."])
def test_checkpoint_file(open_clip: Any, images: Tensor, tmp_path: Path, wrap: str) -> None:
    path = tmp_path / "tiny.pt"
    visual = saved(open_clip, path, wrap=wrap)
    model = from_open_clip("tiny", str(path))
    path.unlink()  # nothing may stay mapped
    assert model.config.num_attention_heads == 4 and model.config.hidden_act == "gelu"
    assert difference(maps(model, images), original(visual.eval(), images)) <= 1e-5


def test_random_weights(open_clip: Any, images: Tensor) -> None:
    models = [from_open_clip("tiny-quickgelu", None) for _ in range(2)]
    assert models[0].config.hidden_act == "quick_gelu"
    assert all(torch.isfinite(level).all() for level in maps(models[0], images))
    assert difference(maps(models[0], images), maps(models[1], images)) > 1e-3


def test_tag_activation_must_fit(
    open_clip: Any, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = saved(open_clip, tmp_path / "quick.pt", arch="tiny-quickgelu")
    quick = {"file": str(tmp_path / "quick.pt"), "quick_gelu": True}
    known = open_clip.pretrained._PRETRAINED
    for arch in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(known, arch, {"quick": quick, "exact": quick | {"quick_gelu": False}})
    model = from_open_clip("tiny-quickgelu", "quick")
    assert difference(maps(model, images), original(visual.eval(), images)) <= 1e-5
    with refused(match=r"'quick' needs QuickGELU, but tiny has GELU: use tiny-quickgelu$"):
        from_open_clip("tiny", "quick")
    with refused(match=r"'exact' needs GELU, but tiny-quickgelu has QuickGELU: use tiny$"):
        from_open_clip("tiny-quickgelu", "exact")
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    with refused(match="use the downloaded file in place of the tag"):
        from_open_clip("tiny", "quick")


def test_published_tag_with_the_wrong_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: pytest.fail("downloaded too early"))
    with refused(match="'openai' needs QuickGELU, but ViT-B-16 has GELU: use ViT-B-16-quickg"):
        from_open_clip("ViT-B-16", "openai")


def test_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")

    def unreachable(tag: dict[str, Any]) -> str:
        raise FileNotFoundError("no route")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with refused(match=r"could not download 'openai' \(no route\): give the path"):
        from_open_clip("ViT-B-16-quickgelu", "openai")


def test_unknown_names(open_clip: Any) -> None:
    with refused(match=r"no architecture 'ViT-B16'; expected .*list_models\(\): ViT-B-16, "):
        from_open_clip("ViT-B16", None)
    with refused(match=r"'opnai' is no file and no tag of ViT-B-16-quickgelu; .*: openai, "):
        from_open_clip("ViT-B-16-quickgelu", "opnai")
    with refused(match="no tag of tiny; expected a path or one of: none"):
        open_clip_vision_config("tiny", "openai")


def test_checkpoints_that_do_not_match(open_clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    saved(open_clip, path)
    state = torch.load(path, weights_only=True)
    positions = state["visual.positional_embedding"]
    # open_clip itself would resample these positions in silence.
    torch.save(state | {"visual.positional_embedding": positions[:5]}, path)
    with refused(match=r"position_embedding.weight torch.float32 \(5, 64\), expected \(17,"):
        from_open_clip("tiny", str(path))
    torch.save(state | {"visual.class_embedding": torch.ones(64, dtype=torch.int8)}, path)
    with refused(match=r"class_embedding torch.int8 .*must be floating-point"):
        from_open_clip("tiny", str(path))
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith("visual.")}, path)
    with refused(match=r"missing class_embedding, positional_embedding, .* and 33 more; unknown none"):
        from_open_clip("tiny", str(path))
    torch.save({key: tensor for key, tensor in state.items() if key != "visual.ln_post.bias"}, path)
    with refused(match=r"missing ln_post\.bias; unknown none"):
        from_open_clip("tiny", str(path))


def test_vision_config(open_clip: Any) -> None:
    info = open_clip_vision_config("ViT-L-14-quickgelu", "openai")
    sizes = (info.hidden_size, info.num_hidden_layers, info.patch_size, info.image_size)
    assert sizes == (1024, 24, 14, 224)
    assert (info.mean, info.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert open_clip_vision_config("ViT-L-14", "laion2b_s32b_b82k").mean == (0.5, 0.5, 0.5)
    assert open_clip_vision_config("ViT-L-14") == info
    tiny = open_clip_vision_config("tiny")
    assert (tiny.hidden_size, tiny.num_hidden_layers, tiny.patch_size, tiny.image_size) == (64, 3, 16, 64)


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    advice = re.escape("pip install adpretrain-hf[open-clip]")
    for call in (
        lambda: from_open_clip("ViT-B-16", None),
        lambda: open_clip_vision_config("ViT-B-16"),
        lambda: convert_open_clip_tower(nn.Identity()),
    ):
        with refused(match=advice):
            call()


def imagebind_state(width: int = 32, grid: int = 4, blocks: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        scale = 0.3 if len(shape) == 1 else 2 * shape[-1] ** -0.5
        return mean + scale * torch.randn(*shape, generator=generator)

    pre, trunk = "modality_preprocessors.vision.", "modality_trunks.vision."
    state = {
        f"{pre}cls_token": draw(1, 1, width),
        f"{pre}rgbt_stem.proj.1.weight": draw(width, 3, 2, 14, 14) / 7,
        f"{pre}pos_embedding_helper.pos_embed": draw(1, 1 + grid**2, width),
        f"{trunk}pre_transformer_layer.0.weight": draw(width, mean=1),
        f"{trunk}pre_transformer_layer.0.bias": draw(width),
        "modality_heads.vision.0.weight": draw(width),
        "modality_heads.vision.2.weight": draw(8, width),
        "modality_postprocessors.text.1.log_logit_scale": draw(1),
        "modality_preprocessors.audio.cls_token": draw(1, 1, 16),
        "modality_trunks.audio.blocks.7.attn.bias_k": draw(1, 1, 16),
        "modality_trunks.text.blocks.0.norm_1.weight": draw(16),
    }
    linears = {"attn.in_proj_": 3 * width, "attn.out_proj.": width, "mlp.fc1.": 2 * width}
    for i in range(blocks):
        for name, rows in linears.items():
            state[f"{trunk}blocks.{i}.{name}weight"] = draw(rows, width)
            state[f"{trunk}blocks.{i}.{name}bias"] = draw(rows)
        state[f"{trunk}blocks.{i}.mlp.fc2.weight"] = draw(width, 2 * width)
        state[f"{trunk}blocks.{i}.mlp.fc2.bias"] = draw(width)
        for norm in ("norm_1", "norm_2"):
            state[f"{trunk}blocks.{i}.{norm}.weight"] = draw(width, mean=1)
            state[f"{trunk}blocks.{i}.{norm}.bias"] = draw(width)
    return state


def imagebind_maps(state: dict[str, Tensor], images: Tensor, heads: int = 16) -> list[Tensor]:
    """ImageBind's vision trunk, step by step: 2-frame stem, class token, positions, norm, pre-norm blocks."""
    pre, trunk = "modality_preprocessors.vision.", "modality_trunks.vision."
    video = images[:, :, None].repeat(1, 1, 2, 1, 1)
    x = F.conv3d(video, state[f"{pre}rgbt_stem.proj.1.weight"], stride=(2, 14, 14))
    (b, c, _, h, w), x = x.shape, x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{pre}cls_token"].expand(b, -1, -1), x], 1)
    x = x + state[f"{pre}pos_embedding_helper.pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (c,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    x, levels = norm(x, f"{trunk}pre_transformer_layer.0"), []
    for i in range(len([key for key in state if key.startswith(trunk) and key.endswith("norm_1.bias")])):
        block = f"{trunk}blocks.{i}."
        y = norm(x, f"{block}norm_1").transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            y, y, y, c, heads,
            state[f"{block}attn.in_proj_weight"], state[f"{block}attn.in_proj_bias"], None, None, False, 0.0,
            state[f"{block}attn.out_proj.weight"], state[f"{block}attn.out_proj.bias"], training=False,
        )  # fmt: skip
        x = x + y.transpose(0, 1)
        y = norm(x, f"{block}norm_2")
        y = F.linear(y, state[f"{block}mlp.fc1.weight"], state[f"{block}mlp.fc1.bias"])
        x = x + F.linear(F.gelu(y), state[f"{block}mlp.fc2.weight"], state[f"{block}mlp.fc2.bias"])
        levels.append(x[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
    return levels


def test_imagebind_parity() -> None:
    state = imagebind_state()
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    model = convert_imagebind_trunk(state)
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 64, 3)
    assert (config.patch_size, config.image_size, config.layer_norm_eps) == (14, 56, 1e-6)
    assert not model.training and torch.equal(last_norm(model).weight, torch.ones(32))
    assert difference(maps(model, images), imagebind_maps(state, images)) <= 1e-5
    kernel = "modality_preprocessors.vision.rgbt_stem.proj.1.weight"
    one_frame = state | {kernel: state[kernel] * torch.tensor([1.0, 0.0])[:, None, None]}
    assert difference(maps(model, images), imagebind_maps(one_frame, images)) > 1e-2


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_imagebind_file(tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"imagebind.{suffix}", imagebind_state()
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    expected, loaded = convert_imagebind_trunk(state).state_dict(), from_imagebind(path).state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_imagebind_keys_must_match() -> None:
    state = imagebind_state()
    block = "modality_trunks.vision.blocks.1."
    holed = {key: tensor for key, tensor in state.items() if key != f"{block}mlp.fc2.bias"}
    with refused(match=re.escape(f"missing {block}mlp.fc2.bias; unknown none; expected exactly")):
        convert_imagebind_trunk(holed)
    with refused(match=re.escape(f"missing none; unknown {block}attn.bias_k;")):
        convert_imagebind_trunk(state | {f"{block}attn.bias_k": torch.zeros(1, 1, 32)})
    audio = {key: tensor for key, tensor in state.items() if ".audio." in key}
    with refused(match=r"missing modality_preprocessors\.vision\.cls_token, .* and 7 more") as error:
        convert_imagebind_trunk(audio)
    assert str(error.value).count("modality_") == 10


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("rgbt_stem.proj.1.weight", (32, 3, 14, 14), r"kernel \(32, 3, 14, 14\) .*\(C, 3, 2, p, p\)"),
        ("rgbt_stem.proj.1.weight", (32, 3, 1, 14, 14), r"patch kernel \(32, 3, 1, 14, 14\)"),
        ("rgbt_stem.proj.1.weight", (24, 3, 2, 14, 14), "a multiple of 16"),
        ("rgbt_stem.proj.1.weight", (32, 4, 2, 14, 14), r"\(32, 4, 14, 14\), expected \(32, 3, 14, 14\)"),
        ("pos_embedding_helper.pos_embed", (17, 32), r"positions \(17, 32\); expected"),
        ("pos_embedding_helper.pos_embed", (1, 19, 32), r"\(19, 32\), expected \(17, 32\)"),
        ("cls_token", (1, 2, 32), r"class_embedding torch.float32 \(64,\), expected \(32,\)"),
    ],
)
def test_imagebind_shapes_must_match(key: str, shape: tuple[int, ...], message: str) -> None:
    state = imagebind_state() | {f"modality_preprocessors.vision.{key}": torch.zeros(shape)}
    with refused(match=message):
        convert_imagebind_trunk(state)


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    expected = "expected a dictionary of tensors and nothing else"
    damaged = {"a.pth": b"hello", "b.pt": b"", "c.safetensors": b"hello", "d.pth": b"PK\3\4"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        reason = r"(cannot be read safely \(.+\)|refused, for it is damaged.*)"
        with refused(match=rf"{re.escape(name)}: {reason}; {expected}"):
            read_checkpoint(tmp_path / name)
    others: list[Any] = [[torch.ones(1)], {"a": 1}, {"state_dict": torch.ones(1)}, torch.ones(2)]
    for other in others:
        torch.save(other, tmp_path / "e.pth")
        with refused(match=rf"e\.pth: got other things than tensors; {expected}"):
            from_imagebind(tmp_path / "e.pth")
    with refused(match=rf"nothing\.pth: no such file; {expected}"):
        from_imagebind(tmp_path / "nothing.pth")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_run(open_clip: Any, tmp_path: Path) -> None:
    path, folder = tmp_path / "trap.pth", tmp_path / "sprung"
    torch.save(imagebind_state() | {"trap": Trap(folder)}, path)
    message = r"trap\.pth: refused, for it asks for the global posix\.mkdir"
    with refused(match=message):
        from_imagebind(path)
    with refused(match=message):
        from_open_clip("tiny", str(path))
    assert not folder.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert folder.exists()
