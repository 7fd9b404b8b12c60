"""The command line: ``adpretrain``, or ``python -m adpretrain_hf.cli``.

Only argparse is imported here, so that help comes at once; a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from adpretrain_hf import __version__
from adpretrain_hf.errors import InputError

_RUNS = "adpretrain_hf.cli_runs"
_DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done. 1: something the user can mend, said in one line. 2: wrong usage. With ``--debug``, a traceback instead.
    """
    args = build_parser().parse_args(argv)
    try:
        return getattr(import_module(args.module), args.command)(args)
    except (InputError, OSError) as error:
        if args.debug:
            raise
        print(f"adpretrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("adpretrain: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="adpretrain", description="Pretrained features for industrial anomaly detection."
    )
    parser.add_argument("--version", action="version", version=f"adpretrain-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_new, _add_convert, _add_reference, _add_extract, _add_score, _add_push, _add_info, _add_demo):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, help: str, module: str = "adpretrain_hf.cli_bundles"
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(module=module)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_new(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "new", "make a bundle from a backbone; its projectors start as the identity")
    parser.add_argument(
        "--backbone",
        required=True,
        help="preset, transformers id or folder, open_clip:<arch>/<weights> or imagebind:<checkpoint>",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--levels", type=_levels, help="blocks counted from 1, e.g. 3,6,9,12; the quarters by default")
    parser.add_argument("--image-size", type=_positive, help="side in pixels that images are prepared to")
    parser.add_argument("--resize-mode", choices=("crop", "resize"), help="centre crop, or the whole image")
    parser.add_argument("--reference-tokens", type=_positive, help="learned reference tokens of a projector")
    parser.add_argument("--upstream", help="id on the Hub to record as the origin, where the backbone is a folder")
    parser.add_argument("--revision", help="commit of the backbone on the Hub")
    parser.add_argument("--no-backbone", action="store_true", help="record id and commit instead of the weights")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="precision of the files")
    parser.add_argument("--seed", type=_seed, default=0, help="of the projectors' initial weights")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "convert", "make a bundle from the authors' released checkpoints")
    parser.add_argument("--backbone", required=True, help="preset, or a backbone as for `adpretrain new`")
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--angle", type=Path, help="checkpoint of the angle variant (.pth)")
    parser.add_argument("--norm", type=Path, help="checkpoint of the norm variant (.pth)")
    parser.add_argument("--from-hub", metavar="REPOSITORY", help="fetch both from the Hub: xcyao00/ADPretrain")
    parser.add_argument("--levels", type=_levels, help="blocks counted from 1, where the backbone is no preset")
    parser.add_argument("--upstream", help="id on the Hub to record as the origin, where the backbone is a folder")


def _add_reference(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "reference", "encode normal images of one product as a reference bank", _RUNS)
    _add_bundle(parser)
    parser.add_argument("images", type=Path, nargs="+", help="a folder, or image files")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--category", default="", help="name of the product, kept in the bank")
    parser.add_argument(
        "--keep", type=_fraction, default=1.0, help="fraction of the patches to keep, e.g. 0.1: a core-set"
    )
    parser.add_argument("--bank-dtype", choices=_DTYPES, default="float32", help="precision of the stored patches")


def _add_extract(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "extract", "write the features of every image to a file of its own, or to shards", _RUNS
    )
    _add_run(parser)
    parser.add_argument("--format", choices=("safetensors", "npz"), default="safetensors", help="of the files")


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "score", "write anomaly scores, maps and overlays", _RUNS)
    _add_run(parser)
    parser.add_argument("--no-overlays", action="store_true", help="leave the overlay pictures out")


def _add_push(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "push", "push a bundle to the Hub in one commit")
    parser.add_argument("bundle", type=Path, help="folder of the bundle, with all its variants")
    parser.add_argument("repository", help="owner/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it private, and refuse one that is public")
    parser.add_argument("--branch", help="made if it is not there; main by default")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to the branch")
    parser.add_argument("--tag", help="name to give to the commit")
    parser.add_argument("--message", default="Upload bundle", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be sent")


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "info", "say what a bundle or a reference bank is")
    parser.add_argument("path", help="a bundle (folder or id on the Hub), or a .safetensors bank")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "demo", "score photographs and draw the results", "adpretrain_hf.cli_demo")
    parser.add_argument("--bundle", default="hub_cards/adpretrain-dinov2-small", help="folder, or id on the Hub")
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path("tests/photos"),
        help="categories as in MVTecAD: <category>/train/good, <category>/test/<type>",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results")


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a bundle: a folder, or an id on the Hub")
    parser.add_argument("--variant", help="which projectors, e.g. angle or norm; the bundle's default if not given")
    parser.add_argument("--revision", help="branch, tag or commit of the bundle on the Hub")
    parser.add_argument("--image-size", type=_positive, help="side in pixels that images are prepared to")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the first GPU if there is one, or the process's own")
    parser.add_argument(
        "--dtype",
        choices=(*_DTYPES, "int8"),
        default="float32",
        help="precision in memory; on a CPU bfloat16 is fast with AVX-512 or AMX instructions for it, int8 elsewhere",
    )
    parser.add_argument("--batch-size", type=_positive, default=16, help="images at a time")


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    parser.add_argument(
        "images", type=Path, nargs="+", help="a folder, image files, or a data set that `datasets` saved to disk"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        required=True,
        help="normal images: a folder, files, or a bank made by `adpretrain reference`",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; a stopped run goes on in it")
    parser.add_argument(
        "--shard-size",
        type=_positive,
        help="images in one file; by default a file for every image, under torchrun or for a data set 256",
    )
    parser.add_argument("--image-column", help="of a data set; its only column of images by default")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0 and at most 1")
    return value


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 0 to 2**63 - 1")
    return int(text)


def _levels(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
