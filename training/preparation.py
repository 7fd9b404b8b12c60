"""What a run needs before its first step: data, extractor, references, validation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adpretrain_hf.errors import ImageError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from training import distributed
from training.content_keys import content_keys
from training.initialisation import initialise
from training.reference_cache import ReferenceCache
from training.reference_encoding import ReferenceEncoder
from training.reference_pool import ReferencePool
from training.references import References
from training.run_folder import RunFolder
from training.samples import Samples
from training.settings import PretrainSettings
from training.training_data import TrainingData, load_training_data
from training.validation import Validation

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """The fixed parts of a run.

    Attributes:
        settings: of the run.
        data: images and the split of their categories.
        extractor: frozen backbone and new projectors, on this process's device.
        samples: training images as augmented views.
        references: reference patches for every step.
        validation: judges every epoch.
    """

    settings: PretrainSettings
    data: TrainingData
    extractor: ADPretrainFeatureExtractor
    samples: Samples
    references: References
    validation: Validation


def prepare(settings: PretrainSettings, run: RunFolder) -> Preparation:
    """Opens the data, loads the backbone, and computes what never changes.

    Raises:
        InputError: the data or the backbone cannot be used.
    """
    data = _first_process_first(lambda: load_training_data(settings, run.path / "synthetic"))
    extractor = make_extractor(settings)
    samples = Samples(
        data.dataset,
        data.positions,
        extractor.config,
        seed=settings.seed,
        paint_defects=settings.paint_defects,
        plain_first=settings.plain_first,
    )
    references = _references(settings, run, data, extractor, samples)
    return Preparation(settings, data, extractor, samples, references, Validation(settings, run, data, extractor))


def make_extractor(settings: PretrainSettings) -> ADPretrainFeatureExtractor:
    """A new extractor on this process's device; its projectors depend on the seed.

    Raises:
        InputError: the backbone is unknown, or a setting does not fit it.
    """
    overrides: dict[str, Any] = {
        "backbone": settings.upstream,
        "image_size": settings.image_size,
        "layers": settings.levels,
    }
    torch.manual_seed(settings.seed)
    extractor = ADPretrainFeatureExtractor.from_backbone(
        settings.backbone,
        num_reference_tokens=settings.reference_tokens,
        normalize_tokens=settings.normalize_tokens,
        **{name: value for name, value in overrides.items() if value},
    )
    initialise(extractor.projectors, settings.init_scale)
    return extractor.to(distributed.local_device(settings.device))


def _references(
    settings: PretrainSettings,
    run: RunFolder,
    data: TrainingData,
    extractor: ADPretrainFeatureExtractor,
    samples: Samples,
) -> References:
    columns = (data.dataset[name] for name in ("category", "view", "is_anomalous"))
    pool = ReferencePool(*columns, among=data.positions, pool_size=settings.pool_size or None, seed=settings.seed)
    encoder = ReferenceEncoder(
        extractor, samples.load_normal, autocast=torch.bfloat16 if settings.precision == "bfloat16" else None
    )
    folder = settings.cache_folder or (run.path / "references" if distributed.world_size() > 1 else None)
    cache = ReferenceCache(
        encoder, content_keys(data.dataset["image"]), memory_bytes=int(settings.cache_gb * 1e9) or None, folder=folder
    )
    return References(data, _fill(cache, pool), cache, settings)


def _fill(cache: ReferenceCache, pool: ReferencePool) -> ReferencePool:
    """Encodes the pool, each process a share of it, and leaves out what cannot be read: everywhere the same."""
    unreadable: dict[int, ImageError] = {}
    share = pool.members[distributed.rank() :: distributed.world_size()]
    cache.fill(share, progress=distributed.rank() == 0, on_unreadable=unreadable.__setitem__)
    distributed.wait_for_all()
    cache.fill(pool.members, on_unreadable=unreadable.__setitem__)
    for error in unreadable.values():
        _LOG.warning("left out as a reference: %s", error)
    return pool.without(unreadable)


def _first_process_first(open_data: Callable[[], TrainingData]) -> TrainingData:
    """Lets one process draw or download what the others then find."""
    if distributed.rank() > 0:
        distributed.wait_for_all()
    data = open_data()
    if distributed.rank() == 0:
        distributed.wait_for_all()
    return data
