"""How new projectors begin: at the identity, as published, or in between."""

from __future__ import annotations

import math

import torch
from torch import nn

from adpretrain_hf.projector import Projectors


@torch.no_grad()
def initialise(projectors: Projectors, scale: float) -> None:
    """Gives the layers that make a projector differ from the identity a share of their published start.

    The published start (scale 1: Xavier for the attention's output, PyTorch's default for the MLP, reference tokens
    from N(0, 1)) hides the residuals, which already tell anomalies from normal patches, behind noise. With 0 all is as
    ``Projectors`` makes it: exactly the identity.

    Args:
        projectors: new ones; changed in place.
        scale: of the attention's output, the MLP's last layer and the reference tokens.
    """
    if scale == 0:
        return
    for level in projectors:
        nn.init.xavier_uniform_(level.attention.out_proj.weight)
        nn.init.kaiming_uniform_(level.mlp.fc2.weight, a=math.sqrt(5))
        for weight in (level.attention.out_proj.weight, level.mlp.fc2.weight, level.reference_tokens):
            weight.mul_(scale)
