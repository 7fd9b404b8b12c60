"""Checkpoints: all that a run needs to go on as if it had never stopped, in one safetensors file.

No state of a random generator is among it: all that is drawn follows from the seed, the epoch, the step and the image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.files import atomic_path

_FORMAT = "adpretrain_checkpoint_1"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: that is running, counted from 0.
        step: optimiser steps of this epoch that are done.
        history: one record for every epoch that is done.
        best: for every variant, the epoch that it was taken from and its score.
        baseline: validation scores of the untrained residuals, by detector and metric.
        residual_scale: of the extractor's configuration, measured when the run began.
        data: digest of the images' names; a run goes on with the same data, wherever they lie.
        steps_done: optimiser steps of all epochs.
        seconds: of training so far, over all starts.
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    residual_scale: list[float] = field(default_factory=list)
    data: str = ""
    steps_done: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    centers: Tensor,
    averaged: nn.Module | None = None,
) -> None:
    """Writes a checkpoint; the one that was there stays whole until the new one is.

    Args:
        path: the file.
        progress: where the run stands.
        model: whose weights are trained.
        optimizer: its state per parameter is kept; its learning rate is a function of the step.
        centers: (L, C), the normal centres.
        averaged: the moving average of the weights, if there is one.

    Raises:
        OSError: it cannot be written, for example because the disk is full; the one that was there is untouched.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    if averaged is not None:
        tensors |= {f"averaged.{name}": tensor for name, tensor in averaged.state_dict().items()}
    tensors["centers"] = centers
    # Copies, for safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_FORMAT: json.dumps({"progress": vars(progress)})})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: nn.Module | None = None
) -> tuple[Progress, Tensor]:
    """Puts a checkpoint's state into models and optimiser; returns progress and centres (L, C).

    Raises:
        InputError: not a checkpoint, damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        model.load_state_dict(_below(tensors, "model."))
        optimizer.load_state_dict(_optimizer_state(optimizer, _below(tensors, "optimizer.")))
        if averaged is not None:
            averaged.load_state_dict(_below(tensors, "averaged."))
        return Progress(**about["progress"]), tensors["centers"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not a checkpoint of this run: {error}") from error


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
