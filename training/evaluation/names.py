"""How people call what the cells of an evaluation are named by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1": "pixel F1-max",
    "aupro": "AUPRO",
}
DECISION_NAMES = {
    "overkill_2": "images at 2 %",
    "overkill_5": "at 5 %",
    "overkill_10": "at 10 %",
    "object_auroc": "object AUROC",
    "object_overkill_2": "objects at 2 %",
    "object_overkill_5": "at 5 %",
    "object_overkill_10": "at 10 %",
}
SETTINGS = ("shots", "noise", "fraction")
_DETECTORS = {
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "cflow": "CFLOW",
    "glass": "GLASS",
    "uniad": "UniAD",
    "featurenorm": "FeatureNorm",
}
_DATA_SETS = {
    "mvtecad": "MVTecAD",
    "visa": "VisA",
    "btad": "BTAD",
    "mvtec3d": "MVTec3D-AD",
    "mpdd": "MPDD",
    "realiad": "RealIAD",
}


def detector_name(detector: str) -> str:
    """E.g. ``"PatchCore"`` for ``"patchcore"``; what is not known stays as it is."""
    return _DETECTORS.get(detector, detector)


def data_set_name(data_set: str) -> str:
    """E.g. ``"VisA"`` for ``"visa"``; what is not known stays as it is."""
    return _DATA_SETS.get(data_set, data_set)


def features_name(features: str, variant: str) -> str:
    """E.g. ``"pretrained (norm)"``."""
    return f"{features} ({variant})" if variant else features


def setting_text(setting: str, value: float) -> str:
    """One of ``SETTINGS`` as it stands in a table: shots as a number, shares in percent."""
    return f"{value:d}" if setting == "shots" else f"{100 * value:g} %"


def settings_text(settings: Mapping[str, Any]) -> str:
    """A mapping of ``SETTINGS``, in words."""
    shots, noise, fraction = (settings[name] for name in SETTINGS)
    return (
        f"{shots} reference image{'s' * (shots != 1)}, {setting_text('noise', noise)} anomalies among the training "
        f"images, {setting_text('fraction', fraction)} of the normal training images"
    )
