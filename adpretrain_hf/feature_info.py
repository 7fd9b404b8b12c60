"""FeatureInfo: what an extractor's features are like, told as timm's models tell it."""

from collections.abc import Sequence
from functools import partialmethod
from typing import Any, Optional, Union

from adpretrain_hf.config import ADPretrainConfig


class FeatureInfo:
    """What the features are like, known before the first image; read as ``timm.models.FeatureInfo`` is.

    ``channels()``, ``reduction()`` and ``module_name()`` are ``get`` of their key.

    Attributes:
        info: for each level its channels (``num_chs``), the pixels per patch (``reduction``), the name of the module
            whose one output (B, C, h, w) the features are (``module``, for ``get_submodule`` or a forward hook), and
            its place among the levels (``index``).
        out_indices: the places of the levels that are returned: all.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        entry = {"num_chs": config.hidden_size, "reduction": config.patch_size}
        self.out_indices = tuple(range(len(config.layers)))
        self.info: list[dict[str, Any]] = [
            entry | {"module": f"projectors.levels.{index}", "index": index} for index in self.out_indices
        ]

    def get(self, key: str, idx: Union[int, Sequence[int], None] = None) -> Any:
        """The value of ``key`` at one level, or a list of them at some; at all by default."""
        return self.info[idx][key] if isinstance(idx, int) else [one[key] for one in self.get_dicts([key], idx)]

    def get_dicts(self, keys: Optional[Sequence[str]] = None, idx: Union[int, Sequence[int], None] = None) -> Any:
        """The entry of one level, or a list of them of some, with all keys or some."""
        if isinstance(idx, int):
            return self.get_dicts(keys, [idx])[0]
        entries = [self.info[place] for place in (self.out_indices if idx is None else idx)]
        return [{key: entry[key] for key in keys or entry} for entry in entries]

    channels = partialmethod(get, "num_chs")
    reduction = partialmethod(get, "reduction")
    module_name = partialmethod(get, "module")

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)
