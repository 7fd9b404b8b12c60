"""``adpretrain reference``: normal images of one product as a reference bank."""

import argparse
from pathlib import Path

from adpretrain_hf.cli.arguments import DTYPES, add_bundle, add_judgement, add_references, fraction

HELP = "encode normal images of one product as a reference bank"
EXAMPLES = """\
  adpretrain reference my-bundle normal_images/ --category screw --output screw.safetensors
  adpretrain reference my-bundle normal_images/ --augment-references flips --output screw.safetensors
  adpretrain reference my-bundle many_normal_images/ --select 8 --output screw.safetensors
  adpretrain reference my-bundle many_normal_images/ --keep 0.1 --output screw.safetensors
  adpretrain reference my-bundle large_normal_images/ --tiles 2x3 --output sheet.safetensors
  adpretrain reference my-bundle normal_images/ --calibrate more_normal_images/ --output screw.safetensors
  adpretrain reference my-bundle new_normal_images/ --add-to screw.safetensors --output screw.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_bundle(parser)
    add_judgement(parser)
    parser.add_argument("images", type=Path, nargs="+", help="a folder, or image files")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--category", default="", help="name of the product, kept in the bank")
    add_references(parser)
    parser.add_argument(
        "--keep", type=fraction, default=1.0, help="fraction of the patches to keep, e.g. 0.1: a core-set"
    )
    parser.add_argument("--add-to", type=Path, metavar="BANK", help="a bank whose images come before these")
    parser.add_argument(
        "--bank-dtype", choices=DTYPES, help="precision of the stored patches; float32, or that of the bank added to"
    )


def run(args: argparse.Namespace) -> int:
    """Encodes normal images as a reference bank."""
    from functools import partial

    import torch

    from adpretrain_hf.cli.folder_run import bank_options, calibrate, check_images, load, single
    from adpretrain_hf.errors import InputError

    if args.output.suffix != ".safetensors":
        raise InputError(f"--output is {args.output}, expected a name that ends in .safetensors: a bank is known by it")
    extractor = load(args)
    old = extractor.set_reference(args.add_to).reference if args.add_to else None
    check_images(args.images)
    options = {"category": args.category, "batch_size": args.batch_size, "progress": True} | bank_options(args)
    make = partial(extractor.extend_reference, old) if old else extractor.make_reference
    bank = make(single(args.images), **options).compact(args.keep)
    dtype = bank.patches[0].dtype if old else torch.float32
    bank = bank.to(dtype=getattr(torch, args.bank_dtype) if args.bank_dtype else dtype)
    bank = calibrate(extractor, bank, None if old else args.images, args, progress=True)
    bank.save(args.output)
    copies = f", with copies ({bank.augmentation})" if bank.augmentation else ""
    print(f"{args.output}: {len(bank)} patches of {bank.num_images} images{copies}")
    if (calibration := bank.judgement.calibration) is not None:
        print(f"anomalous above a score of {calibration.threshold():.4g}: {calibration}")
    return 0
