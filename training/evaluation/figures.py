"""What is looked at: images and patches that are chosen while a cell runs, and the report's pictures.

A picture is the address of an ``img``, with the picture itself in it.
"""

import io
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve
from torch import Tensor

from adpretrain_hf.images import Preprocessor
from adpretrain_hf.overlays import colour_range, overlay
from training.data.samples import published_labels
from training.data.table import Row
from training.evaluation.metrics import auroc
from training.evaluation.plan import FEATURES, Cell
from training.evaluation.store import PatchSample, Result, Shown
from training.evaluation.tables import features_name

_BEST, _WORST = 2, 2
_LARGEST = float(np.finfo(np.float16).max)
_TILE, _GAP = 128, 2  # pixels of a strip
_PATCHES = 300  # that are kept, of each kind
_DRAWN = 200  # of a sample: t-SNE takes some 3 ms each
_PANEL_INCHES = 2.6  # the width of a sample: 250 CSS pixels in the template
_KINDS = (("normal", "#4878a8"), ("anomalous", "#d1495b"))
# Told apart by dashes too; variants differ in width.
_LINES = {"raw": ("#8a8a8a", ":"), "residual": ("#e08e1b", "--"), "pretrained": ("#1d5fa8", "-")}
_RATES = np.linspace(0, 1, 201)
# Glyphs as shapes look alike everywhere; with a fixed salt the same results make the same file. A name is no formula.
_STYLE: Any = {
    **{"svg.fonttype": "path", "svg.hashsalt": "report", "font.size": 9.0, "axes.titlesize": 9.0},
    **{"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
}


# Image, mask and map of the anomalies that are found best and worst


def choose_shown(
    maps: np.ndarray, scores: np.ndarray, masks: np.ndarray | None, rows: Sequence[Row], preprocess: Preprocessor
) -> Shown:
    """The anomalous images whose anomalies are found best and worst, with masks and maps.

    How well one is found is its own pixel AUROC; where masks are not known, its score.

    Args:
        maps: (N, S, S), larger for more anomalous.
        scores: (N,), of the images.
        masks: (N, S, S), bool; None where the anomalous pixels are not known.
        rows, preprocess: the N images, and how they were prepared.
    """
    places = [place for place, row in enumerate(rows) if row.is_anomalous]
    if masks is None:
        masks, found = np.zeros(maps.shape, dtype=bool), {place: scores[place] for place in places}
    else:
        # A crop may cut the whole anomaly off, and some anomalies fill the image: no AUROC then.
        found = {p: auroc(maps[p, None], masks[p, None]) for p in places if 0 < masks[p].mean() < 1}
    order = sorted(found, key=lambda place: found[place], reverse=True)
    chosen = np.array(order[:_BEST] + order[_BEST:][-_WORST:], dtype=int)
    images = [preprocess.prepare(rows[place].image).pixels.permute(1, 2, 0).numpy() for place in chosen]
    maps = np.clip(maps[chosen], -_LARGEST, _LARGEST).astype(np.float16)
    return Shown(chosen, np.array(images, dtype=np.uint8).reshape(*maps.shape, 3), masks[chosen], maps)


def strips(result: Result, shown: Shown) -> Iterator[tuple[str, str, str]]:
    """Image, mask and map side by side, best first; all maps of a cell have one range of colours.

    Returns:
        For each image its rank, which says nothing of how well its anomaly is found; which image it is, and where its
        mask is known how well its anomaly is found; and the picture.
    """
    if not len(shown.indices):
        return
    maps = shown.maps.astype(np.float32)
    colours = colour_range(maps)
    for place, index in enumerate(shown.indices):
        image, mask = Image.fromarray(shown.images[place]), shown.masks[place]
        tiles = [image, Image.fromarray(mask).convert("RGB"), overlay(image, maps[place], colours)]
        joined = Image.new("RGB", (3 * _TILE + 2 * _GAP, _TILE), "white")
        for n, tile in enumerate(tiles):
            joined.paste(tile.resize((_TILE, _TILE), Image.Resampling.BILINEAR), (n * (_TILE + _GAP), 0))
        caption = f"{result.names[index]}, score {result.scores[index]:.4g}"
        if mask.any() and not mask.all():
            caption += f", pixel AUROC {100 * auroc(maps[place, None], mask[None]):.1f}"
        rank = "best" if place < (len(maps) + 1) // 2 else "worst"
        yield rank, caption, _address("jpeg", joined.save, quality=75, optimize=True)


# Patch features in the plane


def sample_patches(cell: Cell, features: Tensor, masks: np.ndarray, patch_size: int) -> PatchSample:
    """Some normal and anomalous patches of test images, drawn by the cell's seed.

    Args:
        features: (N, C, h, w), of one level.
        masks: (N, S, S), bool.
    """
    labels = published_labels(torch.from_numpy(masks), patch_size)[0].bool().flatten().numpy()
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    random = np.random.default_rng(cell.seed)
    kinds = [np.flatnonzero(labels == kind) for kind in (False, True)]
    chosen = np.concatenate([np.sort(random.permutation(kind)[:_PATCHES]) for kind in kinds])
    values = rows[torch.from_numpy(chosen)].float().cpu().numpy()
    return PatchSample(cell.data_set, cell.category, cell.features, cell.variant, values, labels[chosen])


def project(sample: PatchSample) -> tuple[np.ndarray, np.ndarray]:
    """Lays patches out in a plane by t-SNE; of large samples, some that are drawn by a fixed seed.

    Returns:
        Positions (n, 2) and is_anomalous (n,) of the patches that are shown.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(sample.values))[:_DRAWN])
    tsne = TSNE(2, init="pca", perplexity=min(30, (len(chosen) - 1) / 3), max_iter=500, random_state=0)
    return tsne.fit_transform(sample.values[chosen]), sample.is_anomalous[chosen]


@rc_context(_STYLE)
def scatter_figure(samples: Sequence[PatchSample]) -> str:
    """Patches in a plane, a panel for each sample, 2.6 inches wide."""
    figure = Figure(figsize=(_PANEL_INCHES * len(samples), 2.9), layout="constrained")
    panels = figure.subplots(1, len(samples), squeeze=False)[0]
    for axes, sample in zip(panels, samples, strict=True):
        places, is_anomalous = project(sample)
        for kind, (label, colour) in enumerate(_KINDS):
            axes.scatter(*places[is_anomalous == kind].T, s=6, color=colour, alpha=0.7, linewidths=0, label=label)
        axes.set(title=features_name(sample.features, sample.variant), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color="#cccccc")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=2)
    return _address("png", figure.savefig, dpi=144)


# Image scores of a detector, by kind of features


@rc_context(_STYLE)
def scores_figure(results: Sequence[Result]) -> str:
    """ROC curves of image scores, the mean at equal false positive rates, and a histogram for each kind of features.

    Scores of different categories are not on one scale: unscaled, the widest would be all that is seen. For the
    histograms every cell's are scaled to [0, 1].
    """
    by_kind: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda one: (FEATURES.index(one.cell.features), one.cell.variant)):
        by_kind[result.cell.features, result.cell.variant].append(result)
    widths = [3.6, *(2.5 for _ in by_kind)]
    figure = Figure(figsize=(sum(widths), 3.2), layout="constrained")
    roc, *panels = figure.subplots(1, len(widths), width_ratios=widths)
    roc.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8)
    drawn: Counter[str] = Counter()
    for axes, ((features, variant), ours) in zip(panels, by_kind.items(), strict=True):
        name, (colour, dashes) = features_name(features, variant), _LINES[features]
        drawn[features] += 1
        curves = [roc_curve(result.is_anomalous, result.scores) for result in ours]
        rates = np.mean([np.interp(_RATES, false, true) for false, true, _ in curves], axis=0)
        rates[0] = 0
        roc.plot(_RATES, rates, dashes, color=colour, linewidth=2 / drawn[features], label=name)
        scores = np.concatenate([(np.array(r.scores) - min(r.scores)) / (np.ptp(r.scores) or 1) for r in ours])
        is_anomalous = np.concatenate([result.is_anomalous for result in ours])
        for kind, (label, colour) in enumerate(_KINDS):
            chosen = scores[is_anomalous == kind]
            shares = np.full(len(chosen), 1 / max(1, len(chosen)))
            axes.hist(chosen, 30, range=(0, 1), weights=shares, color=colour, alpha=0.6, label=label)
        axes.sharey(panels[0])
        axes.set(title=name, xlabel="image score", xlim=(0, 1))
    roc.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    roc.legend(loc="lower right")
    panels[0].set_ylabel("share of images")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=2)
    return _address("svg", figure.savefig, metadata={"Date": None})


def _address(kind: str, save: Callable[..., object], **settings: Any) -> str:
    file = io.BytesIO()
    save(file, format=kind, **settings)
    return f"data:image/{kind.replace('svg', 'svg+xml')};base64,{b64encode(file.getvalue()).decode()}"
