"""ImageBind's trunk, converted, against its steps written out, and files that are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from adpretrain_hf import ADPretrainConfig, ADPretrainFeatureExtractor
from adpretrain_hf.backbones import imagebind
from adpretrain_hf.backbones.imagebind import from_imagebind
from adpretrain_hf.backbones.pickles import read_checkpoint
from adpretrain_hf.errors import InputError
from tests.backbones.converted import Trap, difference, maps


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


def converted(state: dict[str, Tensor], folder: Path) -> CLIPVisionModel:
    torch.save(state, folder / "imagebind.pth")
    return from_imagebind(folder / "imagebind.pth")


def test_imagebind_parity(tmp_path: Path) -> None:
    state = imagebind_state()
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    model = converted(state, tmp_path)
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 64, 3)
    assert (config.patch_size, config.image_size, config.layer_norm_eps) == (14, 56, 1e-6)
    assert not model.training and torch.equal(model.post_layernorm.weight, torch.ones(32))
    assert difference(maps(model, images), imagebind_maps(state, images)) <= 1e-5
    kernel = "modality_preprocessors.vision.rgbt_stem.proj.1.weight"
    one_frame = state | {kernel: state[kernel] * torch.tensor([1.0, 0.0])[:, None, None]}
    assert difference(maps(model, images), imagebind_maps(one_frame, images)) > 1e-2


def test_the_sizes_are_told_without_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(imagebind_state(), tmp_path / "imagebind.pth")
    built: list[object] = []
    build = imagebind.build_clip_vision_model
    monkeypatch.setattr(imagebind, "build_clip_vision_model", lambda *given: built.append(given) or build(*given))
    source = f"imagebind:{tmp_path / 'imagebind.pth'}"
    config = ADPretrainConfig.from_backbone(source, num_heads=4)
    assert (config.hidden_size, config.patch_size, config.layers, config.image_size) == (32, 14, (1, 2, 3), 56)
    assert config.backbone == "imagebind:imagebind.pth" and not built
    extractor = ADPretrainFeatureExtractor.from_backbone(source, num_heads=4, num_reference_tokens=8)
    assert len(built) == 1 and extractor.backbone.hidden_size == 32


def test_safetensors_give_the_same(tmp_path: Path) -> None:
    state = imagebind_state()
    save_file(state, tmp_path / "imagebind.safetensors")
    expected = converted(state, tmp_path).state_dict()
    loaded = from_imagebind(tmp_path / "imagebind.safetensors").state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_imagebind_keys_must_match(tmp_path: Path) -> None:
    state = imagebind_state()
    block = "modality_trunks.vision.blocks.1."
    holed = {key: tensor for key, tensor in state.items() if key != f"{block}mlp.fc2.bias"}
    with pytest.raises(InputError, match=re.escape(f"missing ['{block}mlp.fc2.bias'], unexpected []")):
        converted(holed, tmp_path)
    with pytest.raises(InputError, match=re.escape(f"missing [], unexpected ['{block}attn.bias_k']")):
        converted(state | {f"{block}attn.bias_k": torch.zeros(1, 1, 32)}, tmp_path)
    audio = {key: tensor for key, tensor in state.items() if ".audio." in key}
    message = r"missing \['modality_preprocessors\.vision\.cls_token', .*\], unexpected \[\]"
    with pytest.raises(InputError, match=message):
        converted(audio, tmp_path)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("rgbt_stem.proj.1.weight", (32, 3, 14, 14), r"kernel \(32, 3, 14, 14\) .*\(C, 3, 2, p, p\)"),
        ("rgbt_stem.proj.1.weight", (32, 3, 1, 14, 14), r"patch kernel \(32, 3, 1, 14, 14\)"),
        ("rgbt_stem.proj.1.weight", (24, 3, 2, 14, 14), "a multiple of 16"),
        ("rgbt_stem.proj.1.weight", (32, 4, 2, 14, 14), r"\(32, 4, 14, 14\), expected \(32, 3, 14, 14\)"),
        ("pos_embedding_helper.pos_embed", (17, 32), r"positions \(17, 32\); expected"),
        ("pos_embedding_helper.pos_embed", (1, 19, 32), r"\(19, 32\), expected \(17, 32\)"),
        ("cls_token", (1, 2, 32), r"class_embedding: got \(64,\), expected \(32,\)"),
    ],
)
def test_imagebind_shapes_must_match(key: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    state = imagebind_state() | {f"modality_preprocessors.vision.{key}": torch.zeros(shape)}
    with pytest.raises(InputError, match=message):
        converted(state, tmp_path)


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    expected = "expected a dictionary of tensors and nothing else"
    damaged = {"a.pth": b"hello", "b.pt": b"", "c.safetensors": b"hello", "d.pth": b"PK\3\4"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        reason = rf": (cannot be read safely \(.+\)|refused, for it is damaged.*); {expected}"
        reason = " is not a whole safetensors file" if name.endswith("safetensors") else reason
        with pytest.raises(InputError, match=re.escape(name) + reason):
            read_checkpoint(tmp_path / name)
    others: list[Any] = [[torch.ones(1)], {"a": 1}, {"state_dict": torch.ones(1)}, torch.ones(2)]
    for other in others:
        torch.save(other, tmp_path / "e.pth")
        with pytest.raises(InputError, match=rf"e\.pth: got other things than tensors; {expected}"):
            from_imagebind(tmp_path / "e.pth")
    with pytest.raises(InputError, match=rf"nothing\.pth: no such file; {expected}"):
        from_imagebind(tmp_path / "nothing.pth")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path, folder = tmp_path / "trap.pth", tmp_path / "sprung"
    torch.save(imagebind_state() | {"trap": Trap(folder)}, path)
    with pytest.raises(InputError, match=r"trap\.pth: refused, for it asks for the global posix\.mkdir"):
        from_imagebind(path)
    assert not folder.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert folder.exists()
