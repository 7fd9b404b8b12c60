"""Starts a run again and again and kills it each time: ``python -m tests.training.kill_runs 20 --output RUN ...``.

Every attempt is a fork of this process, which has imported everything and computed nothing, so that it is at work
within a second. It is killed with SIGKILL at a random moment after that. Exits with the code of an attempt that fails.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import training.pretrain


def attempt(words: list[str], seconds: float) -> int | None:
    """Runs in a child for some seconds; returns its exit code, or None if it was still at work and was killed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(training.pretrain.main(words))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> int:
    """Kills as often as the first argument says. A run that ends before that is removed and begun anew."""
    number, words = int(sys.argv[1]), sys.argv[2:]
    run = Path(words[words.index("--output") + 1])
    moments, killed = random.Random(0), 0
    while killed < number:
        resume = ["--resume"] if (run / "checkpoint.safetensors").exists() else []
        code = attempt([*words, *resume], moments.uniform(0.5, 4.0))
        if code:
            return code
        killed += code is None
        if code == 0:
            shutil.rmtree(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
