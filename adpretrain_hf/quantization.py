"""A faster extractor for CPUs: linear layers in 8-bit integers."""

import warnings

import torch
from torch import nn

from adpretrain_hf.errors import InputError
from adpretrain_hf.extractor import ADPretrainFeatureExtractor


def quantize(extractor: ADPretrainFeatureExtractor) -> ADPretrainFeatureExtractor:
    """Replaces the linear layers of backbone and projectors by PyTorch's dynamic 8-bit ones, in place.

    Weights are rounded once per layer, activations once per call, by the range of the whole batch: the features of an
    image then depend a little on the others in its batch. References have to be encoded by the quantised extractor; one
    that is set is forgotten. What is quantised cannot be saved, trained or moved to a GPU.

    Args:
        extractor: in float32, on the CPU.

    Returns:
        The same extractor.

    Raises:
        InputError: not in float32 on the CPU, or this PyTorch has no dynamic quantisation for this CPU.
    """
    if extractor.device.type != "cpu" or extractor.dtype != torch.float32:
        found = f"{str(extractor.dtype).removeprefix('torch.')} on {extractor.device}"
        expected = "float32 on the CPU: load it with dtype=torch.float32, device='cpu'"
        raise InputError(f"got an extractor in {found}, expected {expected}")
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise InputError(f"PyTorch {torch.__version__} has no torch.ao.quantization: use float32 ({error})") from error
    extractor.reference, extractor.is_quantized = None, True
    with warnings.catch_warnings():
        # Its successor, torchao, is many times slower than float32 on a CPU unless it is compiled.
        warnings.filterwarnings("ignore", message="torch.*deprecated")
        # All but the layers whose output is computed once and kept, where nothing is to be gained.
        parts = (part for projector in extractor.projectors for part in (projector.attention, projector.mlp))
        for module in (extractor.backbone.model, *parts):
            quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8, inplace=True)
    return extractor
