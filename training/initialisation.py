"""How new projectors begin: at the identity, as published, or in between."""

from __future__ import annotations

import torch
from torch import nn

from adpretrain_hf.projector import Projectors


@torch.no_grad()
def initialise(projectors: Projectors, scale: float) -> None:
    """Gives the layers that make a projector differ from the identity a share of their published start.

    The published start (scale 1) hides the residuals, which already tell anomalies from normal patches, behind noise:
    reference tokens from N(0, 1), their map Kaiming-normal with gain sqrt 2, the attention's projections as
    ``nn.MultiheadAttention`` begins, the MLP as ``nn.Linear`` does. With 0 all is as ``Projectors`` makes it: exactly
    the identity.

    Args:
        projectors: new ones; changed in place.
        scale: of the attention's output, the MLP's last layer and the reference tokens.
    """
    if scale == 0:
        return
    for level in projectors:
        nn.init.kaiming_normal_(level.reference_projection.weight)  # of gain sqrt 2 by default
        for layer in (level.attention.out_proj, level.mlp.fc2):
            layer.reset_parameters()
        nn.init.zeros_(level.attention.out_proj.bias)
        for parameter in (level.attention.out_proj.weight, *level.mlp.fc2.parameters(), level.reference_tokens):
            parameter.mul_(scale)
