"""``adpretrain push``: a bundle to the Hub."""

import argparse
from pathlib import Path

HELP = "push a bundle to the Hub in one commit"
EXAMPLES = """\
  adpretrain push my-bundle your-name/my-bundle --private --tag v1
  adpretrain push my-bundle your-name/my-bundle --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle, with all its variants")
    parser.add_argument("repository", help="owner/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it private, and refuse one that is public")
    parser.add_argument("--branch", help="made if it is not there; main by default")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to the branch")
    parser.add_argument("--tag", help="name to give to the commit")
    parser.add_argument("--force", action="store_true", help="also where the repository holds something else")
    parser.add_argument("--message", default="Upload bundle", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be sent")


def run(args: argparse.Namespace) -> int:
    """Pushes a bundle to the Hub, or says what would be sent."""
    from adpretrain_hf.bundle import BundlePusher

    where = {"private": args.private or None, "branch": args.branch, "force": args.force}
    pusher = BundlePusher(args.bundle, args.repository, **where)
    if not args.dry_run:
        print(pusher.push(args.message, create_pr=args.create_pr, tag=args.tag))
        return 0
    plan = pusher.plan()
    for name, size in plan.send.items():
        print(f"send    {size:>14,} bytes  {name}")
    for name in plan.delete:
        print(f"delete  {'':>14}        {name}")
    print(f"{len(plan.send)} files, {sum(plan.send.values()):,} bytes; {len(plan.keep)} are there already")
    return 0
