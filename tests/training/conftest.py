"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training import synthetic

SYNTHETIC: dict[str, Any] = {"categories": 2, "normals": 5, "defects_per_family": 1, "seed": 5}


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of a material and a part, 5 normal samples and one defective sample of each family; to be read alone."""
    return synthetic.generate(tmp_path_factory.mktemp("synthetic") / "set", **SYNTHETIC)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks run faster in one thread, above all where several processes share the cores; subprocesses too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
