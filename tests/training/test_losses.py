"""Losses: the authors' values and gradients, a naive restatement in float64, several processes, and centres."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.processes import start
from tests.training.patch_losses import angle_loss, norm_loss
from training import losses
from training.losses import level_losses
from training.run.distributed import process_group

QUICK = settings(max_examples=60, deadline=None, database=None)
NORM_CASES = ("mixed", "nonormal", "noanomaly", "large", "tiny")
LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda features, labels: angle_loss(features, features.flip(1), labels, center=None),
    norm_loss,
]

batches = st.tuples(
    st.lists(st.booleans(), min_size=1, max_size=24), st.integers(2, 12), st.integers(0, 1000), st.floats(0.01, 30)
)


def random_batch(labels: list[bool], channels: int, seed: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (scale * torch.randn(len(labels), channels, generator=generator) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_(), torch.tensor(labels)


def naive_angle(first: Tensor, second: Tensor, labels: Tensor, center: Tensor, temperature: float) -> Tensor:
    """All 2N x 2N similarities, row by row, in float64."""
    rows = torch.cat([first, second]).double() - center.double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    similarity, labels = unit @ unit.T / temperature, torch.cat([labels, labels])
    n, terms = len(first), []
    for i in range(2 * n):
        opposite = similarity[i][labels != labels[i]]
        if not len(opposite):
            return 0 * rows.sum()
        terms.append(opposite.exp().sum().log() - similarity[i, (i + n) % (2 * n)])
    return sum(terms) / len(terms)  # type: ignore[return-value]


def naive_norm(features: Tensor, labels: Tensor, r_max: float, margin: float) -> Tensor:
    """One patch after the other, in float64."""
    lengths = (features.double().norm(dim=1) + 1).sqrt() - 1
    normal, anomalous = list(lengths[~labels]), list(lengths[labels])
    r = min([0.9 * one.item() for one in anomalous] + [r_max])
    groups = (
        [a - r for a in normal if a > r],
        [0.99 * r - a for a in normal if a < 0.99 * r],
        [r + margin - a for a in anomalous if a < r + margin],
    )
    means = [sum((1 + d.exp()).log() * math.exp(d.item()) for d in group) / len(group) for group in groups if group]
    return sum(means) + 0 * lengths.sum()  # type: ignore[return-value]


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def assert_equal(loss: Tensor, expected: Tensor, *inputs: Tensor, rtol: float = 1e-4) -> None:
    """Value and gradients, relative to the largest of each, and to the length of the shortest input."""
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=rtol)
    rounding = 1e-6 / min(features.detach().norm(dim=1).min().item() for features in inputs)
    for got, wanted in zip(gradients(loss, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=rtol * wanted.abs().max().item() + rounding, rtol=0)


# The authors' code


@pytest.mark.parametrize("kind", ["center", "nocenter"])
def test_angle_loss_is_the_authors(golden: dict[str, Tensor], kind: str) -> None:
    first, second = (golden[f"angle.{name}"].clone().requires_grad_() for name in ("e1", "e2"))
    center = golden["angle.center"] if kind == "center" else None
    loss = angle_loss(first, second, golden["angle.mask"].bool(), center=center)
    torch.testing.assert_close(loss, golden[f"angle.{kind}.loss"][0], atol=1e-6, rtol=1e-6)
    for name, gradient in zip(("grad1", "grad2"), gradients(loss, first, second), strict=True):
        torch.testing.assert_close(gradient, golden[f"angle.{kind}.{name}"], atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("case", NORM_CASES)
def test_norm_loss_is_the_authors(golden: dict[str, Tensor], case: str) -> None:
    features = golden[f"norm.{case}.features"].clone().requires_grad_()
    loss = norm_loss(features, golden[f"norm.{case}.mask"].bool())
    torch.testing.assert_close(loss, golden[f"norm.{case}.loss"][0], atol=1e-6, rtol=1e-6)
    expected = golden[f"norm.{case}.grad"]
    atol = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(gradients(loss, features)[0], expected, atol=atol, rtol=1e-5)


# The formulas


@QUICK
@example(batch=([True, False], 2, 0, 1.0))
@given(batch=batches)
def test_angle_loss_is_its_formula(batch: tuple[list[bool], int, int, float]) -> None:
    first, second, labels = random_batch(*batch)
    center = 0.3 * batch[3] * torch.ones(batch[1])
    loss = angle_loss(first, second, labels, center=center, temperature=0.2)
    assert_equal(loss, naive_angle(first, second, labels, center, 0.2), first, second, rtol=1e-3)


@QUICK
@given(batch=batches)
def test_norm_loss_is_its_formula(batch: tuple[list[bool], int, int, float]) -> None:
    features, _, labels = random_batch(*batch)
    assert_equal(norm_loss(features, labels, r_max=0.3, margin=0.5), naive_norm(features, labels, 0.3, 0.5), features)


@pytest.mark.parametrize("block", [1, 7, 40, 200])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    labels = [number % 3 == 0 for number in range(30)]
    first, second, mask = random_batch(labels, 8, 0, 1.0)
    whole = angle_loss(first, second, mask, center=None)
    expected = gradients(whole, first, second)
    monkeypatch.setattr(losses, "_BLOCK", block)
    parts = angle_loss(first, second, mask, center=None)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients(parts, first, second), expected, atol=1e-7, rtol=1e-5)


# Batches at the edge


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("labels", [[True], [False], [True] * 5, [False] * 5, [True, False]])
def test_any_labels_give_a_finite_loss_with_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], labels: list[bool]
) -> None:
    features, _, mask = random_batch(labels, 6, 1, 0.3)
    value = loss(features, mask)
    assert value.isfinite() and gradients(value, features)[0].isfinite().all()


@pytest.mark.parametrize("labels", [[True] * 4, [False] * 4])
def test_angle_loss_is_zero_without_two_labels(labels: list[bool]) -> None:
    first, second, mask = random_batch(labels, 6, 1, 0.3)
    loss = angle_loss(first, second, mask, center=None)
    assert loss == 0 and all(not gradient.any() for gradient in gradients(loss, first, second))


@pytest.mark.parametrize("loss", LOSSES)
def test_vectors_of_length_zero_have_finite_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    features[0] = features[2] = 0
    features.requires_grad_()
    value = loss(features, torch.tensor([False, False, True, True]))
    assert value.isfinite() and gradients(value, features)[0].abs().max() < 100


@pytest.mark.parametrize("length", [400.0, 6500.0, 1e6, 1e12])
def test_long_features_do_not_overflow(length: float) -> None:
    features = torch.full((8192, 4), length / 2, requires_grad=True)
    loss = norm_loss(features, torch.zeros(8192, dtype=torch.bool))
    gradient = gradients(loss, features)[0]
    assert loss.isfinite() and gradient.isfinite().all() and (gradient.square().isfinite()).all()
    if length == 400:  # below the cap, as without one
        distance = math.sqrt(401) - 1 - 0.4
        assert loss.item() == pytest.approx(distance * math.exp(distance), rel=1e-4)


# Precision


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    features, _, labels = random_batch([True, False] * 10, 32, 0, 0.2)
    rounded = features.detach().to(dtype).requires_grad_()
    exact = rounded.detach().float().requires_grad_()
    value, expected = loss(rounded, labels), loss(exact, labels)
    assert value.dtype == torch.float32 and value == expected
    gradient = gradients(value, rounded)[0]
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, gradients(expected, exact)[0].to(dtype), atol=0, rtol=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    features, _, labels = random_batch([True, False] * 10, 32, 0, 0.2)
    expected = loss(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(features, labels)
    assert value == expected
    torch.testing.assert_close(gradients(value, features), gradients(expected, features), atol=0, rtol=0)


# Several processes: the value of one process with all patches, and its gradients in sum


PROCESSES, OWN, CHANNELS = 3, 8, 6
BLOCKS = (2**24, 1)
LABELS = {
    "mixed": [n % 3 == 0 for n in range(PROCESSES * OWN)],
    "one anomalous patch": [n == 13 for n in range(PROCESSES * OWN)],
    "anomalous in one process alone": [n < OWN for n in range(PROCESSES * OWN)],
    "normal": [False] * PROCESSES * OWN,
}


def make_views():
    torch.manual_seed(0)
    return torch.randn(2, PROCESSES * OWN, CHANNELS)


def compute(views, labels):
    first, second = views.requires_grad_()
    center = torch.linspace(-0.1, 0.1, CHANNELS)
    parts = [angle_loss(first, second, torch.tensor(labels), center=center)]
    parts += [norm_loss(view, torch.tensor(labels)) for view in (first, second)]
    sum(parts).backward()
    return torch.stack(parts).detach(), views.grad


def work(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    own = make_views()[:, rank * OWN : (rank + 1) * OWN]
    with process_group():
        for block in BLOCKS:
            losses._BLOCK = block
            found = {name: compute(own.clone(), labels) for name, labels in LABELS.items()}
            torch.save(found, folder / f"{block}.{rank}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of several processes computed, for all ``BLOCKS``."""
    folder, port = tmp_path_factory.mktemp("shared"), free_port()
    processes = [start(work, rank, folder, port) for rank in range(PROCESSES)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    return folder


@pytest.mark.parametrize("block", BLOCKS)
def test_processes_share_the_work_and_agree(shared, block):
    found = [torch.load(shared / f"{block}.{rank}") for rank in range(PROCESSES)]
    for name, labels in LABELS.items():
        expected, gradient = compute(make_views(), labels)
        for values, _ in (part[name] for part in found):
            torch.testing.assert_close(values, expected)
        torch.testing.assert_close(torch.cat([part[name][1] for part in found], dim=1), gradient)


# Patches that are ignored, and both losses over the levels as a training step takes them


@QUICK
@given(batch=batches, ignored=st.integers(0, 2**24 - 1))
def test_ignored_patches_are_as_if_they_were_not_there(batch: tuple, ignored: int) -> None:
    first, second, labels = random_batch(*batch)
    left_out = torch.tensor([bool(ignored >> place & 1) for place in range(len(labels))])
    if left_out.all():
        return
    kept = [tensor[~left_out] for tensor in (first, second, labels)]
    whole = angle_loss(first, second, labels, center=None, ignored=left_out) + norm_loss(
        first, labels, ignored=left_out
    )
    torch.testing.assert_close(whole, angle_loss(*kept, center=None) + norm_loss(kept[0], kept[2]))
    whole.backward()
    assert not first.grad[left_out].any()


def test_level_losses_are_those_of_every_level_and_view() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(4, 6, 3, 5, generator=generator) for _ in range(3)]  # 2 B, C, h, w
    labels = torch.randint(3, (2, 2, 3, 5), generator=generator).byte()
    centers = torch.randn(3, 6, generator=generator)
    angle, norm = level_losses(features, labels, centers, temperature=0.2, margin=0.5)
    (anomalous, norm_anomalous), (ignored, norm_ignored) = (
        (labels == 1).flatten(1).unbind(),
        (labels == 2).flatten(1).unbind(),
    )
    expected_angle, expected_norm = torch.zeros(()), torch.zeros(())
    for level, center in zip(features, centers, strict=True):
        first, second = (view.permute(0, 2, 3, 1).flatten(0, 2) for view in level.chunk(2))
        expected_angle += angle_loss(first, second, anomalous, center=center, temperature=0.2, ignored=ignored)
        for view in (first, second):
            expected_norm += norm_loss(view, norm_anomalous, margin=0.5, ignored=norm_ignored)
    torch.testing.assert_close(angle, expected_angle)
    torch.testing.assert_close(norm, expected_norm)
