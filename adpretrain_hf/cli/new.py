"""``adpretrain new``: a bundle from a backbone, whose projectors are the identity."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from adpretrain_hf.cli.arguments import DTYPES, Values, add_preparation, positive, preparation, seed

if TYPE_CHECKING:
    from adpretrain_hf.config import ADPretrainConfig

HELP = "make a bundle from a backbone; its projectors are the identity: nothing is trained"
EXAMPLES = """\
  adpretrain new --backbone facebook/dinov2-base --output my-bundle
  adpretrain new --backbone facebook/dinov2-small --levels 2 5 8 --image-size 336 --output my-bundle
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    parser.add_argument(
        "--backbone",
        required=True,
        help="preset, transformers id or folder, open_clip:<arch>/<weights> or imagebind:<checkpoint>",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    levels = "blocks counted from 1, e.g. 3 6 9 12; the quarters by default"
    parser.add_argument("--levels", action=Values, type=positive, help=levels)
    add_preparation(parser, "the backbone's size, and resize,")
    parser.add_argument("--reference-tokens", type=positive, help="learned reference tokens of a projector")
    parser.add_argument("--upstream", help="id on the Hub to record as the origin, where the backbone is a folder")
    parser.add_argument("--revision", help="commit of the backbone on the Hub")
    parser.add_argument("--no-backbone", action="store_true", help="record id and commit instead of the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the files")
    parser.add_argument("--seed", type=seed, default=0, help="of the projectors' initial weights")


def run(args: argparse.Namespace) -> int:
    """Makes a bundle from a backbone; its projectors are the identity."""
    import torch

    from adpretrain_hf.extractor import ADPretrainFeatureExtractor

    overrides = {"layers": args.levels, "backbone": args.upstream, "backbone_revision": args.revision}
    overrides |= {"num_reference_tokens": args.reference_tokens}
    overrides = {name: value for name, value in overrides.items() if value is not None} | preparation(args)
    check_free(args.output)
    torch.manual_seed(args.seed)
    extractor = ADPretrainFeatureExtractor.from_backbone(
        args.backbone, dtype=getattr(torch, args.dtype), device="cpu", **overrides
    )
    extractor.save_pretrained(args.output, include_backbone=not args.no_backbone)
    print(f"{args.output}: {describe(extractor.config)}; its projectors are the identity: nothing is trained")
    return 0


def check_free(output: Path) -> None:
    """Raises InputError if there is a bundle already."""
    from adpretrain_hf.bundle import LAYOUT
    from adpretrain_hf.errors import InputError

    if (output / LAYOUT.config).exists():
        raise InputError(f"{output} holds a bundle already, whose projectors would be lost: give another --output")


def describe(config: "ADPretrainConfig") -> str:
    """A configuration in one line."""
    whole = "the whole image" if config.resize_mode == "resize" else "the centre square"
    return (
        f"{config.backbone}, levels {', '.join(map(str, config.layers))}, {config.hidden_size} channels, "
        f"{config.image_size} px, {whole}, {config.num_reference_tokens} reference tokens"
    )
