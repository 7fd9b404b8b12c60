"""``adpretrain watch``: scores of images as they arrive in a folder, until it is told to stop."""

import argparse
from pathlib import Path

from adpretrain_hf.cli.arguments import add_bundle, add_judgement, add_references, seconds

HELP = "score images as they arrive in a folder"
EXAMPLES = """\
  adpretrain watch hub_cards/adpretrain-dinov2-small camera/ --reference screw.safetensors --output results/
  adpretrain watch my-bundle camera/ --reference screw.safetensors --output results/ --false-alarms 0.001
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_bundle(parser)
    parser.add_argument("folder", type=Path, help="where the images arrive, in folders of their own or not")
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        required=True,
        help="normal images: a folder, files, or a bank made by `adpretrain reference`",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; a stopped service goes on in it"
    )
    add_judgement(parser)
    add_references(parser)
    parser.add_argument("--interval", type=seconds, default=0.2, help="seconds from one look at the folder to the next")
    parser.add_argument(
        "--settle",
        type=seconds,
        default=1.0,
        help="seconds without a change after which a file counts as whole where the system cannot tell who writes it",
    )


def run(args: argparse.Namespace) -> int:
    """Appends a line for every image to results.jsonl until SIGTERM (exit code 0) or Ctrl-C (130)."""
    from adpretrain_hf.cli.folder_run import calibration_settings, keep_settings, prepare_extractor
    from adpretrain_hf.cli.service import Service
    from adpretrain_hf.errors import MissingPathError
    from adpretrain_hf.scoring import required

    if not args.folder.is_dir():
        raise MissingPathError(f"no such folder: {args.folder}")
    extractor, settings = prepare_extractor(args)
    if args.false_alarms is not None:  # before it has to decide
        (judgement,) = extractor.judgements.values()
        required(judgement.calibration).threshold(args.false_alarms)
    keep_settings(args.output, settings | calibration_settings(args) | {"false_alarms": args.false_alarms})
    Service(extractor, args).run()
    return 0
