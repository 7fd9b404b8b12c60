"""Running cells: encode, make features, fit a detector, test it, keep the result."""

import contextlib
import gc
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import combined_digest, tensor_digest
from adpretrain_hf.images import choose_device
from training.evaluation import store
from training.evaluation.data import category_names, read_category
from training.evaluation.detectors import DETECTORS
from training.evaluation.draws import Drawn, draw_few_shot, draw_training, read_reference_lists, unlabelled
from training.evaluation.encoded import EncodedBackbone, EncodedImages, MakeFeatures, feature_maker, fit_and_score
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
        made_by: what else each result is to say of where it comes from, see ``Result``.

    Attributes:
        with_variant: the bundle with one of its variants of projectors.
        extractor: with the default one.

    Raises:
        InputError: the bundle or the lists of references cannot be read, or there is no such device.
    """

    def __init__(self, plan: Plan, **made_by: str) -> None:
        self.plan, self.device = plan, choose_device(plan.device)
        self._made_by = {"bundle": plan.bundle, "protocol": plan.protocol, **made_by}
        self._lists = read_reference_lists(plan.references) if plan.references else None
        load = partial(ADPretrainFeatureExtractor.from_pretrained, plan.bundle, device=self.device, **plan.preparation)
        self.with_variant = lru_cache(lambda variant: load(variant=variant))
        self.extractor = self.with_variant(None)
        self._category = lru_cache(_KEPT)(lambda data_set, name: read_category(data_set, plan.data[data_set], name))
        self._encoded: dict[tuple[str, str], EncodedImages] = {}

    def identity(self, variants: Sequence[str]) -> dict[str, str]:
        """What of the bundle and its variants that are used decides results, by name.

        Raises:
            BundleError: the bundle does not have one of them.
        """
        config = self.extractor.config
        identity = {"bundle": config.fingerprint, "residual scale": str(config.residual_scale)}
        for variant in variants:
            weights = sorted(self.with_variant(variant).projectors.state_dict().items())
            identity[f"weights of {variant}"] = combined_digest(tensor_digest(tensor.cpu()) for _, tensor in weights)
        return identity

    def model(self, cell: Cell) -> Any:
        """One of anomalib's models as a cell asks for it, not fitted; it refuses settings out of their range."""
        from training.evaluation import anomalib_models as models  # importing anomalib takes seconds

        own = {"features": cell.features, **self.plan.preparation, **self.plan.set.get(cell.detector, {})}
        own |= dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
        with models.quietly():
            return DETECTORS[cell.detector].kind(self.plan.bundle, variant=cell.variant or None, **own)

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs cells that one model serves, of different categories, and saves their results, if they are not done.

        Where that fails, of memory that runs out, of an image that cannot be used or of too few of them for a detector,
        the cells get that as their result, and others go on.

        Raises:
            InputError: see ``draw``; the message names the cell.
        """
        for cell in cells:
            _take_over(self.plan, cell)
        pending = [cell for cell in cells if not store.is_done(self.plan.output, cell)]
        if not pending:
            return
        reason = self._fit_and_test({cell: self.draw(cell) for cell in cells}, pending)
        for cell in pending:
            if not store.is_done(self.plan.output, cell):
                _LOG.warning("%s failed: %s", cell.name, reason)
                store.save_failure(self.plan.output, cell, reason)
        if reason:
            gc.collect()  # here, where no handler keeps the tensors of the frames that the error came through
            torch.cuda.empty_cache()

    def forget(self, but: Iterable[Cell] = ()) -> None:
        """Drops what is encoded, but for the categories of some cells."""
        kept = {(cell.data_set, cell.category) for cell in but}
        self._encoded = {key: encoded for key, encoded in self._encoded.items() if key in kept}

    def draw(self, cell: Cell) -> Drawn:
        """The images of a cell.

        Raises:
            InputError: the category cannot be read, fewer images than the cell asks for, or no list of references for
                it; the message names the cell.
        """
        try:
            category = self._category(cell.data_set, cell.category)
            if self.plan.protocol == "few-shot":
                return draw_few_shot(category, cell)
            return draw_training(category, cell, self._listed(cell))
        except InputError as error:
            raise InputError(f"{cell.name}: {error}") from error

    def features(self, cell: Cell, drawn: Drawn) -> MakeFeatures:
        """How the features of a cell are made, of images by their places."""
        encoded = self.encoded(cell)
        references = encoded.places(drawn.references).tolist()
        return feature_maker(encoded, self.with_variant(cell.variant or None), cell.features, references)

    def encoded(self, cell: Cell) -> EncodedImages:
        """The images of a cell's category, and those that are listed as its references."""
        key = cell.data_set, cell.category
        if key not in self._encoded:
            category, listed = self._category(*key), map(unlabelled, self._listed(cell) or ())
            rows = {row.image: row for row in (*listed, *category.train, *category.test)}
            images = [{"bytes": None, "path": image} for image in rows]
            masks = [{"bytes": None, "path": row.mask} if row.mask else None for row in rows.values()]
            file = Path(self.plan.output, f"tokens-{os.getpid()}.bin")
            self._encoded[key] = EncodedImages(self.extractor, images, masks, file)
        return self._encoded[key]

    def _listed(self, cell: Cell) -> list[Path] | None:
        """The fixed references of a category, by ``data_set/category`` or by a name that only one data set has."""
        if self._lists is None:
            return None
        name = f"{cell.data_set}/{cell.category}"
        if name in self._lists:
            return self._lists[name]
        if cell.category not in self._lists:
            raise InputError(f"{self.plan.references} lists no references for the category {cell.category}")
        sharing = [one for one, root in self.plan.data.items() if cell.category in category_names(one, root)]
        if len(sharing) > 1:
            raise InputError(
                f"{self.plan.references} lists references for {cell.category}, which {' and '.join(sharing)} have: "
                f"name them {name} and so on"
            )
        return self._lists[cell.category]

    def _fit_and_test(self, drawn: dict[Cell, Drawn], pending: Sequence[Cell]) -> str:
        """Returns why that failed, if it did."""
        began = time.monotonic()
        fit = self._fit_published if DETECTORS[pending[0].detector].published else self._fit_anomalib
        try:
            predict = fit(drawn)
            seconds = (time.monotonic() - began) / len(drawn)
            for cell in pending:
                began = time.monotonic()
                maps, scores = predict(cell)
                self._keep(cell, drawn[cell], maps, scores, seconds + time.monotonic() - began)
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            own = self.plan.set.get(pending[0].detector)
            return f"{type(error).__name__}: {error}" + (f" (with the settings {dict(own)})" if own else "")
        return ""

    def _fit_published(self, drawn: dict[Cell, Drawn]) -> Predict:
        ((cell, images),) = drawn.items()
        make, encoded = self.features(cell, images), self.encoded(cell)
        kind = DETECTORS[cell.detector].kind
        seed = {"seed": cell.seed} if "seed" in inspect.signature(kind).parameters else {}
        detector = kind(**{**seed, **self.plan.set.get(cell.detector, {})})
        train, test = encoded.places(images.train), encoded.places(images.test)
        maps, scores = fit_and_score(detector, make, train, test, encoded, self.plan.batch_size)
        return lambda cell: (maps.numpy(), scores.numpy())

    def _fit_anomalib(self, drawn: dict[Cell, Drawn]) -> Predict:
        from lightning.pytorch import seed_everything

        from training.evaluation import anomalib_models as models

        plan, first = self.plan, next(iter(drawn))
        seed_everything(first.seed, verbose=False)
        model = self.model(first)
        extractor = model.features.extractor
        extractor.set_submodule("backbone", EncodedBackbone(extractor.backbone, list(map(self.encoded, drawn))))
        banks = {}
        for cell, images in drawn.items():
            encoded = self.encoded(cell)
            encoded.encode(encoded.places(images.train).tolist())
            bank = encoded.bank(encoded.places(images.references).tolist())
            banks[cell] = bank, [row.image for row in images.references]
        if DETECTORS[first.detector].serves_all:
            of_path = {one.image: banks[cell] for cell, images in drawn.items() for one in images.train}
            model.install_features(models.CategoryFeatures(model.features, of_path))
        models.give_textures(model, self._textures(first))
        model.set_reference(*banks[first])
        train = [sample for images in drawn.values() for sample in images.train]
        settings = self.extractor.preprocess, plan.batch_size, plan.workers
        batches = models.image_batches(train, *settings, shuffle=True)
        models.fit(model, batches, epochs=plan.epochs_of(first.detector), device=self.device)

        def predict(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
            test, encoded = drawn[cell].test, self.encoded(cell)
            encoded.encode(encoded.places(test).tolist())
            model.set_reference(*banks[cell])
            ask = models.predict_likelihoods if first.detector == "cflow" else models.predict
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

    def _keep(self, cell: Cell, drawn: Drawn, maps: np.ndarray, scores: np.ndarray, seconds: float) -> None:
        samples, encoded = drawn.test, self.encoded(cell)
        places = encoded.places(samples)
        labels = np.array([sample.is_anomalous for sample in samples])
        are_known = all(sample.mask for sample in samples if sample.is_anomalous)
        masks = encoded.masks(places).numpy() if are_known else None
        metrics = measure(maps, scores, labels, masks)
        if masks is not None and not store.patches_file(self.plan.output, cell).is_file():
            make = self.features(cell, drawn)
            deepest = torch.cat([make(part)[-1].cpu() for part in places.split(self.plan.batch_size)])
            store.save_patches(self.plan.output, sample_patches(cell, deepest, masks, self.extractor.config.patch_size))
        root = Path(self.plan.data[cell.data_set]).absolute()
        names = [Path(sample.image).relative_to(root).as_posix() for sample in samples]
        defects = [sample.anomaly_class for sample in samples]
        numbers = metrics, scores.tolist(), labels.tolist(), names, seconds, defects
        result = store.Result(cell, *numbers, self._made_by)
        shown = choose_shown(maps, scores, masks, samples, self.extractor.preprocess)
        store.save_result(self.plan.output, result, shown)


def _take_over(plan: Plan, cell: Cell) -> None:
    """Gives a cell of raw features the result of one with another number of references, which these do not know."""
    if cell.features == "raw" and plan.protocol != "few-shot" and not store.is_done(plan.output, cell):
        others = (replace(cell, shots=shots) for shots in plan.shots)
        if done := next((other for other in others if store.is_done(plan.output, other)), None):
            store.copy_result(plan.output, done, cell)
