"""The commands that work through images: reference, extract and score."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from adpretrain_hf.cli_common import finish, load, prepare, single
from adpretrain_hf.cli_shards import extract_shards, score_shards, shard_size
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path
from adpretrain_hf.folder_run import FolderRun
from adpretrain_hf.result_files import FEATURE_FORMATS, SavedScores, save_score
from adpretrain_hf.results import FEATURES, SCORES, Failure, Result, ResultKind
from adpretrain_hf.score_report import write_overlays, write_scores


def reference(args: Namespace) -> int:
    """Encodes normal images as a reference bank."""
    if args.output.suffix != ".safetensors":
        raise InputError(f"--output is {args.output}, expected a name that ends in .safetensors: a bank is known by it")
    extractor = load(args)
    bank = extractor.make_reference(
        single(args.images), category=args.category, batch_size=args.batch_size, progress=True
    )
    bank = bank.compact(args.keep)
    bank.to(dtype=getattr(torch, args.bank_dtype)).save(args.output)
    print(f"{args.output}: {len(bank)} patches of {bank.num_images} images")
    return 0


def extract(args: Namespace) -> int:
    """Writes the features of every image: to a file of its own, or to shards."""
    if size := shard_size(args):
        return extract_shards(args, size)
    extractor, settings = prepare(args)
    run = FolderRun(args.images, args.output, settings | {"format": args.format}, f".{args.format}")
    _write_files(run, extractor, FEATURES, args.batch_size, FEATURE_FORMATS[args.format])
    return finish(run.output, len(run.names), _failures(run))


def score(args: Namespace) -> int:
    """Scores every image; writes scores.csv, scores.json, the maps (to files or shards) and an overlay of each."""
    if size := shard_size(args):
        return score_shards(args, size)
    extractor, settings = prepare(args)
    run = FolderRun(args.images, args.output, settings, ".npz", "maps")
    _write_files(run, extractor, SCORES, args.batch_size, save_score)
    results = SavedScores(run.results())
    write_scores(run.output, [(name, float(result["score"])) for name, result in results.items()], _failures(run))
    if not args.no_overlays:
        write_overlays(run.output, results, run.files)
    return finish(run.output, len(run.names), _failures(run))


def _write_files(
    run: FolderRun,
    extractor: ADPretrainFeatureExtractor,
    kind: ResultKind,
    batch_size: int,
    save: Callable[[Result, Path], None],
) -> None:
    pending = run.pending()
    done = len(run.names) - len(pending)
    if done:
        print(f"{done} of {len(run.names)} images are done already", file=sys.stderr)
    if not pending:
        return
    stream = kind.stream(extractor, pending, batch_size=batch_size, on_error=run.note_failure)
    with closing(stream):  # the progress bar ends before an error is told
        for image, result in stream:
            with atomic_path(run.result_path(image)) as path:
                save(result, path)
            run.note_done(image)


def _failures(run: FolderRun) -> list[Failure]:
    return [{"image": name, "error": str(error)} for name, error in run.failures]
