"""Processes that are at work at once: forked from a server that has imported everything and computed nothing.

A new interpreter needs seconds for the same imports. What is started must be importable by name, as for any process of
``multiprocessing``, and its module must not import ``tests.conftest``, which starts a Hub.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Lets the server import what this process has imported of the project, beside whatever comes next here."""
    ours = [name for name in sys.modules if name.partition(".")[0] in ("adpretrain_hf", "training")]
    lazy = "transformers.models.dinov2.modeling_dinov2"  # seconds, which every process would take
    FORKS.set_forkserver_preload(["pytest", "tests.processes", lazy, *ours])
    forkserver.ensure_running()


def start(program: Callable[..., int | None], *arguments: object, stderr: Path | None = None) -> BaseProcess:
    """Runs a function in a process, and a process group, of its own; what it returns is the exit code.

    Args:
        program: the function.
        arguments: of it.
        stderr: a file for what it says; it is lost by default.
    """
    process = FORKS.Process(target=_run, args=(program, arguments, torch.get_num_threads(), stderr))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """Kills a process together with its data workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet, let alone workers
        process.kill()
    process.join()


def _run(program: Callable[..., int | None], arguments: tuple[object, ...], threads: int, stderr: Path | None) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # of its data workers: the usual one
    torch.set_num_threads(threads)
    if stderr is not None:
        sys.stderr = stderr.open("w", buffering=1, encoding="utf-8")
    sys.exit(program(*arguments))
