"""An extractor with its references as one ONNX file (needs the extra ``onnx``)."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from adpretrain_hf.errors import InputError, check_sides
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import check_prepared
from adpretrain_hf.reference import ReferenceBank
from adpretrain_hf.scoring import BY_MAXIMUM, Judgement, anomaly_map, required

METADATA = "adpretrain"
PROGRAM = Path(__file__).with_name("onnx_predict.py").read_text(encoding="utf-8")
"""What runs such a file without this package."""


class FeaturesAndScores(nn.Module):
    """An extractor whose outputs are tensors in a fixed order, as a graph needs them.

    Args:
        extractor: with a reference set.
        judgement: how scores are taken of the maps.
    """

    def __init__(self, extractor: ADPretrainFeatureExtractor, judgement: Judgement = BY_MAXIMUM) -> None:
        super().__init__()
        self.extractor, self.judgement = extractor, judgement

    def forward(self, images: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, ...]:
        """Prepared images (B, 3, H, W), and a threshold (), to what is known of them.

        Returns:
            L feature maps (B, C, h, w), the FeatureNorm map (B, H, W), the scores (B,) and, with a threshold, which of
            them exceed it (B,).
        """
        features = list(self.extractor(images).values())
        maps = anomaly_map(features, (images.shape[2], images.shape[3]))
        scores = self.judgement.image_scores(maps)
        return (*features, maps, scores, *(() if threshold is None else (scores > threshold,)))


@torch.no_grad()
def export_onnx(
    extractor: ADPretrainFeatureExtractor,
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    false_alarms: float | None = None,
) -> Path:
    """Writes an extractor as an ONNX model, with the reference bank that is set as a constant in it.

    Its input ``images`` (B, 3, H, W) are prepared images, of any number; its outputs are the feature maps (B, C, h, w)
    under the levels' names, ``anomaly_map`` (B, H, W) and ``score`` (B,). Where the bank has a calibration that this
    extractor made, there is an output ``anomalous`` (B,), bool, more: which scores exceed ``threshold`` (), an input
    that need not be given, for it has the calibration's as its default. How images are prepared, the product and the
    calibration stand as JSON under ``"adpretrain"`` in the model's metadata. The weights of a model above 2 GB, the
    limit of the format, go to a second file, ``<path>.data``.

    Args:
        extractor: with a reference set.
        path: of the file, e.g. ``"screw.onnx"``.
        image_size: H and W of the images, in pixels, or both in one number; the extractor's square by default. Of whole
            images that are not square they are ``extractor.preprocess(image).shape[-2:]``.
        false_alarms: the rate that the threshold is for; the calibration's own by default.

    Returns:
        The path.

    Raises:
        InputError: no reference is set, an extractor that a graph cannot hold, an image size that is no multiple of the
            patch size, a rate without a calibration or one that it does not allow, or the packages of the extra
            ``onnx`` are not there.
        OSError: the file cannot be written.
    """
    bank = _exportable(extractor)
    judgement = extractor._judgement_of(bank)
    if false_alarms is not None:
        judgement = judgement.calibrated(replace(required(judgement.calibration), false_alarms=false_alarms))
    height, width = check_sides("image_size", extractor.image_size if image_size is None else image_size)
    # Two, for an example of one would make the exporter take the size of the batch for a constant.
    example = torch.zeros(2, 3, height, width, dtype=extractor.dtype, device=extractor.device)
    inputs: dict[str, Tensor] = {"images": check_prepared(example, extractor.config)}
    outputs = [*extractor.layers, "anomaly_map", "score"]
    if judgement.calibration:
        inputs["threshold"] = torch.tensor(judgement.calibration.threshold(), device=extractor.device)
        outputs.append("anomalous")
    program = torch.onnx.export(
        FeaturesAndScores(extractor, judgement).eval(),
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes={name: {0: torch.export.Dim("batch")} if name == "images" else None for name in inputs},
        input_names=[*inputs],
        output_names=outputs,
        opset_version=18,
        verbose=False,
    )
    program = cast(torch.onnx.ONNXProgram, program)  # None only where torch.jit exports
    if judgement.calibration:
        _set_default(program, "threshold", judgement.calibration.threshold())
    program.model.metadata_props[METADATA] = json.dumps(_about(extractor, bank, judgement))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The graph names the file of its weights, so both are written under their own names elsewhere.
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        program.save(Path(folder) / path.name)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # the graph last
            file.replace(path.with_name(file.name))
    return path


def _exportable(extractor: ADPretrainFeatureExtractor) -> ReferenceBank:
    """The reference that is set, where a graph can hold it and the extractor."""
    if extractor.reference is None:
        raise InputError("no reference is set: call set_reference(images) before export_onnx, which exports it along")
    if extractor.is_quantized:
        raise InputError("layers of 8 bits cannot be exported: export the extractor as it was before quantize()")
    if extractor.dtype == torch.bfloat16:
        raise InputError("ONNX has no bfloat16 for all of it: export float32 or float16, e.g. extractor.float()")
    if extractor.reference.tiles or extractor.reference.judgement.region:
        raise InputError("a graph looks at whole images: expected a reference without tiles and region of interest")
    if extractor.config.decode == "fast":
        raise InputError(
            "predict.py decodes JPEGs exactly, and references that were decoded fast are others: load the extractor "
            "with decode='exact' (--decode exact), and make the reference anew"
        )
    if find_spec("onnxscript") is None:
        raise InputError("onnxscript is not installed: install it by `pip install adpretrain-hf[onnx]`")
    return extractor.reference


def _set_default(program: torch.onnx.ONNXProgram, name: str, value: float) -> None:
    """Makes a graph's input one that need not be given: it is an initialiser as well."""
    import onnx_ir

    (given,) = (one for one in program.model.graph.inputs if one.name == name)
    given.const_value = onnx_ir.tensor(np.array(value, dtype=np.float32), name=name)
    program.model.graph.register_initializer(given)


def _about(extractor: ADPretrainFeatureExtractor, bank: ReferenceBank, judgement: Judgement) -> dict[str, Any]:
    names = ("image_size", "patch_size", "resize_mode", "mean", "std", "fingerprint")
    about: dict[str, Any] = {
        "category": bank.category,
        "variant": extractor.variant,
        "image_score": judgement.image_score,
    }
    about |= {name: getattr(extractor.config, name) for name in names}
    if own := judgement.calibration:
        decision = {name: getattr(own, name) for name in ("false_alarms", "scale", "approximate")}
        about["calibration"] = {"images": len(own.scores), "threshold": own.threshold()} | decision
    return about
