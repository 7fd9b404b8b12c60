"""A run over many images that may be stopped and started again: one file of results for each image, or Ray's Parquet.

Also what a run needs before it starts and says when it ends: the extractor that the options describe, the settings that
results depend on, the list of what failed.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adpretrain_hf.cli.arguments import INT8, refuse_given, tile_options
from adpretrain_hf.cli.categories import categories_of
from adpretrain_hf.cli.done import DoneList
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path, combined_digest, fitting_name, has_content, sha256_of, write_text
from adpretrain_hf.images import RunImages, images_outside, list_images, open_images, read_image
from adpretrain_hf.quantization import quantize
from adpretrain_hf.reference import ReferenceBank, bank_files, is_bank, write_references
from adpretrain_hf.scoring import BY_MAXIMUM

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.(npz|png|safetensors|csv|json)")


@dataclass
class FolderRun:
    """One run: which image goes to which file, which are done, and which failed.

    Results of images that were removed since the last time are removed too, and what a killed run left half written.

    Args:
        images: what to work through.
        output: where the results go.
        settings: all that the results depend on; see ``keep_settings``.
        files: what is written of every image: subfolders of ``output``, and what is appended to the image's name there.
            The first is the result; what else there is can be made of it again.
        errors: of the images that could not be used, by their names.

    Raises:
        InputError: an output folder with results of other settings.
    """

    images: RunImages
    output: Path
    settings: dict[str, Any]
    files: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_settings(self.output, self.settings)
        self._done = DoneList(self.output / "done.jsonl")
        for name in self._done.gone(self.images.names.values()):
            self._remove(name)
        below = {os.path.dirname(name) for name in self.images.names.values()}
        for folder in (self.output, *(self.output / one / part for one in self.files for part in below)):
            _remove_leftovers(folder)

    def result_path(self, image: str, subfolder: str | None = None) -> Path:
        """Where an image's result goes, or what else is written of it."""
        return self._path(self.images.names[image], next(iter(self.files)) if subfolder is None else subfolder)

    def results(self) -> dict[str, Path]:
        """The results that are there, by what errors call their images."""
        paths = {image: self.result_path(image) for image in self.images.names}
        return {image: path for image, path in paths.items() if has_content(path)}

    def pending(self) -> list[str]:
        """The images without a result, or that are no longer those that it was made of."""
        return [image for image in self.images.names if not self._is_done(image)]

    def write(self, stream: Callable[..., Any], save: Callable[[Any, Path], None], batch_size: int) -> None:
        """Computes and writes what is still to be done.

        Args:
            stream: called with images as pairs of a name and what is read, and with the options of
                ``extractor.stream``, yields the name and the result of every image.
            save: writes a result.
            batch_size: images at a time.
        """
        pending = self.pending()
        if done := len(self.images.names) - len(pending):
            print(f"{done} of {len(self.images.names)} images are done already", file=sys.stderr)
        if not pending:
            return
        images = [(image, partial(self.images.source, image)) for image in pending]
        categories = [self.images.categories[image] for image in pending] if self.images.categories else None
        options: dict[str, Any] = {"categories": categories, "batch_size": batch_size}
        with contextlib.closing(stream(images, **options, on_error=self.note_failure)) as results:
            for image, result in results:  # closed, so that the progress bar ends before an error is told
                with atomic_path(self.result_path(image)) as path:
                    save(result, path)
                self._remove(self.images.names[image], [*self.files][1:])  # of an earlier state of the image
                self.note_done(image)

    def note_done(self, image: str) -> None:
        """Notes that an image's result is written, and of what state of the image: a replaced one has another."""
        if (state := self.images.states.get(image)) is not None:
            self._done.add(self.images.names[image], image, state, self.images.categories.get(image, ""))

    def note_failure(self, image: str, error: ImageError) -> None:
        """Notes an image that cannot be used; the run goes on."""
        name = self.images.names[image]
        self.errors[name] = str(error)
        self._remove(name)  # what an earlier state of the image left

    def _path(self, name: str, subfolder: str) -> Path:
        return self.output / subfolder / fitting_name(name, self.files[subfolder])

    def _remove(self, name: str, subfolders: Iterable[str] | None = None) -> None:
        for subfolder in self.files if subfolders is None else subfolders:
            self._path(name, subfolder).unlink(missing_ok=True)

    def _is_done(self, image: str) -> bool:
        name, state = self.images.names[image], self.images.states.get(image)
        if not has_content(self.result_path(image)):
            return False
        if self.images.settings:  # a data set, which cannot change
            return True
        return state is not None and self._done.holds(name, image, state, self.images.categories.get(image, ""))


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of ``atomic_path`` that are an hour old: others may be writing now."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < time.time() - 3600:
                path.unlink()


