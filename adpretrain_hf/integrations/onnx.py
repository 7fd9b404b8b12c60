"""An extractor with its references as one ONNX file (needs the extra ``onnx``)."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor, nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor
from adpretrain_hf.images import check_prepared
from adpretrain_hf.scoring import anomaly_map


class FeaturesAndMap(nn.Module):
    """An extractor whose outputs are tensors in a fixed order, as a graph needs them.

    Args:
        extractor: with a reference set.
    """

    def __init__(self, extractor: ADPretrainFeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Prepared images (B, 3, H, W) to L feature maps (B, C, h, w) and the FeatureNorm map (B, H, W)."""
        features = list(self.extractor(images).values())
        return (*features, anomaly_map(features, (images.shape[2], images.shape[3])))


@torch.no_grad()
def export_onnx(
    extractor: ADPretrainFeatureExtractor, path: str | Path, *, image_size: int | tuple[int, int] | None = None
) -> Path:
    """Writes an extractor as an ONNX model, with the reference bank that is set as a constant in it.

    Its input ``images`` (B, 3, H, W) are prepared images, of any number; its outputs are the feature maps (B, C, h, w)
    under the levels' names, and ``anomaly_map`` (B, H, W), whose maximum is an image's score. The weights of a model
    above 2 GB, the limit of the format, go to a second file, ``<path>.data``.

    Args:
        extractor: with a reference set.
        path: of the file, e.g. ``"screw.onnx"``.
        image_size: H and W of the images, in pixels, or both in one number; the extractor's square by default. Of whole
            images that are not square they are ``extractor.preprocess(image).shape[-2:]``.

    Returns:
        The path.

    Raises:
        InputError: no reference is set, an image size that is no multiple of the patch size, or the packages of the
            extra ``onnx`` are not there.
        OSError: the file cannot be written.
    """
    if extractor.reference is None:
        raise InputError("no reference is set: call set_reference(images) before export_onnx, which exports it along")
    if find_spec("onnxscript") is None:
        raise InputError("onnxscript is not installed: install it by `pip install adpretrain-hf[onnx]`")
    size = image_size or extractor.image_size
    height, width = (size, size) if isinstance(size, int) else size
    # Two, for an example of one would make the exporter take the size of the batch for a constant.
    example = torch.zeros(2, 3, height, width, dtype=extractor.dtype, device=extractor.device)
    program = torch.onnx.export(
        FeaturesAndMap(extractor).eval(),
        (check_prepared(example, extractor.config),),
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        input_names=["images"],
        output_names=[*extractor.layers, "anomaly_map"],
        opset_version=18,
        verbose=False,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The graph names the file of its weights, so both are written under their own names elsewhere.
    with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        cast(torch.onnx.ONNXProgram, program).save(Path(folder) / path.name)  # None only where torch.jit exports
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # the graph last
            file.replace(path.with_name(file.name))
    return path
