"""Pretrains projectors on RealIAD, or on data laid out like it, and leaves a bundle.

On this machine, with data that the program draws itself::

    python -m training.pretrain --data synthetic --backbone facebook/dinov2-small --output runs/small

As published, on one GPU or on many::

    python -m training.pretrain --data Real-IAD/Real-IAD --backbone dinov2-large --output runs/large
    torchrun --nproc-per-node 8 -m training.pretrain --data Real-IAD/Real-IAD ...

A run that was stopped goes on with the same command and ``--resume``. ``--push me/name`` pushes the bundle at the end,
``adpretrain push runs/large/bundle me/name --private`` later. ``train`` is the method.
"""

import copy
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adpretrain_hf.bundle import BundlePusher, check_rights
from adpretrain_hf.errors import InputError, run_program
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import choose_device, to_device
from training.data.augment import augment
from training.data.samples import Batch, Item, Samples, check_unreadable, collate, epoch_batches
from training.data.slots import SlotFile, identified
from training.data.sources import TrainingData, load_training_data
from training.data.table import content_keys
from training.evaluation.validation import Validation
from training.losses import level_losses
from training.references import ReferencePatches, ReferencePool, autocast, match
from training.run import distributed
from training.run.distributed import StopRequest
from training.run.folder import RunFolder
from training.run.graph import graphed
from training.run.reporting import Reporter, check_tracker
from training.run.state import Progress, TrainingState, initialise
from training.settings import PretrainSettings, parse, settings_of
from training.synthetic.defects import MIN_SIDE

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a run is made of that never changes.

    Attributes:
        settings: of the run.
        extractor: frozen backbone and projectors, on this process's device.
        data: images and the split of their categories.
        samples: the training images, and what is drawn for them.
        references: the patches that they are compared with.
        validation: judges every epoch.
    """

    settings: PretrainSettings
    extractor: ADPretrainFeatureExtractor
    data: TrainingData
    samples: Samples
    references: ReferencePatches
    validation: Validation


def train(parts: Parts, state: TrainingState, reporter: Reporter) -> int:
    """The loop (paper, section 3; released ``train.py``); returns 0 at the end, or the signal that stopped it."""
    settings, config, device = parts.settings, parts.extractor.config, parts.extractor.device
    make_views, encode, project = compiled(parts, state)
    mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (config.mean, config.std))

    @graphed  # one launch for what is not trained
    @torch.no_grad()
    def residuals_of(images: Tensor, augmentations: Tensor, *patches: Tensor) -> list[Tensor]:
        with autocast(device, settings.precision):
            views = make_views(images, augmentations)  # (2 B, 3, S, S)
            tokens = encode((views - mean) / std)  # L x (2 B, C, h, w)
            return match(tokens, patches, config.residual_scale)  # L x (2 B, C, h, w)

    with StopRequest() as stop:
        loaded = load_batches(parts, state.progress, stop.leave_to_parent)
        batches = on_device(loaded, parts.references, device)
        while not state.is_done:
            unreadable, losses = list[str](), torch.zeros(3, device=device)
            reporter.begin_epoch()
            state.begin_epoch()
            parts_left = settings.accumulate * (state.steps_per_epoch - state.progress.step)
            for part, (batch, inputs) in enumerate(islice(batches, parts_left), start=1):
                unreadable += batch.unreadable
                ends_step = part % settings.accumulate == 0
                exchanges = ends_step or not isinstance(project, DistributedDataParallel)  # gradients, once a step
                with nullcontext() if exchanges else project.no_sync():
                    residuals = residuals_of(*inputs)  # L x (2 B, C, h, w)
                    with autocast(device, settings.precision):
                        features = project(residuals)  # L x (2 B, C, h, w)
                    angle, norm = level_losses(
                        features, batch.labels, state.centers, temperature=settings.temperature, margin=settings.margin
                    )
                    loss = settings.angle_weight * angle + norm
                    # DistributedDataParallel takes the mean of gradients that add up to the whole's.
                    (loss * distributed.world_size() / settings.accumulate).backward()
                losses += torch.stack([loss, angle, norm]).detach() / settings.accumulate
                if not ends_step:
                    continue
                state.step()
                reporter.step(losses, settings.batch_size)
                stopping = state.agree(bool(stop.signal), unreadable)
                check_unreadable(state.progress.unreadable, len(parts.data.positions))
                unreadable, losses = [], torch.zeros_like(losses)
                if state.is_done:  # before a stop, which would leave the last step unjudged
                    break
                if stopping or state.checkpoint_is_due():
                    reporter.end_steps()  # which no loss passes that is not finite: its weights are not kept
                    state.save_checkpoint(reporter.say)
                if stopping:
                    reporter.say(f"stopped after {state.progress.steps_done} steps: --resume goes on")
                    return stop.signal or SIGTERM
            reporter.end_steps()
            parts.validation.end_epoch(state.progress, reporter, state.progress.unreadable)
            state.end_epoch()
            state.save_checkpoint(reporter.say)
    return 0


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
    check_tracker(settings.tracker)
    run = RunFolder(output)
    run.check(settings, resume=resume)
    parts, state = begin(settings, run)
    if distributed.rank() == 0:
        run.note_start(settings, command)
    done, total = (steps * settings.batch_size for steps in (state.progress.steps_done, state.total_steps))
    with Reporter(run.path, total=total, done=done, tracker=settings.tracker) as reporter:
        signal = train(parts, state, reporter)
    if not signal and distributed.rank() == 0:
        run.write_bundle(settings, parts.extractor, state.progress, parts.data.training)
    return signal


def begin(settings: PretrainSettings, run: RunFolder) -> tuple[Parts, TrainingState]:
    """Opens the data and encodes what never changes; then takes up the checkpoint, or measures what a new run needs.

    Raises:
        InputError: data, backbone or checkpoint cannot be used.
    """
    extractor = make_extractor(settings)  # before the data, which may take minutes to come
    if settings.paint_defects and extractor.config.image_size < MIN_SIDE:
        expected = f"at least {MIN_SIDE} px for --paint-defects"
        raise InputError(f"--image-size is {extractor.config.image_size}, expected {expected}")
    if distributed.rank() == 0:
        run.lock()
    # What autocast leaves in float32: the similarities of the losses.
    torch.backends.cuda.matmul.allow_tf32 = settings.precision == "bfloat16"
    with distributed.first_process_first():  # it draws or downloads what the others then find
        data = load_training_data(settings, run.path / "synthetic")
    images, digest = len(data.positions), data.digest()
    state = TrainingState(settings, run.checkpoint, extractor.projectors, images=images, data=digest)
    parts = prepare(settings, run, extractor, data)
    if state.is_new:
        state.centers, state.progress.residual_scale = measure(parts)
    extractor.config = extractor.config.replace(residual_scale=tuple(state.progress.residual_scale))
    extractor.projectors = state.weights  # those that are judged; the state trains its own
    if state.is_new and distributed.rank() == 0:
        state.progress.baseline = parts.validation.baseline()
    return parts, state


def make_extractor(settings: PretrainSettings) -> ADPretrainFeatureExtractor:
    """A new extractor on this process's device, whose projectors depend on the seed; or that of a bundle.

    Raises:
        InputError: the backbone or bundle is unknown, or a setting does not fit it.
    """
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    if settings.init_from:
        return ADPretrainFeatureExtractor.from_pretrained(
            settings.init_from, device=device, image_size=settings.image_size or None, resize_mode="crop"
        )
    chosen: Any = {"backbone": settings.upstream, "image_size": settings.image_size, "layers": settings.levels}
    extractor = ADPretrainFeatureExtractor.from_backbone(
        settings.backbone or "dinov2-base",
        device="cpu",  # a seed draws other weights on a GPU
        resize_mode="crop",  # as images to train on are prepared
        num_reference_tokens=settings.reference_tokens,
        normalize_tokens=settings.normalize_tokens,
        **{name: value for name, value in chosen.items() if value},
    )
    initialise(extractor.projectors, settings.init_scale)
    return extractor.to(device)


def prepare(
    settings: PretrainSettings, run: RunFolder, extractor: ADPretrainFeatureExtractor, data: TrainingData
) -> Parts:
    """Encodes what never changes: references and validation images.

    Raises:
        InputError: the data cannot be used.
    """
    columns = (data.dataset[name] for name in ("category", "view", "is_good"))
    pool = ReferencePool(*columns, among=data.positions, pool_size=settings.pool_size or None, seed=settings.seed)
    cache, keys = Path(settings.cache_folder or run.cache), content_keys(data.dataset["image"])
    crops = _crops(settings, extractor.config.image_size, cache, keys, data)
    samples = Samples(data.dataset, data.positions, extractor.config, pool, settings, crops)
    references = ReferencePatches(
        extractor,
        samples.load_normal,
        pool,
        keys,
        file=cache / "references.bin",
        keep=bool(settings.cache_folder),
        precision=settings.precision,
        memory_gb=settings.cache_gb,
    )
    return Parts(settings, extractor, data, samples, references, Validation(settings, run, data, extractor))


def measure(parts: Parts) -> tuple[Tensor, list[float]]:
    """Normal centres (L, C) of scaled residuals, and the levels' scales.

    A scale is one over the mean length of a normal residual; that of a bundle is kept, for its projectors know it, and
    without ``scale_residuals`` it is 1.
    """
    centers, mean_norms = parts.references.statistics(parts.settings.seed)
    scale = [1 / length for length in mean_norms]
    if parts.settings.init_from or not parts.settings.scale_residuals:
        scale = list(parts.extractor.config.residual_scale)
    return centers * centers.new_tensor(scale)[:, None], scale


def load_batches(parts: Parts, progress: Progress, on_start: Callable[[int], None] | None = None) -> DataLoader[Batch]:
    """The batches that are not done yet, of all epochs, decoded, cropped and painted by workers."""
    settings, first = parts.settings, (progress.epoch, progress.step)  # as it is now, not when batches are asked for

    def batches_of(epoch: int) -> list[list[Item]]:
        return epoch_batches(
            parts.data.epoch_positions(settings.seed, epoch),
            settings,
            epoch=epoch,
            first_step=first[1] if epoch == first[0] else 0,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            anomalous=parts.data.anomalous if settings.balanced else None,
        )

    return DataLoader(
        parts.samples,
        batch_sampler=chain.from_iterable(map(batches_of, range(progress.epoch, settings.epochs))),
        collate_fn=partial(collate, settings.patch_labels, parts.extractor.config.patch_size),
        num_workers=settings.workers,
        prefetch_factor=4 if settings.workers else None,
        worker_init_fn=on_start,
        pin_memory=parts.extractor.device.type == "cuda",
    )


def on_device(
    batches: Iterable[Batch], references: ReferencePatches, device: torch.device
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Batches, with what of them is needed on the device: images (B, 3, S, S), what was drawn to augment them, and
    reference patches L x (B, K, C).

    A GPU copies and gathers those of the next batch beside its work on this one.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # the references may be on their way yet
    waiting: list[tuple[Batch, list[Tensor]]] = []
    for batch in batches:
        with torch.cuda.stream(stream):
            own = (to_device(tensor, device, tensor.dtype) for tensor in (batch.images, batch.augmentations))
            inputs = [*own, *references.gather(batch.references)]
        yield from waiting
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in inputs:
                tensor.record_stream(torch.cuda.current_stream(device))
        waiting = [(batch, inputs)]
    yield from waiting


def compiled(parts: Parts, state: TrainingState) -> list[Any]:
    """What makes views, encodes and projects: compiled on request, gradients exchanged between processes."""
    extractor = parts.extractor
    project: nn.Module = state.projectors
    if parts.settings.precision != "float32":
        # In autocast's precision already: it would cast frozen matrices at every step.
        backbone = copy.deepcopy(extractor.backbone)
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        extractor = ADPretrainFeatureExtractor(extractor.config, backbone, extractor.projectors, extractor.variant)
    if distributed.world_size() > 1:
        project = DistributedDataParallel(project, gradient_as_bucket_view=True)
    functions: list[Any] = [augment, extractor.encode, project]
    return [torch.compile(one, dynamic=False) for one in functions] if parts.settings.compile else functions


def _crops(
    settings: PretrainSettings, size: int, cache: Path, keys: Sequence[str], data: TrainingData
) -> SlotFile | None:
    """Where decoded crops are kept, if they take at most half of the disk's free room."""
    if not settings.cache_crops:
        return None
    cache.mkdir(parents=True, exist_ok=True)
    file = identified(cache / "crops.bin", size, keys, content_keys(data.dataset["mask"]))
    free = shutil.disk_usage(cache).free + (file.stat().st_blocks * 512 if file.exists() else 0)
    needed = 4 * size**2 * len(data.positions)
    if distributed.anyone(needed > free / 2):
        sizes = f"{needed / 1e9:.3g} GB, more than half of {free / 1e9:.3g} GB that are free"
        _LOG.warning("every epoch decodes its images anew: their crops would take %s", sizes)
        return None
    return SlotFile(file, slots=len(keys), shape=(4, size, size), dtype=torch.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the docstring of the module. Returns the exit code, see ``run_program``."""
    parser = ArgumentParser(prog="python -m training.pretrain", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--push", metavar="OWNER/NAME", help="push the bundle to the Hub at the end")
    parser.add_argument("--public", action="store_true", help="push to a public repository; private by default")

    def run() -> int:
        args = parse(PretrainSettings, parser, argv)
        settings, private = settings_of(PretrainSettings, args), None if args.public else True
        command = shlex.join(["python", "-m", "training.pretrain", *(sys.argv[1:] if argv is None else argv)])
        with distributed.process_group():
            pushes = args.push and distributed.rank() == 0
            if pushes:
                check_rights(args.push, private=private)
            signal = pretrain(settings, args.output, resume=args.resume, command=command)
            if pushes and not signal:
                pusher = BundlePusher(RunFolder(args.output).bundle, args.push, private=private)
                print(pusher.push("Upload pretrained projectors"))
        return 128 + signal if signal else 0

    return run_program("pretrain", run, stopped="the same command with --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
