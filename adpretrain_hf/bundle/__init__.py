"""An extractor as a bundle on disk or on the Hub: loading, saving, pushing, and the authors' released checkpoints.

What only a push or a conversion needs is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adpretrain_hf.bundle.layout import LAYOUT, image_processor_settings, variants_among, write_config
from adpretrain_hf.bundle.load import describe_bundle, read_preparation, read_projectors
from adpretrain_hf.bundle.mixin import BundleMixin
from adpretrain_hf.bundle.save import write_projectors

if TYPE_CHECKING:
    from adpretrain_hf.bundle.card import card_text
    from adpretrain_hf.bundle.push import BundlePusher, check_rights
    from adpretrain_hf.bundle.released import convert, fetch_released

_ON_REQUEST = {"BundlePusher": "push", "check_rights": "push", "card_text": "card"}
_ON_REQUEST |= {"convert": "released", "fetch_released": "released"}


def __getattr__(name: str) -> Any:
    if name not in _ON_REQUEST:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_REQUEST[name]}"), name)
