"""What the cells of a plan share: the extractor, what it remembers, data sets and reference banks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch.utils.data import DataLoader

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import combined_digest, tensor_digest
from adpretrain_hf.images import choose_device
from training.evaluation.cells import Cell
from training.evaluation.data_sets import Category, Sample, read_category
from training.evaluation.images import ImageFiles
from training.evaluation.memory import Memory
from training.evaluation.plan import Plan
from training.evaluation.remember import CategoryReferences, RememberedBackbone
from training.evaluation.sampling import Drawn, draw_training, read_reference_lists

_MEMORY = 2 * 2**30  # bytes; an image of a ViT-S with 3 levels at 224 px takes 1.2 MB, of a ViT-L with 4 levels 4.2 MB
_KEPT = 16  # categories, and banks


class Shared:
    """What the cells of a plan share.

    Args:
        plan: what is evaluated, and how.

    Attributes:
        plan: the plan.
        device: that is computed on.
        memory: of tokens and features.
        extractor: of the bundle, with its default projectors; it prepares images and makes reference banks.

    Raises:
        InputError: the bundle or the lists of references cannot be read, or there is no such device.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = choose_device(plan.device)
        self._lists = read_reference_lists(plan.references) if plan.references else None
        self.memory = Memory(_MEMORY)
        self.extractor = ADPretrainFeatureExtractor.from_pretrained(plan.bundle, device=self.device)
        self.remember_tokens(self.extractor)
        self.category = lru_cache(_KEPT)(self._read_category)
        self._bank = lru_cache(_KEPT)(self._make_bank)

    def identity(self, variants: Sequence[str]) -> dict[str, str]:
        """What of the bundle decides results, by name.

        Args:
            variants: that are used.

        Raises:
            BundleError: the bundle does not have one of them.
        """
        identity = {"bundle": self.extractor.config.fingerprint}
        for variant in variants:
            loaded = ADPretrainFeatureExtractor.from_pretrained(self.plan.bundle, variant=variant, device="cpu")
            weights = sorted(loaded.projectors.state_dict().items())
            identity[f"weights of {variant}"] = combined_digest(tensor_digest(tensor) for _, tensor in weights)
        return identity

    def remember_tokens(self, extractor: ADPretrainFeatureExtractor) -> None:
        """Lets an extractor of the bundle look up the tokens that another one has computed."""
        extractor.set_submodule("backbone", RememberedBackbone(extractor.backbone, self.memory))

    def draw(self, cell: Cell) -> Drawn:
        """The images of a cell.

        Raises:
            InputError: fewer images than the cell asks for, or no list of references for its category.
        """
        if self._lists is not None and cell.category not in self._lists:
            raise InputError(f"{self.plan.references} lists no references for the category {cell.category}")
        listed = None if self._lists is None else self._lists[cell.category]
        return draw_training(self.category(cell.data_set, cell.category), cell, listed)

    def references(self, samples: Sequence[Sample]) -> CategoryReferences:
        """The bank of some reference images."""
        return self._bank(tuple(str(sample.image) for sample in samples))

    def images(self, samples: Sequence[Sample], batch_size: int, *, shuffle: bool = False) -> DataLoader:
        """Batches of prepared images, as anomalib's models take them."""
        files = ImageFiles(samples, self.extractor.preprocess)
        return DataLoader(files, batch_size, shuffle, num_workers=self.plan.workers, collate_fn=files.collate_fn)

    def name(self, cell: Cell, sample: Sample) -> str:
        """An image's path in its data set."""
        return sample.image.relative_to(Path(self.plan.data[cell.data_set]).absolute()).as_posix()

    def _read_category(self, data_set: str, name: str) -> Category:
        return read_category(data_set, Path(self.plan.data[data_set]), name)

    def _make_bank(self, paths: tuple[str, ...]) -> CategoryReferences:
        return CategoryReferences(self.extractor.make_reference(list(paths)), paths)