def keep_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Writes to ``run.json`` all that results depend on: a run goes on only under the same settings.

    Raises:
        InputError: the folder holds results of other settings.
    """
    path = output / "run.json"
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if not path.is_file():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(f"{output} holds results of other settings (see {path}): give another --output, or remove it")


def run_on_ray(args: Namespace, *, features: bool) -> int:
    """Does the run on Ray, whose results are Parquet files, and returns the exit code."""
    from adpretrain_hf.integrations.ray import connect, write_parquet

    connect(args.ray_address)
    images, extractor, settings = prepare(args)
    keep_settings(args.output, settings | calibration_settings(args) | {"format": "parquet"})
    bank = args.output.absolute() / ("references" if args.references else "reference.safetensors")
    if args.references:
        write_references(extractor.references, bank)
    else:
        extractor.reference.save(bank)  # type: ignore[union-attr]
    del extractor  # an actor needs its place on the GPU
    torch.cuda.empty_cache()
    errors = write_parquet(
        images,
        args.output,
        features=features,
        cpus=args.ray_cpus,
        batch_size=args.batch_size,
        bundle=os.path.abspath(args.bundle) if os.path.isdir(args.bundle) else args.bundle,
        references=bank,
        device=args.device,
        max_pixels=args.max_pixels,
        **_choices(args),
    )
    return finish(args.output, len(images.names), errors)


def prepare(args: Namespace) -> tuple[RunImages, ADPretrainFeatureExtractor, dict[str, Any]]:
    """Opens the images, loads the extractor and sets its references, and lists what the results will depend on."""
    if not (args.ray or args.ray_address):
        refuse_given(args, ["ray_cpus"], "expected --ray or --ray-address with it")
    images = open_images(args.images, args.output, args.image_column)
    extractor, settings = prepare_extractor(args)
    if args.references:
        images = replace(images, categories=categories_of(images.names, extractor.references, args.categories))
    return images, extractor, settings | images.settings


def prepare_extractor(args: Namespace) -> tuple[ADPretrainFeatureExtractor, dict[str, Any]]:
    """Loads the extractor and sets its references, and lists what results will depend on, whatever the images are."""
    for name in ("reference", "calibrate"):
        paths = getattr(args, name, None)
        if paths and len(paths) == 1 and paths[0].is_dir():
            setattr(args, name, images_outside(paths[0], args.output))
    extractor = load(args)
    if getattr(args, "references", None):
        given = [*bank_options(args), *(["calibrate"] if getattr(args, "calibrate", None) else [])]
        if given:
            raise InputError(f"{', '.join(given)}: the banks of --references are as they were made: leave it out")
        extractor.set_references(args.references)
    else:
        extractor.set_reference(reference_of(extractor, args))
    settings: dict[str, Any] = {"command": args.command, "variant": extractor.variant, "dtype": args.dtype}
    settings |= {
        "fingerprint": extractor.config.fingerprint,
        "projectors": combined_digest(extractor.projectors.digests()),
        "residual_scale": extractor.config.residual_scale,
    }
    for category, bank in extractor.references.items():
        if (judgement := bank.judgement.calibrated(None)) != BY_MAXIMUM:
            settings.setdefault("judgements", {})[category] = judgement.to_dict()
        if bank.tiles:
            settings.setdefault("tiles", {})[category] = bank.tiles.to_dict() | {"tile_reference": bank.tile_reference}
    options = {name: value for name, value in bank_options(args).items() if name in ("augment_references", "select")}
    if "augment_references" in options and extractor.reference is not None:
        options["augment_references"] = extractor.reference.augmentation or "none"  # what "auto" chose
    return extractor, settings | options | _reference_settings(args)


def _reference_settings(args: Namespace) -> dict[str, Any]:
    """The identity of the references: of the files, for what is computed from them differs between machines."""
    if getattr(args, "references", None):
        return {"references": {path.stem: sha256_of(path) for path in bank_files(args.references)}}
    if getattr(args, "categories", None):
        raise InputError(f"--categories {args.categories} is for --references, a folder of several products' banks")
    return {"reference": _identity_of(args.reference)}


def calibration_settings(args: Namespace) -> dict[str, str]:
    """The identity of the images of ``--calibrate``, for runs that keep what was decided; a bank's own has that."""
    paths = getattr(args, "calibrate", None)
    return {"calibrate": _identity_of(paths)} if paths else {}


