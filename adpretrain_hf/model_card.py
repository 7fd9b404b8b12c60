"""The model card that goes with a bundle."""

from __future__ import annotations

from adpretrain_hf.config import ADPretrainConfig

_TEMPLATE = """\
---
library_name: adpretrain-hf
pipeline_tag: image-feature-extraction
tags:
- arxiv:2511.05245
- anomaly-detection
- industrial-inspection
---

# Features for industrial anomaly detection

Patch features of `{backbone}` for embedding-based anomaly detectors, in the way of ADPretrain
([arXiv 2511.05245](https://arxiv.org/abs/2511.05245)): residuals against the nearest patch of a few normal images, then
one projector for each of the {num_levels} levels.

```python
from adpretrain_hf import ADPretrainFeatureExtractor

extractor = ADPretrainFeatureExtractor.from_pretrained("path/or/repository")
extractor.set_reference("normal_images/")           # a few defect-free images of one product
result = extractor.score("images/")                 # .maps (B, H, W), .scores (B,)
```

| | |
|---|---|
| backbone | `{backbone}`{revision} |
| levels | {levels}, each (B, {hidden_size}, h, w) |
| input | {image_size} px, patches of {patch_size} px |
| tokens scaled to unit length | {normalize_tokens} |

Limits: an image is judged against the reference images that it is given; with references of another product, or with
defects on them, maps and scores mean nothing.
"""


def card_text(config: ADPretrainConfig) -> str:
    """The card of an extractor, as Markdown with front matter."""
    return _TEMPLATE.format(
        backbone=config.backbone,
        revision=f" at `{config.backbone_revision}`" if config.backbone_revision else "",
        num_levels=len(config.layers),
        levels=", ".join(config.layer_names),
        hidden_size=config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        normalize_tokens="yes" if config.normalize_tokens else "no",
    )
