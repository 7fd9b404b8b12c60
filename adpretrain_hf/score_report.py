"""What ``adpretrain score`` leaves for people: scores.csv, scores.json, and an overlay of every image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from adpretrain_hf.files import atomic_path, write_csv, write_text
from adpretrain_hf.images import read_image
from adpretrain_hf.overlays import colour_range, overlay
from adpretrain_hf.results import Failure, Result
from adpretrain_hf.run_images import RunImages
from adpretrain_hf.run_settings import kept_settings
from adpretrain_hf.scoring import place_map


def write_scores(output: Path, scores: Sequence[tuple[str, float]], failures: Sequence[Failure]) -> None:
    """Writes ``scores.csv`` and ``scores.json``, the latter with the run's settings and the images that failed."""
    write_csv(output / "scores.csv", ("image", "score"), list(scores))
    report = {
        "settings": kept_settings(output),
        "scores": [{"image": name, "score": value} for name, value in scores],
        "failures": list(failures),
    }
    write_text(output / "scores.json", json.dumps(report, indent=2) + "\n")


def write_overlays(output: Path, results: Mapping[str, Result], images: RunImages) -> None:
    """Draws every image that has a result with its map over it, in colours of one range, into ``overlays/``."""
    if not results:
        return
    colours = colour_range(result["map"].numpy() for result in results.values())
    for image, name in images.names.items():
        if name not in results:
            continue
        result = results[name]
        height, width = result["size"].tolist()
        anomaly = place_map(result["map"], (height, width), tuple(result["box"].tolist()))
        with atomic_path(output / "overlays" / f"{name}.png") as temporary:
            overlay(read_image(images.source(image), image), anomaly.numpy(), colours).save(temporary)
