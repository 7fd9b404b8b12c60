"""anomalib's detectors on pretrained features (needs the extra ``anomalib``).

from adpretrain_hf.integrations.anomalib import ADPretrainPatchcore
engine.fit(ADPretrainPatchcore("org/adpretrain-dinov2-large"), datamodule=datamodule)
"""

from importlib.util import find_spec

if find_spec("anomalib") is None:
    message = "anomalib is not installed: install it by `pip install adpretrain-hf[anomalib]`"
    raise ModuleNotFoundError(message, name="anomalib")

from adpretrain_hf.integrations.anomalib.cflow import ADPretrainCflow
from adpretrain_hf.integrations.anomalib.feature_norm import ADPretrainFeatureNorm
from adpretrain_hf.integrations.anomalib.features import DetectorFeatures
from adpretrain_hf.integrations.anomalib.glass import ADPretrainGlass
from adpretrain_hf.integrations.anomalib.padim import ADPretrainPadim
from adpretrain_hf.integrations.anomalib.patchcore import ADPretrainPatchcore
from adpretrain_hf.integrations.anomalib.preparation import ADPretrainPreProcessor
from adpretrain_hf.integrations.anomalib.uniad import ADPretrainUniad

__all__ = [
    "ADPretrainCflow",
    "ADPretrainFeatureNorm",
    "ADPretrainGlass",
    "ADPretrainPadim",
    "ADPretrainPatchcore",
    "ADPretrainPreProcessor",
    "ADPretrainUniad",
    "DetectorFeatures",
]
