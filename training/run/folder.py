"""The folder of a run: settings, checkpoint, the best weights so far, metrics, and at the end the bundle."""

import contextlib
import copy
import fcntl
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from adpretrain_hf import __version__
from adpretrain_hf.bundle import LAYOUT, card_text, read_projectors, write_projectors
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import atomic_path, write_text
from adpretrain_hf.projector import Projectors
from training.run import distributed
from training.run.state import Progress
from training.settings import PretrainSettings, differing

_VERSIONS = ("torch", "torchvision", "transformers", "datasets", "pillow", "numpy")


class RunFolder:
    """Where a run leaves what it does.

    ``settings.json``, ``run.json`` (the commands and the versions), ``checkpoint.safetensors``, ``variants/`` (the best
    weights so far), ``metrics.json``, ``cache/`` until the end, and ``bundle/``.

    Args:
        path: the folder; made when something is written to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.bundle = self.path / "bundle"
        self.cache = self.path / "cache"

    def check(self, settings: PretrainSettings, *, resume: bool) -> None:
        """Raises InputError if a run is there that is not to go on, or cannot with these settings."""
        file = self.path / "settings.json"
        there = distributed.union([distributed.rank()] if self.checkpoint.exists() else [])
        if there and len(there) < distributed.world_size():
            raise InputError(
                f"only the processes {there} of {distributed.world_size()} find {self.checkpoint}: --output has to be "
                "a folder that all machines share"
            )
        if there and not resume:
            raise InputError(f"{self.path} holds a run already: give --resume to go on with it, or another --output")
        if there and file.exists():
            changed = differing(PretrainSettings.from_json(file.read_text(encoding="utf-8")), settings)
            if changed:
                raise InputError(f"the run in {self.path} has other settings, so it cannot go on: {'; '.join(changed)}")

    def lock(self) -> None:
        """Takes the folder for this process as long as it has this object; InputError if another one has it.

        Not by flock: data workers would inherit that, and outlive a killed program. Some file systems know no locks.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"another process is training in {self.path}: wait, or give another --output") from error
        except OSError:
            pass

    def note_start(self, settings: PretrainSettings, command: str) -> None:
        """Notes settings, command, versions and the number of processes of a run that begins, or goes on."""
        file = self.path / "run.json"
        runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() and self.checkpoint.exists() else []
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        processes = distributed.world_size()
        runs.append({"started": started, "command": command, "processes": processes, "versions": versions()})
        write_text(file, json.dumps(runs, indent=2) + "\n")
        write_text(self.path / "settings.json", json.dumps(asdict(settings), indent=2) + "\n")

    def save_variant(self, variant: str, projectors: Projectors) -> None:
        """Keeps weights as the best so far."""
        write_projectors(projectors, self._variant_file(variant))

    def write_metrics(self, progress: Progress) -> None:
        """Writes what is known of the epochs that are done to ``metrics.json``."""
        metrics = {"best": progress.best, "baseline": progress.baseline, "epochs": progress.history}
        write_text(self.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    def write_bundle(
        self,
        settings: PretrainSettings,
        extractor: ADPretrainFeatureExtractor,
        progress: Progress,
        training: Sequence[str],
    ) -> None:
        """Writes the bundle of all variants, in float16, with its card, and removes the run's own cache.

        Args:
            settings: of the run.
            extractor: backbone and configuration of the bundle.
            progress: at the end of the run.
            training: names of the categories that were trained on.
        """
        # Trained on squares, it is used on whole images: what was measured of the embedded bundle.
        config = extractor.config.replace(resize_mode="resize")
        trained, results = self._training_text(settings, progress, training), _results_text(settings, progress)
        card = card_text(config, trained=True, training=trained, results=results)
        backbone = copy.deepcopy(extractor.backbone).to("cpu", torch.float16)
        chosen = {variant: best["epoch"] for variant, best in progress.best.items()}
        default = config.default_variant
        aliases = [variant for variant in chosen if variant != default and chosen[variant] == chosen.get(default)]
        config = config.replace(variant_aliases=tuple(aliases))
        with atomic_path(self.bundle) as folder:  # in place of one that another run has left there
            write_text(folder / LAYOUT.card, card)
            for variant in chosen.keys() - set(aliases):
                projectors = read_projectors(self._variant_file(variant), config, torch.float16)
                ADPretrainFeatureExtractor(config, backbone, projectors, variant).save_pretrained(folder)
        shutil.rmtree(self.cache, ignore_errors=True)

    def _variant_file(self, variant: str) -> Path:
        return self.path / "variants" / f"{variant}.safetensors"

    def _training_text(self, settings: PretrainSettings, progress: Progress, categories: Sequence[str]) -> str:
        """How the projectors were trained, as Markdown for the card."""
        first, *others = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        scale = ", ".join(f"{factor:.4g}" for factor in progress.residual_scale)
        chosen = "; ".join(f"*{variant}* is epoch {best['epoch']:g}" for variant, best in progress.best.items())
        went_on = f" It was stopped and went on {len(others)} times." if others else ""
        return f"""\
On {len(categories)} categories, {progress.steps_done} steps of {settings.batch_size} images: {", ".join(categories)}.
{chosen}. Residuals are scaled by {scale}.{went_on}

```bash
{first["command"]}
```

{", ".join(f"{name} {number}" for name, number in versions().items())}."""


def versions(*others: str) -> dict[str, str]:
    """Versions of what the numbers depend on, and of other packages that are named."""
    found = {"python": platform.python_version(), "adpretrain-hf": __version__}
    for name in (*_VERSIONS, *others):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _results_text(settings: PretrainSettings, progress: Progress) -> str:
    """What the validation measured, as Markdown for the card."""
    if not progress.baseline:
        return "Nothing was measured: no category had anomalies to judge by. The weights are those of the last epoch."
    seen = " They were trained on as well." if settings.all_categories else ""
    lines = [
        f"On the validation categories, by which the epochs were chosen: not a test.{seen}",
        "*Untrained* are the residuals that the projectors are given.",
        "",
        "| epoch | detector | image AUROC | pixel AUROC | AUPRO |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = [("untrained", progress.baseline), *((record["epoch"], record["validation"]) for record in progress.history)]
    for epoch, scores in rows:
        for detector, metrics in scores.items():
            lines.append(f"| {epoch} | {detector} | {' | '.join(f'{100 * value:.1f}' for value in metrics.values())} |")
    return "\n".join(lines)
