"""Images that are given to an extractor by name only, and read in the threads that decode ahead of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable

from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import ImageSource
from adpretrain_hf.preprocessing import PreparedImage, Preprocessor


def reading_from(
    extractor: ADPretrainFeatureExtractor, source: Callable[[str], ImageSource]
) -> ADPretrainFeatureExtractor:
    """The same extractor, for which a text given as an image is a name, which ``source`` turns into the image.

    ``source`` is called in the threads that decode ahead of the network, and errors tell the name.
    """
    reader = copy.copy(extractor)
    reader.preprocess = _NamedImages(extractor.config, source)
    return reader


class _NamedImages(Preprocessor):
    def __init__(self, config: ADPretrainConfig, source: Callable[[str], ImageSource]) -> None:
        super().__init__(config)
        self._source = source

    def prepare(self, source: ImageSource, name: str | None = None) -> PreparedImage:
        name = name or str(source)
        return super().prepare(self._source(name), name)
