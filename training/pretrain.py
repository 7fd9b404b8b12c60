"""Pretrains projectors on RealIAD, or on data laid out like it, and leaves a bundle.

On this machine, with data that the program draws itself::

    python -m training.pretrain --data synthetic --backbone facebook/dinov2-small --output runs/small

As published, on one GPU or on many::

    python -m training.pretrain --data Real-IAD/Real-IAD --backbone dinov2-large --output runs/large
    torchrun --nproc-per-node 8 -m training.pretrain --data Real-IAD/Real-IAD ...

A run that was stopped goes on with the same command and ``--resume``. ``--push me/name`` pushes the bundle at the end,
``python -m training.push runs/large me/name`` later.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM

from torch.utils.data import DataLoader

from adpretrain_hf.errors import InputError
from training import distributed
from training.checkpoint import Progress
from training.preparation import Preparation, prepare
from training.push import push_run
from training.reporting import Reporter
from training.run_folder import RunFolder
from training.sampler import EpochBatches
from training.samples import Batch, Collate, UnreadableImages
from training.settings import PretrainSettings, add_flags, from_flags
from training.signals import StopRequest, leave_to_parent
from training.state import TrainingState
from training.step import PretrainStep


def pretrain(settings: PretrainSettings, output: str | Path, *, resume: bool = False, command: str = "") -> int:
    """Runs a pretraining to its end, or until it is told to stop.

    Args:
        settings: what to do.
        output: folder of the run (see ``RunFolder``).
        resume: go on with the run that is there.
        command: to note, for the card.

    Returns:
        0 when the bundle is written, or the number of the signal that stopped the run.

    Raises:
        InputError: data, backbone or settings cannot be used; a run is there already, or one with other settings.
    """
    run = RunFolder(output)
    if distributed.rank() == 0:
        run.start(settings, command, resume=resume)
    distributed.wait_for_all()
    parts = prepare(settings, run)
    state = TrainingState.begin(parts, run)
    with Reporter(run.path / "tensorboard", total=state.total_images, done=state.images_done) as reporter:
        signal = train(parts, state, reporter)
    if not signal and distributed.rank() == 0:
        run.write_bundle(settings, parts.extractor, state.progress, parts.data.training)
    return signal


def train(parts: Preparation, state: TrainingState, reporter: Reporter) -> int:
    """The loop; returns 0 at the end, or the number of the signal that stopped it."""
    settings, progress = parts.settings, state.progress
    step = PretrainStep(parts.extractor, state.distributed_projectors(), state.centers, settings)
    with StopRequest() as stop:
        while progress.epoch < settings.epochs:
            unreadable = UnreadableImages(len(parts.data.positions))
            reporter.begin_epoch()
            for part, batch in enumerate(epoch_batches(parts, progress), start=1):
                unreadable.add(batch.unreadable)
                loss = step(batch, parts.references.draw(batch.positions, progress.epoch, progress.step))
                (loss.total * distributed.world_size() / settings.accumulate).backward()
                if part % settings.accumulate:
                    continue
                state.update()
                reporter.step(loss, settings.batch_size)
                stopping = distributed.anyone(bool(stop.signal))
                if stopping or state.checkpoint_is_due():
                    state.save_checkpoint(reporter)
                if stopping:
                    reporter.say(f"stopped after step {progress.step} of epoch {progress.epoch + 1}: --resume goes on")
                    return stop.signal or SIGTERM
            reporter.end_steps()
            parts.validation.end_epoch(progress, reporter, unreadable.messages)
            state.save_checkpoint(reporter)
    return 0


def epoch_batches(parts: Preparation, progress: Progress) -> DataLoader[Batch]:
    """The batches of an epoch that are not done yet, decoded and augmented by workers."""
    settings = parts.settings
    return DataLoader(
        parts.samples,
        batch_sampler=EpochBatches(
            parts.data.positions,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            seed=settings.seed,
            epoch=progress.epoch,
            first_step=progress.step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        ),
        collate_fn=Collate(parts.extractor.config.patch_size),
        num_workers=settings.workers,
        worker_init_fn=leave_to_parent,
        pin_memory=parts.extractor.device.type == "cuda",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the docstring of the module. Returns 0, or 1 with one line on what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--push", metavar="OWNER/NAME", help="push the bundle to the Hub at the end")
    parser.add_argument("--public", action="store_true", help="push to a public repository; private by default")
    add_flags(parser)
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "training.pretrain", *(sys.argv[1:] if argv is None else argv)])
    try:
        with distributed.process_group():
            signal = pretrain(from_flags(args), args.output, resume=args.resume, command=command)
            if args.push and not signal and distributed.rank() == 0:
                print(push_run(args.output, args.push, public=args.public))
    except (InputError, OSError) as error:
        print(f"pretrain: error: {error}", file=sys.stderr)
        return 1
    return 128 + signal if signal else 0


if __name__ == "__main__":
    sys.exit(main())
