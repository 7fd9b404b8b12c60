"""Anything that a user calls images -> batches that the network takes, and their way to a GPU and back."""

from adpretrain_hf.images.ahead import OnError, read_ahead
from adpretrain_hf.images.augmented import AUGMENTATIONS, choose_augmentation, with_copies
from adpretrain_hf.images.batches import PreparedBatches, by_image
from adpretrain_hf.images.decode import UNREADABLE, ImageSource, read_image, read_mask
from adpretrain_hf.images.preprocessing import (
    PreparedImage,
    Preprocessor,
    check_prepared,
    digests,
    is_prepared,
    normalize,
    stack,
    to_pixels,
)
from adpretrain_hf.images.sources import (
    SUFFIXES,
    ImageState,
    RunImages,
    find_images,
    images_outside,
    is_removed,
    is_same_state,
    list_images,
    named_sources,
    open_images,
    walk_images,
)
from adpretrain_hf.images.tiles import TILE_REFERENCES, Tiles, Windows
from adpretrain_hf.images.transfer import begin_copy, choose_device, to_device, to_host
