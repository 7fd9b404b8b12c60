"""The model card that goes with a bundle: ``card_template.md``, filled in."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from adpretrain_hf.backbones import IMAGENET
from adpretrain_hf.config import PRESETS, ADPretrainConfig
from adpretrain_hf.projector import Projectors

PUBLISHED = ("dinov2-base", "dinov2-large", "clip-base", "clip-large", "imagebind")
# Scores in the released checkpoints: the name there -> the Hub's name, the name for people.
METRICS = {"img_auc": ("roc_auc", "image AUROC"), "pix_auc": ("roc_auc", "pixel AUROC"), "pix_pro": ("aupro", "PRO")}
_COLUMNS = ("data set", "variant", "detector", *(label for _, label in METRICS.values()), "protocol")
_CHOSEN_UNDER = {"angle": "PatchCore", "norm": "FeatureNorm"}
_BY_AUTHORS = "reported by the authors, selected on this test set, not measured here"
# Families of backbones: pattern of config.backbone, name in the template, licence (the Hub's id in capitals).
_FAMILIES = (
    (r"facebook/dinov2(-with-registers)?-(small|base|large|giant)", "dinov2", "Apache-2.0"),
    (r"open_clip:[^/]+/openai|openai/clip-vit-[\w-]+", "clip", "MIT"),
    (r"imagebind:.+", "imagebind", "CC-BY-NC-SA-4.0"),
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
        training, results: Markdown on how projectors were trained and what was measured, where it is known; of
            released ones the training is known, and the results are by default the scores in the configuration.
    """
    released = bool(config.reported_scores) if released is None else released
    kind = "released" if released else "trained" if trained or training else "new"
    repository = repository or f"your-name/adpretrain-{_short_name(config)}"
    values = _sizes(config) | _origin(config, kind) | {"training": training, "repository": repository}
    values["name"] = repository.rpartition("/")[2]
    values["results"] = results or (_score_table(config) if released else "")
    values["metrics"] = _metrics(config) if released else ""
    return str(ModelCard(_fill_in(values)))  # with the front matter as the Hub writes it


def _fill_in(values: Mapping[str, Any]) -> str:
    text = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    # What stands before the first such line is for whoever edits the template.
    _, *blocks = re.split(r"^<!-- (?:when (.+)|end) -->\n", text, flags=re.MULTILINE)
    kept = [block for when, block in zip(blocks[::2], blocks[1::2], strict=True) if _holds(when, values)]
    return Template("".join(kept)).substitute(values)


def _holds(when: str | None, values: Mapping[str, Any]) -> bool:
    names = when.split(", ") if when else []
    return all(bool(values[name.removeprefix("not ")]) != name.startswith("not ") for name in names)


def _sizes(config: ADPretrainConfig) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = sum(one.numel() for one in Projectors(config).parameters()) / len(config.layers)
    return asdict(config) | {
        "first_level": config.layer_names[0],
        "levels": ", ".join(config.layer_names),
        "grid": config.image_size // config.patch_size,
        "crop": config.resize_mode == "crop",
        "millions": f"{parameters / 1e6:.2f}",
    }


def _origin(config: ADPretrainConfig, kind: str) -> dict[str, Any]:
    known = (one[1:] for one in _FAMILIES if re.fullmatch(one[0], config.backbone))
    family, backbone_license = next(known, ("", ""))
    # A folder can look like an id: only what has a commit on the Hub, or is known, is taken for one.
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", config.backbone) and (config.backbone_revision or family)
    # Where the backbone's or the training data's licence is not known there is none: `other` asks for name and link.
    licenses = {"released": "CC-BY-NC-SA-4.0", "trained": "", "new": backbone_license}
    variants = sorted(config.reported_scores or _CHOSEN_UNDER, key=lambda name: name != config.default_variant)
    return {
        # Of the kinds of projectors and of the families of backbones, one each holds (of the families perhaps none).
        **{name: name in (kind, family) for name in (*licenses, *(name for _, name, _ in _FAMILIES))},
        "base_model": config.backbone if is_id else _HUB_IDS.get(config.backbone),
        "backbone_license": backbone_license,
        "license": licenses[kind],
        "license_id": licenses[kind].lower(),
        "preset": _preset(config) if _preset(config) in PUBLISHED else None,
        # Of the released backbones only DINOv2 has these; a folder's name does not tell what is in it.
        "imagenet_statistics": config.mean == IMAGENET[0],
        "variants": ", ".join(f"`{name}`" for name in variants),
    }


def _metrics(config: ADPretrainConfig) -> str:
    metrics = [
        {"type": METRICS[metric][0], "value": value, "verified": False}
        | {"name": f"{METRICS[metric][1]}, {variant}, {_CHOSEN_UNDER.get(variant, 'unknown')} ({_BY_AUTHORS})"}
        for variant, scores in config.reported_scores.items()
        for metric, value in scores.items()
        if metric in METRICS
    ]
    return yaml_dump(metrics, default_flow_style=True, width=math.inf).strip() if metrics else ""


def _score_table(config: ADPretrainConfig) -> str:
    rows = []
    for variant, scores in config.reported_scores.items():
        percents = [f"{100 * scores[metric]:.1f}" if metric in scores else "" for metric in METRICS]
        rows.append(("MVTecAD", variant, _CHOSEN_UNDER.get(variant, "unknown"), *percents, _BY_AUTHORS))
    return table(_COLUMNS, rows) if rows else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _preset(config: ADPretrainConfig) -> str | None:
    if config.backbone.startswith("imagebind:"):
        return "imagebind"  # wherever its file lies
    return next((name for name, values in PRESETS.items() if values["backbone"] == config.backbone), None)


def _short_name(config: ADPretrainConfig) -> str:
    last = re.split(r"[/\\:]", config.backbone.rstrip("/\\"))[-1]
    return _preset(config) or re.sub(r"[^A-Za-z0-9]+", "-", last).strip("-") or "features"
