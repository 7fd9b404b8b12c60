"""Pretrained features for industrial anomaly detection (ADPretrain, arXiv 2511.05245)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adpretrain_hf.errors import check_environment

if TYPE_CHECKING:
    from adpretrain_hf.config import ADPretrainConfig
    from adpretrain_hf.extractor import ADPretrainFeatureExtractor
    from adpretrain_hf.images import Tiles
    from adpretrain_hf.reference import ReferenceBank

__version__ = "0.1.0"
__all__ = ["ADPretrainConfig", "ADPretrainFeatureExtractor", "ReferenceBank", "Tiles", "__version__"]

_HOMES = {
    "ADPretrainConfig": "config",
    "ADPretrainFeatureExtractor": "extractor",
    "ReferenceBank": "reference",
    "Tiles": "images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_environment()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
