"""``adpretrain export``: a bundle with one product's reference as an ONNX file, and a program that runs it."""

import argparse
from pathlib import Path

from adpretrain_hf.cli.arguments import add_bundle, add_judgement, positive

HELP = "write a bundle with a reference as an ONNX file, beside a predict.py that needs no PyTorch"
EXAMPLES = """\
  adpretrain export my-bundle --reference screw.safetensors --output screw.onnx
  adpretrain export my-bundle --reference screw.safetensors --output screw.onnx --false-alarms 0.02
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only this verb takes, and what it shares."""
    add_bundle(parser)
    parser.add_argument(
        "--reference", type=Path, nargs="+", required=True, help="normal images: a folder, files, or a saved bank"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .onnx file to write")
    for side in ("height", "width"):
        text = f"{side} of prepared images in pixels, where they are no squares; the image size by default"
        parser.add_argument(f"--image-{side}", type=positive, help=text)
    add_judgement(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the ONNX file and ``predict.py``."""
    from adpretrain_hf.cli.folder_run import load, reference_of
    from adpretrain_hf.errors import InputError
    from adpretrain_hf.files import write_text
    from adpretrain_hf.integrations.onnx import PROGRAM, export_onnx

    program = args.output.with_name("predict.py")
    if args.output.suffix != ".onnx":
        raise InputError(f"--output is {args.output}, expected a name that ends in .onnx")
    if program.exists() and program.read_text(encoding="utf-8", errors="replace").partition("\n")[0] not in PROGRAM:
        raise InputError(f"{program} is another program, which would be lost: give --output in another folder")
    extractor = load(args)
    extractor.set_reference(reference_of(extractor, args))
    size = (args.image_height or extractor.image_size, args.image_width or extractor.image_size)
    export_onnx(extractor, args.output, image_size=size, false_alarms=args.false_alarms)
    write_text(program, PROGRAM)
    print(f"{args.output}: run it by `python {program} {args.output} IMAGES`")
    return 0
