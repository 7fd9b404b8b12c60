"""The detectors that are compared."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adpretrain_hf.errors import InputError
from training.evaluation import published


@dataclass(frozen=True)
class Detector:
    """One detector and how it is run.

    Attributes:
        variant: of the projectors that the paper gives it.
        published: its class in ``published``, whose protocol is the paper's; None for one of anomalib's models.
        model: name of its class in ``adpretrain_hf.integrations.anomalib``.
        epochs: passes over the training images, unless a plan says otherwise.
        serves_all: one model is fitted on all categories of a data set.
        has_likelihoods: its scores are relative to the largest likelihood of all test images, see
            ``predict_likelihoods``.
    """

    variant: str
    published: type[published.Detector] | None = None
    model: str = ""
    epochs: int = 1
    serves_all: bool = False
    has_likelihoods: bool = False

    def make(self, *arguments: Any, **settings: Any) -> Any:
        """A new one, of its settings; anomalib is imported only now, for that takes seconds."""
        return self._class(*arguments, **settings)

    @property
    def _class(self) -> Any:
        if self.published is not None:
            return self.published
        return getattr(importlib.import_module("adpretrain_hf.integrations.anomalib"), self.model)

    def settings(self) -> list[str]:
        """The names of its own settings."""
        own = inspect.signature(self._class.__init__).parameters.values()
        return [one.name for one in own if one.kind is one.KEYWORD_ONLY] + ([] if self.published else ["levels"])


# Epochs are what two cores can do in an evaluation of minutes; published are 25 (CFLOW, with 8 passes over the data in
# each), 640 (GLASS) and 1000 (UniAD).
DETECTORS: Mapping[str, Detector] = {
    "featurenorm": Detector("norm", published.FeatureNorm),
    "patchcore": Detector("angle", published.PatchCore),
    "padim": Detector("angle", published.Padim),
    "cflow": Detector("norm", model="ADPretrainCflow", epochs=3, has_likelihoods=True),
    "glass": Detector("norm", model="ADPretrainGlass", epochs=5),
    "uniad": Detector("norm", model="ADPretrainUniad", epochs=6, serves_all=True),
    "anomalib_patchcore": Detector("angle", model="ADPretrainPatchcore"),
    "anomalib_padim": Detector("angle", model="ADPretrainPadim"),
}
PAPER = tuple(DETECTORS)[:6]  # those of the paper's tables


def check_settings(detector: str, names: Iterable[str]) -> None:
    """Checks names of a detector's own settings: those of its model, and for anomalib's the levels.

    Raises:
        InputError: one that it does not have; the message lists those that it has.
    """
    known = DETECTORS[detector].settings()
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{detector} has no setting {', '.join(unknown)}: expected some of {', '.join(known)}")
