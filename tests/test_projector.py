"""Projectors: equal to the authors', their constants computed once, the identity at the start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.bundle.released import from_released, released_key_map
from adpretrain_hf.errors import InputError
from adpretrain_hf.projector import GatedMlp, Projectors, ResidualProjector, SqueezeExcite

CONFIG = ADPretrainConfig(backbone="tiny", hidden_size=48, patch_size=14, layers=(1, 2, 3, 4))


@pytest.fixture
def projectors(released):
    module = Projectors(CONFIG)
    module.load_state_dict({name: tensor.float() for name, tensor in from_released(released).items()})
    return module.requires_grad_(False)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def test_output_equals_the_authors(golden, projectors):
    outputs = projectors([golden[f"projector.in.{level}"] for level in range(4)])
    for level, output in enumerate(outputs):
        expected = golden[f"projector.out.{level}"]
        assert (output - expected).norm() / expected.norm() <= 1e-4


def test_key_map_is_total_in_both_directions(released):
    names = released_key_map(4)
    assert set(names) == set(released)
    assert sorted(names.values()) == sorted(Projectors(CONFIG).state_dict())


def test_released_values_and_precision_stay(released):
    ours = from_released(released)
    for theirs, name in released_key_map(4).items():
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name].flatten(), released[theirs].flatten())
        assert ours[name].shape == Projectors(CONFIG).state_dict()[name].shape


def test_missing_and_surplus_released_keys_are_listed(released):
    damaged = {name: tensor for name, tensor in released.items() if name != "l2_proj.x_ref"} | {"l9_proj.x": 0}
    with pytest.raises(InputError, match=r"missing \['l2_proj.x_ref'\], unexpected \['l9_proj.x'\]"):
        from_released(damaged)


@pytest.mark.parametrize(("channels", "hidden"), [(48, 16), (768, 192), (1024, 256), (1280, 320), (384, 96), (8, 8)])
def test_squeeze_excite_has_the_published_width(channels, hidden):
    assert SqueezeExcite(4 * channels).fc1.out_features == hidden


@pytest.mark.parametrize(("channels", "millions"), [(768, 10.43), (1024, 17.84), (1280, 27.22)])
def test_number_of_parameters_is_the_published_one(channels, millions):
    with torch.device("meta"):
        level = ResidualProjector(channels, 16, 2048)
    assert sum(parameter.numel() for parameter in level.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_without_gradients_the_mlp_gives_the_same_and_leaves_its_input():
    mlp, tokens = randomised(GatedMlp(32)), torch.randn(2, 5, 32)
    expected, before = mlp(tokens), tokens.clone()
    assert expected.requires_grad
    with torch.no_grad():
        again = mlp(tokens)
    assert torch.equal(mlp.requires_grad_(False)(tokens), expected)
    assert torch.equal(again, expected)
    assert torch.equal(tokens, before)


def test_attention_equals_torchs_own():
    level = randomised(ResidualProjector(32, 4, 10))
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": level.attention.in_proj_weight,
            "in_proj_bias": level.attention.in_proj_bias,
            "out_proj.weight": level.attention.out_proj.weight,
            "out_proj.bias": level.attention.out_proj.bias,
        }
    )
    tokens = torch.randn(2, 6, 32)
    context = level.reference_projection(level.reference_tokens).expand(2, -1, -1)
    expected = reference(tokens, context, context)[0]
    got = level.attention(tokens.flatten(0, 1), level.keys_values()).view(2, 6, 32)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 5), heads=st.sampled_from([1, 2, 8]))
def test_a_new_projector_is_the_identity(b, h, w, heads):
    residual = torch.randn(b, 16, h, w)
    assert torch.equal(ResidualProjector(16, heads, 7)(residual), residual)


def test_whether_all_are_the_identity_is_known():
    projectors = Projectors(CONFIG)
    assert projectors.are_identity()
    with torch.no_grad():
        projectors[3].mlp.fc2.bias[5] = 1e-9
    assert not projectors.are_identity()


def test_the_identity_can_be_trained():
    projector = ResidualProjector(16, 4, 7)
    projector(torch.randn(2, 16, 3, 3)).square().sum().backward()
    for last in (projector.attention.out_proj, projector.mlp.fc2):
        assert last.weight.grad.abs().max() > 0


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4))
def test_images_of_a_batch_do_not_influence_each_other(b, h, w):
    level = randomised(ResidualProjector(16, 4, 7)).requires_grad_(False)
    residuals = torch.randn(b, 16, h, w)
    together = level(residuals)
    assert together.shape == (b, 16, h, w)
    for alone, row in zip(residuals, together, strict=True):
        torch.testing.assert_close(level(alone[None])[0], row, atol=1e-5, rtol=1e-4)


def test_output_depends_on_the_input_size():
    level = randomised(ResidualProjector(16, 4, 7)).requires_grad_(False)
    residual = torch.randn(1, 16, 4, 4)
    assert not torch.allclose(level(residual)[..., :2], level(residual[..., :2]), atol=1e-4)


class TestConstants:
    """Keys and values of the reference tokens."""

    @pytest.fixture
    def level(self, monkeypatch):
        level = randomised(ResidualProjector(16, 4, 7))
        compute, level.computed = level._compute_keys_values, 0

        def counted():
            level.computed += 1
            return compute()

        monkeypatch.setattr(level, "_compute_keys_values", counted)
        return level

    def test_computed_once_without_gradients(self, level):
        with torch.no_grad():
            for _ in range(3):
                level(torch.randn(4, 16, 2, 2))
        level.requires_grad_(False)
        level(torch.randn(1, 16, 2, 2))
        assert level.computed == 1

    def test_computed_once_per_batch_in_training(self, level):
        for number in range(1, 3):
            level(torch.randn(4, 16, 2, 2)).sum().backward()
            assert level.computed == number
        assert level.reference_tokens.grad.abs().max() > 0

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_training_step_is_seen_by_the_next_evaluation(self, level, fused):
        residual = torch.randn(2, 16, 3, 3)
        optimiser = torch.optim.Adam(level.parameters(), lr=0.1, fused=fused)
        with torch.no_grad():
            before = level(residual)
        level(residual).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            after = level(residual)
        assert level.computed == 3
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, level(residual).detach(), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_dtype_makes_them_void(self, level, dtype):
        with torch.no_grad():
            level(torch.randn(1, 16, 2, 2))
            assert level.to(dtype)(torch.randn(1, 16, 2, 2, dtype=dtype)).dtype == dtype
        assert level.computed == 2

    def test_load_state_dict_makes_them_void(self, level):
        residual = torch.randn(1, 16, 2, 2)
        other = randomised(ResidualProjector(16, 4, 7), seed=1)
        with torch.no_grad():
            level(residual)
            level.load_state_dict(other.state_dict())
            assert torch.equal(level(residual), other(residual))


def test_cached_and_fresh_constants_give_the_same_output():
    level = randomised(ResidualProjector(16, 4, 7))
    residual = torch.randn(2, 16, 3, 3)
    fresh = level(residual)
    with torch.no_grad():
        cached = level(residual)
    assert torch.equal(fresh.detach(), cached)


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_stays_close_to_float32(cached):
    level = randomised(ResidualProjector(16, 4, 7)).requires_grad_(not cached)
    residual = torch.randn(2, 16, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = level(residual)
    cosine = F.cosine_similarity(low.float().flatten(), level(residual).flatten(), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("shapes", [[(1, 48, 2, 2)] * 3, [(1, 47, 2, 2)] * 4, [(48, 2, 2)] * 4])
def test_maps_that_do_not_fit_are_refused(shapes, projectors):
    with pytest.raises(InputError, match=r"got maps of shapes .*expected 4 of \(B, 48, h, w\)"):
        projectors([torch.zeros(shape) for shape in shapes])


def test_levels_are_reached_by_index():
    projectors = Projectors(CONFIG)
    assert len(projectors) == 4 and projectors[2] is list(projectors)[2]
    assert isinstance(projectors[3], ResidualProjector)
