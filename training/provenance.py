"""Where weights come from: the command, the versions, and the card's words on training and results."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from adpretrain_hf import __version__
from adpretrain_hf.config import ADPretrainConfig
from training.checkpoint import Progress
from training.settings import PretrainSettings


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "adpretrain-hf": __version__}
    for name in ("torch", "torchvision", "transformers", "datasets", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def training_text(
    settings: PretrainSettings, config: ADPretrainConfig, progress: Progress, categories: Sequence[str], command: str
) -> str:
    """How the projectors were trained, as Markdown for the card."""
    scale = ", ".join(f"{factor:.4g}" for factor in config.residual_scale)
    chosen = "; ".join(f"*{variant}* is epoch {best['epoch']}" for variant, best in progress.best.items())
    return f"""\
On {len(categories)} categories, {settings.epochs} epochs in batches of {settings.batch_size}: {", ".join(categories)}.
{chosen}. Residuals are scaled by {scale}.

```bash
{command}
```

{", ".join(f"{name} {number}" for name, number in versions().items())}."""


def results_text(progress: Progress) -> str:
    """What the validation measured, as Markdown for the card."""
    lines = [
        "On the validation categories, by which the epochs were chosen: not a test.",
        "",
        "| epoch | detector | image AUROC | pixel AUROC | AUPRO |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in progress.history:
        for detector, metrics in record["validation"].items():
            values = " | ".join(f"{100 * value:.1f}" for value in metrics.values())
            lines.append(f"| {record['epoch']} | {detector} | {values} |")
    return "\n".join(lines)
