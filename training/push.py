"""Pushes the bundle of a finished run to the Hub: ``python -m training.push RUN_DIR OWNER/NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adpretrain_hf.bundle import LAYOUT, BundlePusher
from adpretrain_hf.errors import InputError, run_program
from training.run.folder import RunFolder


def push_run(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """Pushes a run's bundle, all variants in one commit, and returns the commit's URL.

    Args:
        folder: of the run.
        repository: ``owner/name``; made if it is not there.
        public: leave the visibility to the owner's default; otherwise a new repository is private, and one that is
            public is refused.

    Raises:
        InputError: the run has no bundle yet.
        BundleError: no access, no connection, or a public repository.
    """
    run = RunFolder(folder)
    if not (run.bundle / LAYOUT.config).is_file():
        raise InputError(f"the run in {folder} is not finished: there is no bundle yet. Finish it with --resume")
    return BundlePusher(run.bundle, repository, private=None if public else True).push("Upload pretrained projectors")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, see ``run_program``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("repository", help="owner/name on the Hub; made if it is not there")
    parser.add_argument("--public", action="store_true", help="push to a public repository; private by default")
    args = parser.parse_args(argv)

    def run() -> int:
        print(push_run(args.run, args.repository, public=args.public))
        return 0

    return run_program("push", run)


if __name__ == "__main__":
    sys.exit(main())
