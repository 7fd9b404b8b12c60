"""Running cells: encode, make features, fit a detector, test it, keep the result."""

import contextlib
import gc
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adpretrain_hf.errors import ImageError, InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import combined_digest, tensor_digest
from adpretrain_hf.images import choose_device
from training.data.folders import Category
from training.data.table import Row
from training.evaluation import store
from training.evaluation.data import category_names, read_category
from training.evaluation.detectors import DETECTORS, PublishedDetector
from training.evaluation.draws import Drawn, draw_few_shot, draw_training, read_reference_lists, unlabelled
from training.evaluation.encoded import EncodedBackbone, EncodedImages, MakeFeatures, feature_maker, score_images
from training.evaluation.figures import choose_shown, sample_patches
from training.evaluation.metrics import measure
from training.evaluation.plan import Cell, Plan

_LOG = logging.getLogger(__name__)
_KEPT = 16  # categories
_TEXTURES = 20  # images of each other category that painted anomalies are made of

Predict = Callable[[Cell], tuple[np.ndarray, np.ndarray]]  # maps (N, H, W) and scores (N,) of a cell's test images


class Evaluation:
    """What the cells of a plan share: the extractors, the images that are encoded, and what is drawn of them.

    Args:
        plan: what is evaluated, and how.

    Attributes:
        with_variant: the bundle with one of its variants of projectors.
        extractor: with the default one.

    Raises:
        InputError: the bundle or the lists of references cannot be read, or there is no such device.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.device = plan, choose_device(plan.device)
        self._lists = read_reference_lists(plan.references) if plan.references else None
        self.with_variant = lru_cache(self._load)
        self.extractor = self.with_variant(None)
        self._category = lru_cache(_KEPT)(self._read_category)
        self._encoded: dict[tuple[str, str], tuple[EncodedImages, dict[Row, int]]] = {}
        self._tokens = Path(plan.output, "tokens")

    def identity(self, variants: Sequence[str]) -> dict[str, str]:
        """What of the bundle decides results, by name.

        Args:
            variants: that are used.

        Raises:
            BundleError: the bundle does not have one of them.
        """
        config = self.extractor.config
        identity = {"bundle": config.fingerprint, "residual scale": str(config.residual_scale)}
        for variant in variants:
            weights = sorted(self.with_variant(variant).projectors.state_dict().items())
            identity[f"weights of {variant}"] = combined_digest(tensor_digest(tensor.cpu()) for _, tensor in weights)
        return identity

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs cells that one model serves, and saves their results; those that are done are left alone.

        Where a detector fails, of memory that runs out or of too few images for it, its cells get that as their result,
        and others go on.

        Args:
            cells: that differ in the category alone.

        Raises:
            InputError: an image cannot be used, or there are fewer than a cell asks for; the message names the cell.
        """
        for cell in cells:
            _take_over(self.plan, cell)
        pending = [cell for cell in cells if not store.is_done(self.plan.output, cell)]
        if not pending:
            return
        try:
            drawn = {cell: self.draw(cell) for cell in cells}
        except InputError as error:
            raise InputError(f"{pending[0].name}: {error}") from error
        try:
            self._fit_and_test(drawn, pending)
        except ImageError as error:
            raise InputError(f"{pending[0].name}: {error}") from error
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            return
        # Not in the handler, which keeps the tensors of all frames that the error came through.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for cell in pending:
            if not store.is_done(self.plan.output, cell):
                _LOG.warning("%s failed: %s", cell.name, reason)
                store.save_failure(self.plan.output, cell, reason)

    def forget(self, but: Iterable[Cell] = ()) -> None:
        """Drops what is encoded, but for the categories of some cells."""
        kept = {(cell.data_set, cell.category) for cell in but}
        for key in self._encoded.keys() - kept:
            del self._encoded[key]
            self._file(*key).unlink(missing_ok=True)
        if not kept:
            shutil.rmtree(self._tokens, ignore_errors=True)

    def draw(self, cell: Cell) -> Drawn:
        """The images of a cell.

        Raises:
            InputError: fewer images than the cell asks for, or no list of references for its category.
        """
        if self.plan.protocol == "few-shot":
            return draw_few_shot(self._category(cell.data_set, cell.category), cell)
        return draw_training(self._category(cell.data_set, cell.category), cell, self._listed(cell))

    def features(self, cell: Cell, drawn: Drawn) -> MakeFeatures:
        """How the features of a cell are made, of images by their places."""
        references = self.places(cell, drawn.references).tolist()
        return feature_maker(self.encoded(cell), self.with_variant(cell.variant or None), cell.features, references)

    def encoded(self, cell: Cell) -> EncodedImages:
        """The images of a cell's category, and those that are listed as its references."""
        return self._of_category(cell)[0]

    def places(self, cell: Cell, samples: Sequence[Row]) -> Tensor:
        """Where images are among those."""
        places = self._of_category(cell)[1]
        return torch.tensor([places[sample] for sample in samples])

    def _load(self, variant: str | None) -> ADPretrainFeatureExtractor:
        plan = self.plan
        return ADPretrainFeatureExtractor.from_pretrained(
            plan.bundle, variant=variant, device=self.device, **plan.preparation
        )

    def _of_category(self, cell: Cell) -> tuple[EncodedImages, dict[Row, int]]:
        key = cell.data_set, cell.category
        if key not in self._encoded:
            category = self._category(*key)
            listed = map(unlabelled, self._listed(cell) or ())
            samples = list(dict.fromkeys([*category.train, *category.test, *listed]))
            images = [{"bytes": None, "path": sample.image} for sample in samples]
            masks = [{"bytes": None, "path": sample.mask} if sample.mask else None for sample in samples]
            encoded = EncodedImages(self.extractor, images, masks, self._file(*key))
            self._encoded[key] = encoded, {sample: place for place, sample in enumerate(samples)}
        return self._encoded[key]

    def _listed(self, cell: Cell) -> list[Path] | None:
        """The fixed references of a category, by ``data_set/category`` or by a name that only one data set has."""
        if self._lists is None:
            return None
        name = f"{cell.data_set}/{cell.category}"
        if name not in self._lists and cell.category not in self._lists:
            raise InputError(f"{self.plan.references} lists no references for the category {cell.category}")
        sharing = [one for one, root in self.plan.data.items() if cell.category in category_names(one, root)]
        if name not in self._lists and len(sharing) > 1:
            raise InputError(
                f"{self.plan.references} lists references for {cell.category}, which {' and '.join(sharing)} have: "
                f"name them {name} and so on"
            )
        return self._lists.get(name, self._lists.get(cell.category))

    def _file(self, data_set: str, category: str) -> Path:
        return self._tokens / f"{data_set}__{category}.bin".replace("/", "_")

    def _read_category(self, data_set: str, name: str) -> Category:
        return read_category(data_set, Path(self.plan.data[data_set]), name)

    def _fit_and_test(self, drawn: dict[Cell, Drawn], pending: Sequence[Cell]) -> None:
        began = time.monotonic()
        fit = self._fit_published if DETECTORS[pending[0].detector].published else self._fit_anomalib
        predict = fit(drawn)
        seconds = (time.monotonic() - began) / len(drawn)
        for cell in pending:
            began = time.monotonic()
            maps, scores = predict(cell)
            self._keep(cell, drawn[cell], maps, scores, seconds + time.monotonic() - began)

    def _fit_published(self, drawn: dict[Cell, Drawn]) -> Predict:
        ((cell, images),) = drawn.items()
        make, own = self.features(cell, images), self.plan.set.get(cell.detector, {})
        detector: PublishedDetector = DETECTORS[cell.detector].make(**own)
        parts = [make(part) for part in self.places(cell, images.train).split(self.plan.batch_size)]
        detector.fit([torch.cat(level) for level in zip(*parts, strict=True)])
        del parts  # as large as what the detector keeps

        def predict(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
            test = self.places(cell, images.test)
            maps, scores = score_images(detector, make, test, self.encoded(cell), self.plan.batch_size)
            return maps.numpy(), scores.numpy()

        return predict

    def _fit_anomalib(self, drawn: dict[Cell, Drawn]) -> Predict:
        from lightning.pytorch import seed_everything

        from training.evaluation import anomalib_models as models  # importing anomalib takes seconds

        plan, first = self.plan, next(iter(drawn))
        kind, own = DETECTORS[first.detector], plan.set.get(first.detector, {})
        seed_everything(first.seed, verbose=False)
        without = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
        with models.quietly():
            own = {"features": first.features, **plan.preparation, **own}
            model = kind.make(plan.bundle, variant=first.variant or None, **own, **without)
        extractor = model.features.extractor
        extractor.set_submodule("backbone", EncodedBackbone(extractor.backbone, list(map(self.encoded, drawn))))
        banks = {cell: self._references(cell, images) for cell, images in drawn.items()}
        for cell, images in drawn.items():
            self.encoded(cell).encode(self.places(cell, images.train).tolist())
        if kind.serves_all:
            levels = [int(name.removeprefix("layer")) for name in model.features.layers]
            of_path = {one.image: banks[cell] for cell, images in drawn.items() for one in images.train}
            model.install_features(models.CategoryFeatures(model.features, levels, of_path))
        models.give_textures(model, self._textures(first))
        model.set_reference(*banks[first])
        train = [sample for images in drawn.values() for sample in images.train]
        settings = self.extractor.preprocess, plan.batch_size, plan.workers
        batches = models.image_batches(train, *settings, shuffle=True)
        models.fit(model, batches, epochs=plan.epochs_of(first.detector), device=self.device)

        def predict(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
            test = drawn[cell].test
            self.encoded(cell).encode(self.places(cell, test).tolist())
            model.set_reference(*banks[cell])
            ask = models.predict_likelihoods if kind.has_likelihoods else models.predict
            return ask(model, models.image_batches(test, *settings), device=self.device)

        return predict

    def _textures(self, cell: Cell) -> list[Path]:
        """Some images of the data set's other categories."""
        names = category_names(cell.data_set, self.plan.data[cell.data_set])
        images: list[Path] = []
        for name in [name for name in names if name != cell.category][: _KEPT - 1]:
            with contextlib.suppress(InputError):  # one that is not unpacked, for example
                images += [Path(sample.image) for sample in self._category(cell.data_set, name).train[:_TEXTURES]]
        return images

    def _references(self, cell: Cell, drawn: Drawn) -> tuple[Any, list[str]]:
        places = self.places(cell, drawn.references).tolist()
        return self.encoded(cell).bank(places), [sample.image for sample in drawn.references]

    def _keep(self, cell: Cell, drawn: Drawn, maps: np.ndarray, scores: np.ndarray, seconds: float) -> None:
        samples, places = drawn.test, self.places(cell, drawn.test)
        labels = np.array([sample.is_anomalous for sample in samples])
        are_known = all(sample.mask for sample in samples if sample.is_anomalous)
        masks = self.encoded(cell).masks(places).numpy() if are_known else None
        metrics = measure(maps, scores, labels, masks)
        if masks is not None and not store.patches_file(self.plan.output, cell).is_file():
            make = self.features(cell, drawn)
            deepest = torch.cat([make(part)[-1].cpu() for part in places.split(self.plan.batch_size)])
            store.save_patches(self.plan.output, sample_patches(cell, deepest, masks, self.extractor.config.patch_size))
        root = Path(self.plan.data[cell.data_set]).absolute()
        names = [Path(sample.image).relative_to(root).as_posix() for sample in samples]
        defects = [sample.anomaly_class for sample in samples]
        result = store.Result(cell, metrics, scores.tolist(), labels.tolist(), names, seconds, defects)
        shown = choose_shown(maps, scores, masks, samples, self.extractor.preprocess)
        store.save_result(self.plan.output, result, shown)


def _take_over(plan: Plan, cell: Cell) -> None:
    """Gives a cell of raw features the result of one with another number of references, which these do not know."""
    if cell.features != "raw" or plan.protocol == "few-shot" or store.is_done(plan.output, cell):
        return
    for other in (replace(cell, shots=shots) for shots in plan.shots):
        if store.is_done(plan.output, other):
            store.copy_result(plan.output, other, cell)
            return
