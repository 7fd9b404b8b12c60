"""The commands that work through images: reference, extract and score."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from adpretrain_hf.digest import combined_digest, tensor_digest
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path, write_csv, write_text
from adpretrain_hf.folder_run import FolderRun
from adpretrain_hf.images import list_images, read_image
from adpretrain_hf.overlays import colour_range, overlay
from adpretrain_hf.scoring import ScoredImage, place_map


def reference(args: Namespace) -> int:
    """Encodes normal images as a reference bank."""
    if args.output.suffix != ".safetensors":
        raise InputError(f"--output is {args.output}, expected a name that ends in .safetensors: a bank is known by it")
    extractor = _load(args)
    bank = extractor.make_reference(
        _single(args.images), category=args.category, batch_size=args.batch_size, progress=True
    )
    bank.to(dtype=getattr(torch, args.bank_dtype)).save(args.output)
    print(f"{args.output}: {len(bank)} patches of {bank.num_images} images")
    return 0


def extract(args: Namespace) -> int:
    """Writes the features of every image to a file of its own."""
    extractor, settings = _prepare(args)
    run = FolderRun(args.images, args.output, settings | {"format": args.format}, f".{args.format}")
    for pending in _pending(run):
        stream = extractor.stream(pending, batch_size=args.batch_size, on_error=run.note_failure)
        with closing(stream):  # the progress bar ends before an error is told
            for image, features in stream:
                with atomic_path(run.result_path(image.name)) as path:
                    _WRITERS[args.format]({name: maps.cpu().contiguous() for name, maps in features.items()}, path)
                run.note_done(image.name)
    return _finish(run)


def score(args: Namespace) -> int:
    """Scores every image; writes scores.csv, scores.json, the maps and an overlay of each."""
    extractor, settings = _prepare(args)
    run = FolderRun(args.images, args.output, settings, ".npz", "maps")
    for pending in _pending(run):
        stream = extractor.score_stream(pending, batch_size=args.batch_size, on_error=run.note_failure)
        with closing(stream):
            for scored in stream:
                with atomic_path(run.result_path(scored.image.name)) as path:
                    _save_map(scored, path)
                run.note_done(scored.image.name)
    _write_scores(run)
    if not args.no_overlays:
        _write_overlays(run)
    return _finish(run)


def _load(args: Namespace) -> ADPretrainFeatureExtractor:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used: expected cpu, cuda, cuda:1 ... ({reason})") from error
    return ADPretrainFeatureExtractor.from_pretrained(
        args.bundle,
        variant=args.variant,
        device=device,
        dtype=args.dtype,
        image_size=args.image_size,
        revision=args.revision,
    )


def _prepare(args: Namespace) -> tuple[ADPretrainFeatureExtractor, dict[str, Any]]:
    """Loads the extractor, sets its reference, and lists what the results will depend on."""
    extractor = _load(args)
    extractor.set_reference(_single(args.reference), batch_size=args.batch_size)
    settings = {
        "command": args.command,
        "fingerprint": extractor.config.fingerprint,
        "variant": extractor.variant,
        "projectors": combined_digest(map(tensor_digest, extractor.projectors.state_dict().values())),
        "residual_scale": extractor.config.residual_scale,
        "reference": _files_digest(args.reference),
        "dtype": args.dtype,
    }
    return extractor, settings


def _files_digest(paths: list[Path]) -> str:
    """Identity of the files that were given: what is computed from them differs from machine to machine."""
    files = list_images(paths[0]) if paths[0].is_dir() else paths
    return combined_digest(sorted(hashlib.sha256(path.read_bytes()).digest() for path in files))


def _single(paths: list[Path]) -> Any:
    """One path stands for itself (a folder, or a bank), several are a list of images."""
    return paths[0] if len(paths) == 1 else paths


def _pending(run: FolderRun) -> Iterator[list[Path]]:
    """Yields the images that are still to be done, if there are any."""
    pending = run.pending()
    done = len(run.names) - len(pending)
    if done:
        print(f"{done} of {len(run.names)} images are done already", file=sys.stderr)
    if pending:
        yield pending


def _results(run: FolderRun) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for image in run.names:
        path = run.result_path(image)
        if path.is_file():
            yield image, _load_map(path)


def _save_map(scored: ScoredImage, path: Path) -> None:
    image = scored.image
    np.savez_compressed(path, map=scored.anomaly.numpy(), score=scored.score, size=image.size, box=image.box)


def _load_map(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as result:
            return {name: result[name] for name in ("map", "score", "size", "box")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}): remove it, and run the command again") from error


def _write_scores(run: FolderRun) -> None:
    rows = [(run.names[image], float(result["score"])) for image, result in _results(run)]
    write_csv(run.output / "scores.csv", ("image", "score"), rows)
    report = {
        "settings": run.settings,
        "scores": [{"image": name, "score": value} for name, value in rows],
        "failures": [{"image": name, "error": str(error)} for name, error in run.failures],
    }
    write_text(run.output / "scores.json", json.dumps(report, indent=2) + "\n")


def _write_overlays(run: FolderRun) -> None:
    if not any(run.result_path(image).is_file() for image in run.names):
        return
    colours = colour_range(result["map"] for _, result in _results(run))
    for image, result in _results(run):
        box = tuple(int(side) for side in result["box"])
        height, width = (int(side) for side in result["size"])
        anomaly = place_map(torch.from_numpy(result["map"]), (height, width), box)  # type: ignore[arg-type]
        with atomic_path(run.output / "overlays" / f"{run.names[image]}.png") as temporary:
            overlay(read_image(image, image), anomaly.numpy(), colours).save(temporary)


def _finish(run: FolderRun) -> int:
    print(f"{run.output}: {len(run.names) - len(run.failures)} of {len(run.names)} images")
    if not run.failures:
        return 0
    number = len(run.failures)
    print(f"{number} image{'s' if number > 1 else ''} could not be used:", file=sys.stderr)
    for _, error in run.failures:
        print(f"  {error}", file=sys.stderr)
    return 1


def _save_npz(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.float().numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


_WRITERS: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {"safetensors": save_file, "npz": _save_npz}
