"""Writes images and masks, whatever layout they lie in, to the Hub as one data set of Parquet files:

python -m training.data push OWNER/NAME --data my_products/ [--resolution 512] [--no-strict] [--public]
"""

import argparse
import sys
from collections.abc import Sequence

from adpretrain_hf.errors import run_program
from training.data.sources import push_sources


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, see ``run_program``."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    push = verbs.add_parser("push", help="push a data set to the Hub as Parquet")
    push.add_argument("repository", help="owner/name on the Hub; made if it is not there")
    push.add_argument("--data", nargs="+", required=True, help="sources, as of training.pretrain")
    push.add_argument("--resolution", default="512", help="which of RealIAD's resolutions")
    push.add_argument("--no-strict", dest="strict", action="store_false", help="as of training.pretrain")
    push.add_argument("--public", action="store_true", help="a new repository is private by default")
    args = parser.parse_args(argv)

    def run() -> int:
        options = {"resolution": args.resolution, "strict": args.strict, "public": args.public}
        print(push_sources(args.data, args.repository, **options))
        return 0

    return run_program("data", run)


if __name__ == "__main__":
    sys.exit(main())
