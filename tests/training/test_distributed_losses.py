"""The losses under several processes: the value of one process with all patches, and its gradients in sum."""

import os
import socket

import pytest
import torch
from torch import multiprocessing

from training import losses
from training.distributed import process_group

PROCESSES, OWN, CHANNELS = 3, 8, 6
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
    parts = [losses.angle_loss(first, second, torch.tensor(labels), center=center)]
    parts += [losses.norm_loss(view, torch.tensor(labels)) for view in (first, second)]
    sum(parts).backward()
    return torch.stack(parts).detach(), views.grad


def work(rank, folder, block, port):
    losses._BLOCK = block
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    own = make_views()[:, rank * OWN : (rank + 1) * OWN]
    with process_group():
        torch.save({name: compute(own.clone(), labels) for name, labels in LABELS.items()}, folder / f"{rank}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("block", [2**24, 1])
def test_processes_share_the_work_and_agree(tmp_path, block):
    multiprocessing.spawn(work, (tmp_path, block, free_port()), nprocs=PROCESSES)
    found = [torch.load(tmp_path / f"{rank}") for rank in range(PROCESSES)]
    for name, labels in LABELS.items():
        expected, gradient = compute(make_views(), labels)
        for values, _ in (part[name] for part in found):
            torch.testing.assert_close(values, expected)
        torch.testing.assert_close(torch.cat([part[name][1] for part in found], dim=1), gradient)
