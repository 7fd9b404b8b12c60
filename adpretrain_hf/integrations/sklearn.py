"""A scikit-learn transformer: images to one descriptor each, for any detector of vectors (needs the extra ``sklearn``).

Pipeline([
    ("features", ADPretrainTransformer("org/adpretrain-dinov2-large")),
    ("detector", LocalOutlierFactor(novelty=True)),
]).fit(normal_images).decision_function(images)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from adpretrain_hf.errors import InputError, check_count
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import is_prepared, named_sources
from adpretrain_hf.reference import IS_OWN


class ADPretrainTransformer(TransformerMixin, BaseEstimator):
    """Images to descriptors (n, L * C): of each level, the magnitudes of the channels of its longest patch.

    A defect is small and makes long features, whose signs differ from one kind of defect to the next. A mean over all
    patches would hide it.

    Images are whatever ``ADPretrainFeatureExtractor.score`` takes: a folder, paths, PIL images, arrays, or a prepared
    float tensor (n, 3, H, W); also an array of paths.

    Args:
        bundle: id of a repository, or a folder.
        variant: which projectors; the bundle's default by default.
        num_references: how many of the images given to ``fit``, evenly spread over them, become the references; all,
            if there are fewer. The published protocol takes 8.
        num_patches: how many of the longest patches of a level the magnitudes are averaged over.
        batch_size: images at a time.
        device: where to compute; the GPU if there is one, and the CPU otherwise, by default.
        image_size: side in pixels that images are prepared to; the bundle's by default.
        resize_mode: ``"resize"``, the whole image, or ``"crop"``, its centre square; the bundle's by default.

    Attributes:
        extractor_: the extractor, with its reference bank; it is pickled along.
        reference_indices_: which of the images given to ``fit`` are the references.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        variant: str | None = None,
        num_references: int = 8,
        num_patches: int = 1,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        image_size: int | None = None,
        resize_mode: str | None = None,
    ) -> None:
        self.bundle, self.variant, self.device, self.batch_size = bundle, variant, device, batch_size
        self.num_references, self.num_patches = num_references, num_patches
        self.image_size, self.resize_mode = image_size, resize_mode

    def fit(self, images: Any, y: object = None) -> "ADPretrainTransformer":
        """Loads the bundle and takes the references from normal images; ``y`` is not used.

        Raises:
            InputError: no images, or a parameter is out of its range.
            ImageError: an image cannot be used.
        """
        if not isinstance(self.bundle, (str, Path)):
            raise InputError(f"bundle is {self.bundle!r}, expected the id of a repository or a folder")
        for name in ("num_references", "num_patches"):
            check_count(name, getattr(self, name))
        images = _indexable(images)
        number = min(self.num_references, len(images))
        self.reference_indices_ = np.arange(number) * len(images) // number
        given = {name: getattr(self, name) for name in ("variant", "device", "image_size", "resize_mode")}
        extractor = ADPretrainFeatureExtractor.from_pretrained(self.bundle, **given)
        self.extractor_ = extractor.set_reference(_take(images, self.reference_indices_), batch_size=self.batch_size)
        return self

    def fit_transform(self, images: Any, y: object = None, **fit_params: Any) -> Any:
        """Fits, and describes the same images, each reference by what it is against the *other* references.

        Against itself an image has the residual 0, and a detector would learn that normal images have none.

        Raises:
            InputError: fewer than two references, or see ``fit``.
        """
        images = _indexable(images)
        self.fit(images, y, **fit_params)
        number = len(self.reference_indices_)
        if number < 2:
            raise InputError(
                f"got {number} reference image to fit a detector with: expected at least 2 images and "
                "num_references >= 2, for every reference is described by what it is against the others"
            )
        (bank,) = self.extractor_.references.values()
        bank.said.add(IS_OWN)  # here it is meant
        described = self._describe(images)  # the extractor knows its references again, and leaves each out for itself
        bank.said.discard(IS_OWN)
        return described

    def transform(self, images: Any) -> Any:
        """Describes images against all references: (n, L * C), float32.

        Raises:
            NotFittedError: ``fit`` was not called.
            InputError: no images.
            ImageError: an image cannot be used.
        """
        check_is_fitted(self, "extractor_")
        return self._describe(_indexable(images))

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Names of the columns, ``"layer3_0"`` for the first channel of level 3; ``input_features`` is not used."""
        check_is_fitted(self, "extractor_")
        sizes = zip(self.extractor_.layers, self.extractor_.out_dims, strict=True)
        return np.array([f"{layer}_{channel}" for layer, size in sizes for channel in range(size)], dtype=object)

    def _describe(self, images: Tensor | list[Any]) -> np.ndarray:
        stream = self.extractor_.extract(images, batch_size=self.batch_size, progress=False)
        return np.stack([self._pool(features.values()) for features in stream])

    def _pool(self, levels: Iterable[Tensor]) -> np.ndarray:
        """The magnitudes of the channels of each level (C, h, w), averaged over its longest patches: (L * C,)."""
        rows = []
        for level in levels:
            patches = level.float().movedim(-3, 0).flatten(1)  # (C, h*w), of all windows where there are tiles
            longest = patches.norm(dim=0).topk(min(self.num_patches, patches.shape[1])).indices
            rows.append(patches[:, longest].abs().mean(dim=1))
        return torch.cat(rows).cpu().numpy()


def _indexable(images: Any) -> Tensor | list[Any]:
    if is_prepared(images):
        return images.cpu()  # where references are known by their pixels
    return [source for source, _ in named_sources(images)[0]]


def _take(images: Tensor | list[Any], indices: Any) -> Tensor | list[Any]:
    return images[indices] if isinstance(images, Tensor) else [images[index] for index in indices]
