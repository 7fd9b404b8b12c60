"""extract and score with their results in shards: over many images, in one process or under torchrun."""

from __future__ import annotations

import sys
from argparse import Namespace

from adpretrain_hf.cli_common import finish, list_failures, prepare
from adpretrain_hf.dataset_images import is_saved_dataset
from adpretrain_hf.errors import InputError
from adpretrain_hf.launch import Launch, launched
from adpretrain_hf.results import FEATURES, SCORES, ResultKind
from adpretrain_hf.run_images import RunImages, open_images
from adpretrain_hf.score_report import write_overlays, write_scores
from adpretrain_hf.sharded_run import Outcome
from adpretrain_hf.shards import ShardedResults
from adpretrain_hf.write_shards import SHARD_SIZE, write_shards


def shard_size(args: Namespace) -> int | None:
    """How many images go to one file, or None where each has a file of its own."""
    if args.shard_size or launched() or is_saved_dataset(args.images[0]):
        return args.shard_size or SHARD_SIZE
    if args.image_column:
        raise InputError(
            f"--image-column {args.image_column} is for a data set, and the images are files: leave it out"
        )
    return None


def extract_shards(args: Namespace, size: int) -> int:
    """Writes this process's part of the features."""
    if args.format != "safetensors":
        raise InputError(f"--format {args.format} is for one file for each image: shards are safetensors")
    images = open_images(args.images, args.output, args.image_column)
    return _finish(args, images, _write(args, images, FEATURES, size))


def score_shards(args: Namespace, size: int) -> int:
    """Writes this process's part of the maps, and the scores and overlays of all images if it is the last one."""
    images = open_images(args.images, args.output, args.image_column)
    outcome = _write(args, images, SCORES, size)
    if not outcome.open_shards:
        results = ShardedResults(args.output)
        scores = [(name, float(results.tensor(name, "score"))) for name in results]
        write_scores(args.output, scores, outcome.failures)
        if not args.no_overlays:
            write_overlays(args.output, results, images)
    return _finish(args, images, outcome)


def _write(args: Namespace, images: RunImages, kind: ResultKind, size: int) -> Outcome:
    extractor, settings = prepare(args)
    launch = _launch()
    return write_shards(
        extractor,
        images,
        args.output,
        kind,
        settings=settings,
        shard_size=size,
        batch_size=args.batch_size,
        rank=launch.rank,
        world_size=launch.world_size,
        progress=launch.rank == 0,
    )


def _finish(args: Namespace, images: RunImages, outcome: Outcome) -> int:
    if not outcome.open_shards:
        return finish(args.output, len(images.names), outcome.failures)
    number, rank = outcome.open_shards, _launch().rank
    print(
        f"rank {rank}: its part is done, {number} shard{'s' if number > 1 else ''} of other ranks still open; the last "
        "rank to end writes the index. If one was stopped, start the same command again",
        file=sys.stderr,
    )
    list_failures(outcome.failures)
    return 0  # torchrun would stop the others


def _launch() -> Launch:
    return launched() or Launch(0, 1)
