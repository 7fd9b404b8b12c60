"""UniAD's network: what a patch may see, the jitter, and that it learns to tell anomalies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adpretrain_hf.errors import InputError
from training.evaluation.metrics import auroc

pytest.importorskip("anomalib")
from adpretrain_hf.integrations.anomalib.uniad import UniadModel, neighbor_mask

SMALL = {"hidden_dim": 16, "num_heads": 2, "num_layers": 1, "feedforward_dim": 32}


def test_mask_covers_the_neighbourhood_and_nothing_else():
    mask = neighbor_mask((6, 8), (3, 5))
    for query in range(48):
        for key in range(48):
            rows, columns = abs(query // 8 - key // 8), abs(query % 8 - key % 8)
            assert mask[query, key] == (rows <= 1 and columns <= 2)


@given(h=st.integers(2, 16), w=st.integers(2, 16), size=st.sampled_from([1, 3, 7, 31]))
def test_every_patch_sees_some_other(h, w, size):
    mask = neighbor_mask((h, w), (size, size))
    assert mask.shape == (h * w, h * w)
    assert mask.diagonal().all()
    assert not mask.all(dim=1).any()


@pytest.mark.parametrize(("grid", "size"), [((1, 8), (3, 3)), ((8, 8), (4, 3))])
def test_grids_and_neighbourhoods_that_cannot_be_are_refused(grid, size):
    with pytest.raises(InputError, match="expected at least 2 rows and columns, and a neighbourhood of odd sides"):
        neighbor_mask(grid, size)


def test_attention_takes_nothing_from_the_neighbourhood():
    torch.manual_seed(0)
    model = UniadModel(4, (8, 8), neighbor_size=(3, 3), **SMALL).eval()
    queries, context = torch.randn(1, 64, 16), torch.randn(1, 64, 16, requires_grad=True)
    far = torch.randn(1, 64, 16)
    for layer, contexts in (
        (model.encoder[0], [context]),
        (model.decoder[0], [context, far]),
        (model.decoder[0], [far, context]),
    ):
        context.grad = None
        layer(queries, contexts, model.positions, model.mask)[0, 27, :8].sum().backward()  # row 3, column 3
        gradient = context.grad[0].abs().sum(dim=-1).view(8, 8)
        assert (gradient[2:5, 2:5] == 0).all()
        gradient[2:5, 2:5] = 1
        assert (gradient > 0).all()


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 9), h=st.integers(2, 5), w=st.integers(2, 5))
def test_shapes(b, c, h, w):
    model = UniadModel(c, (h, w), **SMALL)
    features = torch.randn(b, c, h, w)
    assert model.reconstruct(features).shape == features.shape
    assert model.loss([features]).shape == ()
    maps = model.eval()([features], (7, 9))
    assert maps.shape == (b, 7, 9)
    assert torch.equal(maps, model([features], (7, 9)))


def test_another_grid_is_refused():
    with pytest.raises(InputError, match=r"got features on a grid of \(4, 5\) patches, expected \(4, 4\)"):
        UniadModel(2, (4, 4), **SMALL).loss([torch.randn(1, 2, 4, 5)])


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(InputError, match="got hidden_dim 16, expected a multiple of num_heads, 3"):
        UniadModel(2, (4, 4), **SMALL | {"num_heads": 3})


def test_jitter_has_the_stated_deviation():
    torch.manual_seed(0)
    model = UniadModel(50, (2, 2), jitter_scale=20.0, **SMALL)
    lengths = torch.tensor([0.0, 0.5, 1.0, 3.0])  # each patch is jittered in proportion to its own
    tokens = (lengths / 50**0.5)[:, None].expand(2000, 4, 50)
    noise = model._jitter(tokens) - tokens
    assert noise.std(dim=(0, 2)).tolist() == pytest.approx((20 * lengths / 50).tolist(), rel=0.02)
    assert noise.mean(dim=(0, 2)).tolist() == pytest.approx([0, 0, 0, 0], abs=0.02)


def test_only_training_jitters_and_the_clean_features_are_the_target():
    torch.manual_seed(0)
    model = UniadModel(6, (4, 4), dropout=0.0, **SMALL)
    features = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        assert not torch.equal(model.reconstruct(features), model.reconstruct(features))
        jittered = torch.random.get_rng_state()
        reconstruction = model.reconstruct(features)
        torch.random.set_rng_state(jittered)
        levels = features.split([2, 4], dim=1)
        torch.testing.assert_close(model.loss(levels), (reconstruction - features).pow(2).mean())
        model.eval()
        expected = (model.reconstruct(features) - features).pow(2).sum(dim=1).sqrt()
        torch.testing.assert_close(model(levels, (4, 4)), expected)


def test_exports_agree(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = UniadModel(6, (4, 4), **SMALL).eval()
    features = torch.randn(3, 6, 4, 4)
    batch = {"levels": [{0: torch.export.Dim("batch")}], "size": (None, None)}
    program = torch.export.export(model, ([features[:2]], (8, 8)), dynamic_shapes=batch)
    expected = model([features], (8, 8))
    torch.testing.assert_close(program.module()([features], (8, 8)), expected)
    torch.onnx.export(program, ([features[:2]], (8, 8)), tmp_path / "uniad.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "uniad.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: features.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), atol=1e-5, rtol=1e-4)


def test_features_of_unit_length_are_not_drowned_at_the_start():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, 384, 4, 4), dim=1)
    assert UniadModel(384, (4, 4)).eval().loss([features]) < 1.5 * features.pow(2).mean()


def test_all_parameters_learn():
    model = UniadModel(6, (4, 4), **SMALL)
    model.loss([torch.randn(2, 6, 4, 4)]).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_anomalous_patches_are_reconstructed_worse():
    torch.manual_seed(0)
    model = UniadModel(12, (6, 6), jitter_scale=2.0, **SMALL | {"hidden_dim": 32})
    pattern = torch.randn(3, 12, 6, 6)  # three categories
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        normal = pattern[torch.randint(3, (8,))]
        optimizer.zero_grad()
        model.loss([normal + 0.1 * torch.randn_like(normal)]).backward()
        optimizer.step()
    test = pattern[torch.randint(3, (40,))] + 0.1 * torch.randn(40, 12, 6, 6)
    is_anomalous = torch.zeros(40, 6, 6, dtype=torch.bool)
    is_anomalous[:, 2:4, 2:4] = True
    test = torch.where(is_anomalous[:, None], torch.randn_like(test), test)
    with torch.no_grad():
        assert auroc(model.eval()([test], (6, 6)), is_anomalous) > 0.95
