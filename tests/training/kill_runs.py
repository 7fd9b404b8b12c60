"""Starts a run again and again and kills it each time: ``python -m tests.training.kill_runs 20 --output RUN ...``.

Every attempt is a fork of this process, which has imported everything and computed nothing, so that it is at work
within a second. It is killed with SIGKILL at a random moment after that. Exits with 1 if an attempt fails by itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import training.pretrain


def attempt(words: list[str], seconds: float) -> bool:
    """Runs in a child for some seconds; returns whether it was still at work when it was killed, or had finished."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os._exit(training.pretrain.main(words))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> int:
    """Kills as often as the first argument says; the last moments lie past the first checkpoint."""
    number, words = int(sys.argv[1]), sys.argv[2:]
    checkpoint = Path(words[words.index("--output") + 1]) / "checkpoint.safetensors"
    moments = random.Random(0)
    for _ in range(number):
        resume = ["--resume"] if checkpoint.exists() else []
        if not attempt([*words, *resume], moments.uniform(0.5, 4.0)):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
