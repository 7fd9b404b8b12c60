"""A frozen vision transformer: images to the patch maps of the chosen blocks, from any source of weights."""

from adpretrain_hf.backbones.pickles import load_pickle
from adpretrain_hf.backbones.sources import (
    describe,
    load_backbone,
    load_same_backbone,
    load_saved_backbone,
    without_path,
)
from adpretrain_hf.backbones.vit import CLIP, IMAGENET, Backbone
