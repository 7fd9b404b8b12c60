"""anomalib's detectors on pretrained features (needs the extra ``anomalib``).

from adpretrain_hf.integrations.anomalib import ADPretrainPatchcore
engine.fit(ADPretrainPatchcore("org/adpretrain-dinov2-large"), datamodule=datamodule)
"""

from importlib.util import find_spec

if find_spec("anomalib") is None:
    message = "anomalib is not installed: install it by `pip install adpretrain-hf[anomalib]`"
    raise ModuleNotFoundError(message, name="anomalib")

from adpretrain_hf.integrations.anomalib.detector import DetectorArguments
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.models import (
    ADPretrainCflow,
    ADPretrainFeatureNorm,
    ADPretrainGlass,
    ADPretrainPadim,
    ADPretrainPatchcore,
    ADPretrainUniad,
)
from adpretrain_hf.integrations.anomalib.pre_processor import ADPretrainPreProcessor
