"""The folder of a run: settings, checkpoint, the best weights so far, metrics, and at the end the bundle."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from adpretrain_hf.bundle import LAYOUT, card_text, read_projectors, write_projectors
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import write_text
from adpretrain_hf.projector import Projectors
from training import distributed
from training.checkpoint import Progress
from training.provenance import results_text, training_text, versions
from training.settings import PretrainSettings, differing


class RunFolder:
    """Where a run leaves what it does.

    ``settings.json``, ``run.json`` (the commands and the versions), ``checkpoint.safetensors``, ``variants/`` (the best
    weights so far), ``metrics.json`` and ``bundle/``.

    Args:
        path: the folder; made if it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.bundle = self.path / "bundle"

    def start(self, settings: PretrainSettings, command: str, *, resume: bool) -> None:
        """Notes settings, command, versions and the number of processes.

        Raises:
            InputError: there is a run already and ``resume`` was not asked for, or one with other settings.
        """
        file = self.path / "settings.json"
        if self.checkpoint.exists() and not resume:
            raise InputError(f"{self.path} holds a run already: give --resume to go on with it, or another --output")
        if file.exists() and resume:
            changed = differing(PretrainSettings.from_json(file.read_text(encoding="utf-8")), settings)
            if changed:
                raise InputError(f"the run in {self.path} has other settings, so it cannot go on: {'; '.join(changed)}")
        write_text(file, settings.to_json())
        self._note_command(command)

    def _note_command(self, command: str) -> None:
        file = self.path / "run.json"
        runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        processes = distributed.world_size()
        runs.append({"started": started, "command": command, "processes": processes, "versions": versions()})
        write_text(file, json.dumps(runs, indent=2) + "\n")

    def save_variant(self, variant: str, projectors: Projectors) -> None:
        """Keeps weights as the best so far."""
        write_projectors(projectors, self._variant_file(variant))

    def write_metrics(self, progress: Progress) -> None:
        """Writes what is known of the epochs that are done to ``metrics.json``."""
        metrics = {"best": progress.best, "epochs": progress.history}
        write_text(self.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    def write_bundle(
        self,
        settings: PretrainSettings,
        extractor: ADPretrainFeatureExtractor,
        progress: Progress,
        training: Sequence[str],
    ) -> None:
        """Writes the bundle of all variants, in float16, with its card.

        Args:
            settings: of the run.
            extractor: backbone and configuration of the bundle.
            progress: at the end of the run.
            training: names of the categories that were trained on.
        """
        command = json.loads((self.path / "run.json").read_text(encoding="utf-8"))[0]["command"]
        card = card_text(
            extractor.config,
            trained=True,
            training=training_text(settings, extractor.config, progress, training, command),
            results=results_text(progress),
        )
        write_text(self.bundle / LAYOUT.card, card)
        backbone = copy.deepcopy(extractor.backbone).to("cpu", torch.float16)
        for variant in progress.best:
            projectors = read_projectors(self._variant_file(variant), extractor.config, torch.float16)
            ADPretrainFeatureExtractor(extractor.config, backbone, projectors, variant).save_pretrained(self.bundle)

    def _variant_file(self, variant: str) -> Path:
        return self.path / "variants" / f"{variant}.safetensors"