def _identity_of(paths: Sequence[Path]) -> str:
    return combined_digest(sorted(hashlib.sha256(path.read_bytes()).digest() for path in paths))


def reference_of(extractor: ADPretrainFeatureExtractor, args: Namespace) -> ReferenceBank:
    """The bank that ``--reference`` is, or that is made of its images, calibrated if the verb judges.

    Raises:
        InputError: options of how a bank is made, with one.
    """
    paths, options = args.reference, bank_options(args)
    if len(paths) == 1 and is_bank(paths[0]):
        bank = next(iter(extractor.set_reference(paths[0], **options).references.values()))
        return calibrate(extractor, bank, None, args) if getattr(args, "calibrate", None) else bank
    bank = extractor.make_reference(single(paths), batch_size=args.batch_size, **options)
    return calibrate(extractor, bank, paths, args) if "calibrate" in args else bank


def bank_options(args: Namespace) -> dict[str, Any]:
    """What was asked for of how a bank is made and judged, as ``make_reference`` takes it, where it is told."""
    given = {name: single(value) for name in ("region", "ignore") if (value := getattr(args, name, None))}
    options = {name: getattr(args, name, None) for name in ("augment_references", "select", "image_score", "top")}
    given |= {name: value for name, value in options.items() if value not in ("none", None)}
    return given | tile_options(args)


def calibrate(
    extractor: ADPretrainFeatureExtractor,
    bank: ReferenceBank,
    own: list[Path] | None,
    args: Namespace,
    progress: bool = False,
) -> ReferenceBank:
    """The bank calibrated by ``--calibrate``, or by its own images where they can be compared with each other."""
    images = args.calibrate or (own if bank.leaves_out else None)
    if images is None and args.false_alarms is not None:
        raise InputError("--false-alarms: there is nothing to calibrate with: give other normal images by --calibrate")
    if images is None:
        print("not calibrated, so there are no decisions: give other normal images by --calibrate", file=sys.stderr)
        return bank
    options = {"batch_size": args.batch_size, "progress": progress, "false_alarms": args.false_alarms}
    return extractor.calibrate(bank, single(images), **options)


def load(args: Namespace) -> ADPretrainFeatureExtractor:
    """Loads the extractor onto the device, and lets images be as large as the options say."""
    if args.max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = args.max_pixels
    in_8_bits = args.dtype == INT8
    device = args.device or ("cpu" if in_8_bits else None)  # where 8-bit layers run
    choices = _choices(args) | ({"dtype": "float32"} if in_8_bits else {})
    extractor = ADPretrainFeatureExtractor.from_pretrained(args.bundle, device=device, **choices)
    return quantize(extractor) if in_8_bits else extractor


def check_images(paths: Sequence[Path]) -> None:
    """Raises InputError that lists all images, of a folder or a list, that cannot be read: references are few."""
    errors = []
    for path in list_images(paths[0]) if len(paths) == 1 and paths[0].is_dir() else paths:
        try:
            read_image(path, str(path))
        except ImageError as error:
            errors.append(str(error))
    if errors:
        raise InputError(f"{len(errors)} reference images cannot be used: {'; '.join(errors)}")


def single(paths: list[Any]) -> Any:
    """One path stands for itself (a folder, or a bank), several are a list of images."""
    return paths[0] if len(paths) == 1 else paths


def finish(output: Path, number: int, errors: Mapping[str, str]) -> int:
    """Says how many images have a result, lists the errors of those that have none, and returns the exit code."""
    print(f"{output}: {number - len(errors)} of {number} images")
    if errors:
        head = f"{len(errors)} image{'s' if len(errors) > 1 else ''} could not be used:"
        print(head, *errors.values(), sep="\n  ", file=sys.stderr)
    return 1 if errors else 0


def _choices(args: Namespace) -> dict[str, Any]:
    """What decides which extractor a bundle is loaded as."""
    names = ("variant", "dtype", "image_size", "resize_mode", "decode", "revision")
    return {name: getattr(args, name) for name in names}
