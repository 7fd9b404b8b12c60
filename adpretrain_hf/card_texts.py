"""The prose of the model cards; ``model_card.py`` fills it in."""

TEMPLATE = """\
# {name}

Patch features for industrial anomaly detection, in the way of ADPretrain
([arXiv 2511.05245](https://arxiv.org/abs/2511.05245), NeurIPS 2025). The backbone is frozen. From every patch, the
nearest patch of a few normal images of the same product is subtracted. One projector per level turns these residuals
into features. They replace raw features in detectors such as PatchCore; their norm alone is an anomaly score.

{status}

```python
from adpretrain_hf import ADPretrainFeatureExtractor

extractor = ADPretrainFeatureExtractor.from_pretrained("{repository}")
extractor.set_reference("normal_images")  # a few defect-free images of one product
features = extractor("images")  # {{"layer{first}": (B, {channels}, h, w), ...}}, for a detector
result = extractor.score("images")  # .maps (B, H, W) and .scores (B,), by the norm of the features
```
{command}
## Levels and sizes

{sizes}

{training}

## Results

{results}

## Limits

- It needs normal images: with references of another product, or with defects on them, maps and scores mean nothing.
- An image that is itself a reference has residual 0: it always looks normal.
- Scores of different products, or of different references, are not on one scale.
- A patch is {patch} x {patch} pixels of the {side} px input: defects that are much smaller there are easily missed.
{limits}
## Where the backbone comes from

{backbone}

## Licence

{license}

## Citation

```bibtex
@inproceedings{{adpretrain2025,
  title     = {{ADPretrain: Advancing Industrial Anomaly Detection via Anomaly Representation Pretraining}},
  author    = {{Yao, Xincheng and Luo, Yan and Qian, Zefeng and Zhang, Chongyang}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year      = {{2025}},
  note      = {{arXiv:2511.05245}}
}}
```
"""
UNTRAINED = """\
**Nothing was trained.** The projectors are the identity, as `adpretrain new` makes them: the features are the
residuals. Whoever trains them writes the data, the recipe, the results and the licence into this card."""
TRAINED = """\
The projectors are trained. This card was written by the program that saved them: it does not know the data, the recipe
or the results. Whoever publishes the bundle writes them in, and the licence that the training data demand."""
TRAINED_HERE = """\
The projectors are trained; data, recipe and what was measured stand below. Whoever publishes the bundle names the
licence that the training data demand in the front matter."""
RELEASED = """\
The projectors are those that the authors released ([xcyao00/ADPretrain](https://huggingface.co/xcyao00/ADPretrain)), as
safetensors, their values unchanged."""
COMMAND = """
The bundle is made by

```bash
adpretrain convert --backbone {preset} --from-hub xcyao00/ADPretrain --output {name}
```
"""
VARIANTS = """\
## Variants

- `angle`, for PatchCore and PaDiM: the epoch that scored best under PatchCore.
- `norm`, for `score` (FeatureNorm), CFLOW, GLASS and UniAD: the epoch that scored best under FeatureNorm.

In this bundle: {variants}. The first is the default; `from_pretrained(..., variant=...)` chooses.
"""
RECIPE = """
## Training

One run of the authors gave both variants. It used all images of
[RealIAD](https://huggingface.co/datasets/Real-IAD/Real-IAD), whatever their split: 30 classes, 5 views, 151,050 images,
99,721 of them normal.

- Queries: two views of each image, with colour jitter (0.4, 0.4, 0.4, 0.1; in 80 %), grayscale (in 20 %) and Gaussian
  blur (sigma 0.1 to 2; in 50 %), without geometric change.
- References: 1, 4 or 8 normal images of the same class and view, drawn at random, not augmented.
- Losses: the paper's angle loss (temperature 0.15) and norm loss, summed over the levels.
- Adam, learning rate 1e-4 (x 0.1 after epochs 7 and 9), weight decay 5e-4, 10 epochs, batches of 32.

Known defects of that run:

- The variants were chosen on MVTecAD's test set.
- RealIAD's test split was trained on, so RealIAD is no evaluation set.
- The weights were bfloat16 throughout, without float32 copies."""
WRONG_STATISTICS = (
    "\n- DINOv2 training queries were normalised with CLIP's statistics, all other images with ImageNet's."
)
RELEASED_LIMITS = """\
- RealIAD cannot serve for evaluation, and scores on MVTecAD's test set are optimistic (see the training).
- A projector averages over all patches: its features depend on the size of the input. It was trained at 224 px.
"""
TABLE_NOTES = """
Values in %; "a -> b": raw -> pretrained features, "+a": gain over raw features in points. PRO: area under the
per-region overlap curve up to a false positive rate of 0.3. The authors test with 8 normal images per class as
references."""
NO_SCORES = """\
Each checkpoint stores MVTecAD scores of its epoch. They are added by `adpretrain convert`, to the card of the bundle
that it makes; this card was written without the checkpoints."""
LICENSE_OF_DATA = """\
CC-BY-NC-SA-4.0, which is non-commercial: the projectors were trained on RealIAD, and these are the terms of its data.
The authors' code is under MIT. The backbone keeps its own licence: {backbone}."""
