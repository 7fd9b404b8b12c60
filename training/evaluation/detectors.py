"""The detectors that are compared."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adpretrain_hf.errors import InputError


@dataclass(frozen=True)
class Detector:
    """One detector and how it is run.

    Attributes:
        model: name of its class in ``adpretrain_hf.integrations.anomalib``.
        variant: of the projectors that the paper gives it.
        epochs: passes over the training images, unless a plan says otherwise.
        serves_all: one model is fitted on all categories of a data set.
        has_likelihoods: its scores are relative to the largest likelihood of all test images, see
            ``predict_likelihoods``.
    """

    model: str
    variant: str
    epochs: int = 1
    serves_all: bool = False
    has_likelihoods: bool = False


# In the order in which they are run on a category: GLASS, whose synthetic images are all new, pushes out of memory what
# the others share. Epochs are what two cores can do in an evaluation of minutes; published are 25 (CFLOW, with 8 passes
# over the data in each), 640 (GLASS) and 1000 (UniAD).
DETECTORS: Mapping[str, Detector] = {
    "featurenorm": Detector("ADPretrainFeatureNorm", "norm"),
    "patchcore": Detector("ADPretrainPatchcore", "angle"),
    "padim": Detector("ADPretrainPadim", "angle"),
    "cflow": Detector("ADPretrainCflow", "norm", epochs=3, has_likelihoods=True),
    "glass": Detector("ADPretrainGlass", "norm", epochs=5),
    "uniad": Detector("ADPretrainUniad", "norm", epochs=6, serves_all=True),
}


def model_class(detector: str) -> Any:
    """The class of a detector's model; anomalib is imported only now, for that takes seconds."""
    return getattr(importlib.import_module("adpretrain_hf.integrations.anomalib"), DETECTORS[detector].model)


def check_settings(detector: str, names: Iterable[str]) -> None:
    """Checks names of a detector's own settings: those of its model, and the levels.

    Raises:
        InputError: one that it does not have; the message lists those that it has.
    """
    own = inspect.signature(model_class(detector).__init__).parameters.values()
    known = [one.name for one in own if one.kind is one.KEYWORD_ONLY] + ["levels"]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{detector} has no setting {', '.join(unknown)}: expected some of {', '.join(known)}")
