"""ParameterCache: what makes a derived value void, and what does not."""

from __future__ import annotations

import pickle
import threading
from copy import deepcopy

import pytest
import torch
from torch import nn

from adpretrain_hf.cache import ParameterCache
from tests.conftest import make_extractor, random_image


class Doubled(nn.Module):
    """Counts how often the derived value is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0))
        self.cache: ParameterCache[torch.Tensor] = ParameterCache()
        self.computed = 0

    def doubled(self) -> torch.Tensor:
        return self.cache.get([self.weight], self._compute)

    def _compute(self) -> torch.Tensor:
        self.computed += 1
        return 2 * self.weight


def step_of_an_optimiser(module: Doubled) -> None:
    module.weight.grad = torch.ones(6)
    torch.optim.Adam([module.weight], lr=0.1).step()


def fused_step(module: Doubled) -> None:
    module.weight.grad = torch.ones(6)
    torch.optim.AdamW([module.weight], lr=0.1, fused=True).step()


def in_place(module: Doubled) -> None:
    with torch.no_grad():
        module.weight[2] += 1


CHANGES = {
    "optimiser": step_of_an_optimiser,
    "fused optimiser": fused_step,
    "in place": in_place,
    "load_state_dict": lambda module: module.load_state_dict({"weight": torch.ones(6)}),
    "load_state_dict, assigned": lambda module: module.load_state_dict({"weight": torch.ones(6)}, assign=True),
    "new parameter": lambda module: setattr(module, "weight", nn.Parameter(torch.ones(6))),
    "data replaced": lambda module: setattr(module.weight, "data", torch.ones(6)),
    "dtype": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_it_void(change):
    module = Doubled()
    module.doubled()
    CHANGES[change](module)
    value = module.doubled()
    assert module.computed == 2
    assert value.dtype == module.weight.dtype
    assert torch.equal(value, 2 * module.weight)


def test_unchanged_it_is_computed_once():
    module = Doubled()
    values = [module.doubled() for _ in range(3)]
    module.train(), module.eval(), module.float(), module.cpu()
    with torch.inference_mode():
        values.append(module.doubled())
    assert module.computed == 1
    assert all(value is values[0] for value in values)


def test_data_replaced_twice_at_the_same_address_is_noticed():
    module = Doubled()
    for number in range(20):
        module.weight.data = torch.full((6,), float(number))
        assert torch.equal(module.doubled(), torch.full((6,), 2.0 * number))


def test_it_has_no_gradient_and_may_meet_autograd_even_if_made_in_inference_mode():
    module = Doubled()
    with torch.inference_mode():
        module.doubled()
    value = module.doubled()
    assert not value.requires_grad
    other = torch.ones(6, requires_grad=True)
    (value * other).sum().backward()
    assert torch.equal(other.grad, value)


def test_autocast_does_not_lower_its_precision():
    linear = nn.Linear(8, 8)
    cache: ParameterCache[torch.Tensor] = ParameterCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cache.get(list(linear.parameters()), lambda: linear(torch.ones(1, 8)))
    assert value.dtype == torch.float32


def test_inference_tensors_have_no_version_and_are_never_kept():
    with torch.inference_mode():
        module = Doubled()
        first = module.doubled()
        module.weight.add_(1)
        assert not torch.equal(first, module.doubled())


def test_clear_is_for_writes_through_data():
    module = Doubled()
    module.doubled()
    module.weight.data.add_(1)
    module.cache.clear()
    assert torch.equal(module.doubled(), 2 * module.weight)


def test_copies_and_pickles_are_void(tiny_folder):
    extractor = make_extractor(tiny_folder)
    before = len(pickle.dumps(extractor.projectors))
    extractor.set_reference([random_image(0)]).score([random_image(1)])
    assert len(pickle.dumps(extractor.projectors)) == before
    copy = deepcopy(extractor)
    assert copy.projectors[0]._cache._entry is None and extractor.projectors[0]._cache._entry is not None
    assert torch.equal(copy.score([random_image(1)]).scores, extractor.score([random_image(1)]).scores)


def test_threads_get_the_same_value():
    module = Doubled()
    values: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: values.append(module.doubled())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, 2 * module.weight) for value in values)
