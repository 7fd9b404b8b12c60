"""Features or scores of very many images, written by any number of processes that share a file system and no more."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from adpretrain_hf.digest import combined_digest, tensor_digest
from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.named_images import reading_from
from adpretrain_hf.results import Failure, Result, ResultKind
from adpretrain_hf.run_images import open_images
from adpretrain_hf.run_settings import extractor_settings
from adpretrain_hf.sharded_run import Outcome, Shard, ShardedRun

SHARD_SIZE = 256


def write_shards(
    extractor: ADPretrainFeatureExtractor,
    images: Any,
    output: str | Path,
    kind: ResultKind,
    *,
    image_column: str | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Outcome:
    """Does one process's part of a run; ``ShardedResults`` reads what all of them have written.

    What is done is not done again: a run that was stopped goes on when it is started again, with any number of
    processes. The results of one shard are held in memory until it is written.

    Args:
        extractor: with its reference set.
        images: a folder, image files, a ``datasets.Dataset``, or a folder that ``Dataset.save_to_disk`` wrote.
        output: folder of the results.
        kind: ``FEATURES`` or ``SCORES``.
        image_column: of a data set; by default its only column of images.
        settings: what else the results depend on, or another identity of the references (key ``reference``) than that
            of the bank. A bank that every machine encodes for itself may differ in its last bits: save one and load it.
        shard_size: images in one file.
        batch_size: images at a time; a batch never holds images of two shards.
        rank, world_size: which of how many processes this is.
        progress: show a bar.

    Raises:
        InputError: no images, no reference, an output folder with results of other settings, or no such process.
    """
    output = Path(output)
    opened = open_images(images, output, image_column)
    about = {"command": kind.command, **extractor_settings(extractor), "reference": _reference_digest(extractor)}
    run = ShardedRun(opened, output, {**about, **(settings or {})}, shard_size)
    part = run.part(rank, world_size)
    pending = [shard for shard in part if shard.failures() is None]
    if pending:
        run.forget_index()
        reader = reading_from(extractor, opened.source)
        with _bar(kind.command, part, pending, progress) as bar:
            for shard in pending:
                _write_shard(reader, shard, kind, batch_size, bar)
    return run.finish(part)


def _write_shard(
    reader: ADPretrainFeatureExtractor, shard: Shard, kind: ResultKind, batch_size: int, bar: tqdm
) -> None:
    failures: list[Failure] = []
    results: dict[str, Result] = {}

    def note(image: str, error: ImageError) -> None:
        failures.append({"image": shard.images[image], "error": str(error)})
        bar.update()

    stream = kind.stream(reader, list(shard.images), batch_size=batch_size, progress=False, on_error=note)
    with closing(stream):
        for image, result in stream:
            results[shard.images[image]] = result
            bar.update()
    shard.save(results, failures)


def _bar(label: str, part: list[Shard], pending: list[Shard], progress: bool) -> tqdm:
    total, left = (sum(len(shard.images) for shard in shards) for shards in (part, pending))
    return tqdm(total=total, initial=total - left, unit="image", desc=label, disable=not progress)


def _reference_digest(extractor: ADPretrainFeatureExtractor) -> str:
    if extractor.reference is None:
        raise InputError("no reference is set: call set_reference(images) before write_shards")
    return combined_digest(map(tensor_digest, extractor.reference.patches))
