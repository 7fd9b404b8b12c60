"""What the results of a run depend on besides its images, kept beside them: a run goes on only under the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adpretrain_hf.digest import combined_digest, tensor_digest
from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.files import write_text
from adpretrain_hf.projector import Projectors
from adpretrain_hf.quantization import is_quantized

_FILE = "run.json"


def extractor_settings(extractor: ADPretrainFeatureExtractor) -> dict[str, Any]:
    """What results depend on in an extractor, its references set aside."""
    return {
        "fingerprint": extractor.config.fingerprint,
        "variant": extractor.variant,
        "projectors": _weights_digest(extractor.projectors),
        "residual_scale": extractor.config.residual_scale,
        "dtype": "int8" if is_quantized(extractor) else str(extractor.dtype).removeprefix("torch."),
    }


def _weights_digest(projectors: Projectors) -> str:
    """Identity of the trained weights; those that are packed in 8 bits come of the same training as the others."""
    values = projectors.state_dict().values()
    return combined_digest(tensor_digest(value) for value in values if isinstance(value, Tensor))


def keep_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings to ``run.json``.

    Raises:
        InputError: the folder holds results of other settings.
    """
    path = output / _FILE
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{output} holds results of other settings (see {path}): give another --output, or remove it")
    write_text(path, text)


def kept_settings(output: Path) -> dict[str, Any]:
    """The settings that a run has kept."""
    return json.loads((output / _FILE).read_text(encoding="utf-8"))
