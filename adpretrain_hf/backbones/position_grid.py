"""DINOv2's position embeddings, resampled to an image's patch grid as its authors' code does it."""

import torch
from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from adpretrain_hf.cache import ParameterCache

# Added to the size before dividing, in dinov2/models/vision_transformer.py (interpolate_offset).
_OFFSET = 0.1
_KEPT_GRIDS = 16


class PublishedGridEmbeddings(Dinov2Embeddings):
    """Dinov2Embeddings whose grid is resampled with a scale factor instead of a size.

    The released projectors were trained on features made so (facebookresearch/dinov2, ``interpolate_pos_encoding``);
    the library's own rule shifts the tokens by 1 to 2 %. The resampled grid is a constant of the weights and the
    input size, and is kept.
    """

    def __init__(self, original: Dinov2Embeddings) -> None:
        super().__init__(original.config)
        self.load_state_dict(original.state_dict(), assign=True)
        self._grids: dict[tuple[int, int], ParameterCache[Tensor]] = {}

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Returns the positions (1, 1 + h*w, C) for an input of ``height`` x ``width`` pixels."""
        patch_height, patch_width = self.patch_embeddings.patch_size
        grid = height // patch_height, width // patch_width
        parameter = self.position_embeddings
        if parameter.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return resample_grid(parameter, *grid)
        if len(self._grids) >= _KEPT_GRIDS and grid not in self._grids:
            self._grids = {}  # images of many aspect ratios must not pile up grids
        cache = self._grids.setdefault(grid, ParameterCache())
        return cache.get([parameter], lambda: resample_grid(parameter, *grid))


def resample_grid(positions: Tensor, h: int, w: int) -> Tensor:
    """Resamples positions (1, 1 + n*n, C) to (1, 1 + h*w, C): bicubic, no antialiasing, scale (h + 0.1) / n."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (h, w) == (side, side):
        return positions
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (h + _OFFSET) / side, (w + _OFFSET) / side
    resampled = nn.functional.interpolate(patches.float(), scale_factor=scale, mode="bicubic")
    patches = resampled.to(positions.dtype).flatten(2).transpose(1, 2)
    return torch.cat((positions[:, :1], patches), dim=1)
