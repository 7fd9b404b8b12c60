"""The model card that goes with a bundle.

``python -m adpretrain_hf.model_card hub_cards`` writes the cards of the converted official releases.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCardData

from adpretrain_hf import card_texts as texts
from adpretrain_hf.config import ADPretrainConfig
from adpretrain_hf.files import write_text
from adpretrain_hf.presets import PRESETS
from adpretrain_hf.projector import Projectors
from adpretrain_hf.sources import IMAGENET_MEAN

PUBLISHED = ("dinov2-base", "dinov2-large", "clip-base", "clip-large", "imagebind")
# Scores in the released checkpoints: the name there -> the Hub's name, the name for people.
METRICS = {"img_auc": ("roc_auc", "image AUROC"), "pix_auc": ("roc_auc", "pixel AUROC"), "pix_pro": ("aupro", "PRO")}
_CHOSEN_UNDER = {"angle": "PatchCore", "norm": "FeatureNorm"}
_BY_AUTHORS = "reported by the authors, selected on this test set, not measured here"
_HEADER = ("data set", "variant", "detector", "image AUROC", "pixel AUROC", "PRO", "protocol")
_BY_PAPER = "reported in the paper, not measured here"
# In the body only, as the paper prints them: whether they are those of the released files is not known.
_PAPER: dict[str, list[tuple[str, ...]]] = {
    "dinov2-base": [("MVTecAD", "angle", "PatchCore", "+3.5", "", "+4.7", _BY_PAPER)],
    "clip-base": [("MPDD", "angle", "PatchCore", "+10.1", "", "+28.7", _BY_PAPER)],
    "imagebind": [
        ("VisA", "angle", "PaDiM", "92.6 -> 95.4", "", "86.3 -> 88.7", _BY_PAPER),
        ("VisA", "angle", "PatchCore", "91.6 -> 94.6", "", "81.3 -> 87.0", _BY_PAPER),
        ("VisA", "norm", "FeatureNorm", "49.2 -> 94.2", "", "44.5 -> 89.0", _BY_PAPER),
    ],
}


class _Family(NamedTuple):
    sources: str  # pattern of config.backbone
    license: str  # SPDX; the Hub's id is the same in small letters
    origin: str


_FAMILIES = (
    _Family(
        r"facebook/dinov2(-with-registers)?-(small|base|large|giant)",
        "Apache-2.0",
        "DINOv2 by Meta. Its position grid is resampled when it is loaded, by its authors' rule, not transformers'.",
    ),
    _Family(
        r"open_clip:[^/]+/openai|openai/clip-vit-[\w-]+",
        "MIT",
        "The vision tower of OpenAI's CLIP, with QuickGELU, as a `CLIPVisionModel` of transformers. `base_model`, "
        "where it is given, is OpenAI's own repository of the same weights.",
    ),
    _Family(
        r"imagebind:.+",
        "CC-BY-NC-SA-4.0",
        "The vision trunk of ImageBind-Huge by Meta, as a `CLIPVisionModel` of transformers. The weights are those of "
        "`imagebind_huge.pth`, which Meta offers with [ImageBind](https://github.com/facebookresearch/ImageBind) and "
        "`adpretrain convert` expects in the current folder. There is no official repository with them on the Hub, so "
        "`base_model` is left out.",
    ),
)
_HUB_IDS = {
    "open_clip:ViT-B-16-quickgelu/openai": "openai/clip-vit-base-patch16",
    "open_clip:ViT-L-14-quickgelu/openai": "openai/clip-vit-large-patch14",
}


def card_text(
    config: ADPretrainConfig,
    *,
    repository: str | None = None,
    released: bool | None = None,
    trained: bool = False,
    training: str = "",
    results: str = "",
) -> str:
    """The card of an extractor, as Markdown with front matter.

    Args:
        config: of the extractor.
        repository: id on the Hub, for title and code; a placeholder by default.
        released: whether the projectors are the authors' released ones, rather than new; by default, whether the
            configuration has the scores that come with those.
        trained: whether new projectors are other than the identity.
        training, results: Markdown on how new projectors were trained and what was measured, where it is known.
    """
    released = bool(config.reported_scores) if released is None else released
    repository = repository or f"your-name/adpretrain-{_short_name(config)}"
    name, preset = repository.rpartition("/")[2], _preset(config)
    body = texts.TEMPLATE.format(
        name=name,
        repository=repository,
        status=texts.RELEASED if released else _status(trained, training),
        command=texts.COMMAND.format(preset=preset, name=name) if released and preset in PUBLISHED else "",
        first=config.layers[0],
        channels=config.hidden_size,
        sizes=_sizes(config),
        training=_training(config) if released else f"## Training\n\n{training or _no_training(trained)}",
        results=_results(config) if released else results or _no_results(trained),
        patch=config.patch_size,
        side=config.image_size,
        limits=_limits(config, released),
        backbone=_backbone(config),
        license=_license(config, released, trained),
    )
    return f"---\n{_card_data(config, name, released, trained).to_yaml()}\n---\n\n{body}"


def published_cards() -> dict[str, str]:
    """The cards of the converted official releases, by the name of their repository."""
    return {f"adpretrain-{name}": card_text(ADPretrainConfig.preset(name), released=True) for name in PUBLISHED}


def _status(trained: bool, training: str) -> str:
    if training:
        return texts.TRAINED_HERE
    return texts.TRAINED if trained else texts.UNTRAINED


def _no_training(trained: bool) -> str:
    return "Not recorded." if trained else "None."


def _no_results(trained: bool) -> str:
    return "None is recorded." if trained else "None: nothing was trained, and nothing is claimed."


def _card_data(config: ADPretrainConfig, name: str, released: bool, trained: bool) -> ModelCardData:
    family, results = _family(config), _eval_results(config) if released else []
    # Where the backbone's or the training data's licence is not known there is none: `other` asks for name and link.
    licence = "cc-by-nc-sa-4.0" if released else family.license.lower() if family and not trained else None
    return ModelCardData(
        library_name="adpretrain-hf",
        pipeline_tag="image-feature-extraction",
        license=licence,
        base_model=_base_model(config),
        datasets=["Real-IAD/Real-IAD"] if released else None,
        tags=["arxiv:2511.05245", "anomaly-detection", "industrial-inspection"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(config: ADPretrainConfig) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type="mvtec-ad",
            dataset_name="MVTecAD",
            dataset_split="test",
            metric_type=METRICS[metric][0],
            metric_name=f"{METRICS[metric][1]}, {variant}, {_CHOSEN_UNDER.get(variant, 'unknown')} ({_BY_AUTHORS})",
            metric_value=value,
            verified=False,
            source_name="the authors' checkpoints",
            source_url="https://huggingface.co/xcyao00/ADPretrain",
        )
        for variant, scores in config.reported_scores.items()
        for metric, value in scores.items()
        if metric in METRICS
    ]


def _family(config: ADPretrainConfig) -> _Family | None:
    return next((one for one in _FAMILIES if re.fullmatch(one.sources, config.backbone)), None)


def _base_model(config: ADPretrainConfig) -> str | None:
    # A folder can look like an id: only what has a commit on the Hub, or is known, is taken for one.
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", config.backbone) and (config.backbone_revision or _family(config))
    return config.backbone if is_id else _HUB_IDS.get(config.backbone)


def _preset(config: ADPretrainConfig) -> str | None:
    if config.backbone.startswith("imagebind:"):
        return "imagebind"  # wherever its file lies
    return next((name for name, values in PRESETS.items() if values["backbone"] == config.backbone), None)


def _short_name(config: ADPretrainConfig) -> str:
    last = re.split(r"[/\\:]", config.backbone.rstrip("/\\"))[-1]
    return _preset(config) or re.sub(r"[^A-Za-z0-9]+", "-", last).strip("-") or "features"


def _sizes(config: ADPretrainConfig) -> str:
    with torch.device("meta"):
        parameters = sum(one.numel() for one in Projectors(config).parameters()) / len(config.layers)
    grid = config.image_size // config.patch_size
    crop = f"centre crop, {grid} x {grid} patches" if config.resize_mode == "crop" else "whole image, shorter side"
    scaled = "scaled" if config.normalize_tokens else "not scaled"
    rows = [
        ("levels", f"{', '.join(config.layer_names)}: after these blocks, counted from 1"),
        ("features", f"(B, {config.hidden_size}, h, w) of each level"),
        ("input", f"{config.image_size} px ({crop}), patches of {config.patch_size} px"),
        ("tokens", f"outputs of the blocks, no final LayerNorm, {scaled} to unit length"),
        ("projectors", f"{parameters / 1e6:.2f} M parameters each, {config.num_reference_tokens} learned tokens"),
    ]
    return _table(("", ""), rows)


def _training(config: ADPretrainConfig) -> str:
    names = sorted(config.reported_scores or _CHOSEN_UNDER, key=lambda name: name != config.default_variant)
    # Of the released backbones only DINOv2 has ImageNet's statistics; a folder's name does not tell what is in it.
    defect = texts.WRONG_STATISTICS if config.mean == IMAGENET_MEAN else ""
    return texts.VARIANTS.format(variants=", ".join(f"`{name}`" for name in names)) + texts.RECIPE + defect


def _results(config: ADPretrainConfig) -> str:
    rows = list(_PAPER.get(_preset(config) or "", []))
    for variant, scores in config.reported_scores.items():
        percents = [f"{100 * scores[metric]:.1f}" if metric in scores else "" for metric in METRICS]
        rows.append(("MVTecAD", variant, _CHOSEN_UNDER.get(variant, "unknown"), *percents, _BY_AUTHORS))
    parts = [_table(_HEADER, rows), texts.TABLE_NOTES] if rows else ["None is listed here."]
    return "\n".join(parts if config.reported_scores else [*parts, "", texts.NO_SCORES])


def _limits(config: ADPretrainConfig, released: bool) -> str:
    crop = "- What the centre crop cuts off is not looked at.\n" if config.resize_mode == "crop" else ""
    return crop + (texts.RELEASED_LIMITS if released else "")


def _backbone(config: ADPretrainConfig) -> str:
    family, commit, digest = _family(config), config.backbone_revision, config.backbone_digest
    facts = [f"`{config.backbone}`", f", commit `{commit}`" if commit else "", ". ", family.origin if family else ""]
    facts.append(f" Digest of the weights: `{digest}`." if digest else "")
    return textwrap.fill("".join(facts), 118, break_long_words=False, break_on_hyphens=False)


def _license(config: ADPretrainConfig, released: bool, trained: bool) -> str:
    family = _family(config)
    if released:
        return texts.LICENSE_OF_DATA.format(backbone=family.license if family else "see where it comes from")
    if family and not trained:
        return f"{family.license}, that of the backbone."
    return (
        "None is given here: those of the backbone and of the training data hold. Name it in the front matter before "
        "you publish the bundle."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


if __name__ == "__main__":
    for folder, text in published_cards().items():
        write_text(Path(sys.argv[1]) / folder / "README.md", text)
