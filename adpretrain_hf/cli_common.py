"""What the commands that work through images have in common: the extractor that the options describe, and the end."""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adpretrain_hf.digest import combined_digest
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import list_images
from adpretrain_hf.launch import default_device
from adpretrain_hf.quantization import quantize
from adpretrain_hf.results import Failure
from adpretrain_hf.run_settings import extractor_settings

INT8 = "int8"


def load(args: Namespace) -> ADPretrainFeatureExtractor:
    """Loads the extractor onto the device."""
    device = args.device or default_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used: expected cpu, cuda, cuda:1 ... ({reason})") from error
    extractor = ADPretrainFeatureExtractor.from_pretrained(
        args.bundle,
        variant=args.variant,
        device=device,
        dtype="float32" if args.dtype == INT8 else args.dtype,
        image_size=args.image_size,
        revision=args.revision,
    )
    return quantize(extractor) if args.dtype == INT8 else extractor


def prepare(args: Namespace) -> tuple[ADPretrainFeatureExtractor, dict[str, Any]]:
    """Loads the extractor, sets its reference, and lists what the results will depend on."""
    extractor = load(args)
    extractor.set_reference(single(args.reference), batch_size=args.batch_size)
    settings = {"command": args.command, **extractor_settings(extractor), "reference": _files_digest(args.reference)}
    return extractor, settings


def single(paths: list[Path]) -> Any:
    """One path stands for itself (a folder, or a bank), several are a list of images."""
    return paths[0] if len(paths) == 1 else paths


def finish(output: Path, number: int, failures: Sequence[Failure]) -> int:
    """Says how many images have a result and which have none, and returns the exit code."""
    print(f"{output}: {number - len(failures)} of {number} images")
    list_failures(failures)
    return 1 if failures else 0


def list_failures(failures: Sequence[Failure]) -> None:
    """Lists the images that could not be used, if there are any."""
    if failures:
        number = len(failures)
        print(f"{number} image{'s' if number > 1 else ''} could not be used:", file=sys.stderr)
    for failure in failures:
        print(f"  {failure['error']}", file=sys.stderr)


def _files_digest(paths: list[Path]) -> str:
    """Identity of the files that were given: what is computed from them differs from machine to machine."""
    files = list_images(paths[0]) if paths[0].is_dir() else paths
    return combined_digest(sorted(hashlib.sha256(path.read_bytes()).digest() for path in files))
