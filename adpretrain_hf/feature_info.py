"""FeatureInfo: what the features of an extractor are like, known before the first image (as timm's models tell it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adpretrain_hf.config import ADPretrainConfig

Index = int | Sequence[int] | None


class FeatureInfo:
    """One entry for each level, read as ``timm.models.FeatureInfo`` is.

    Args:
        config: of the extractor.

    Attributes:
        info: for each level its channels (``num_chs``), the pixels per patch (``reduction``), the name of the module
            whose one output (B, C, h, w) the features are (``module``, for ``get_submodule`` or a forward hook), and
            its place among the levels (``index``).
        out_indices: the places of the levels that are returned: all.
    """

    def __init__(self, config: ADPretrainConfig) -> None:
        self.info: list[dict[str, Any]] = [
            {
                "num_chs": config.hidden_size,
                "reduction": config.patch_size,
                "module": f"projectors.levels.{index}",
                "index": index,
            }
            for index in range(len(config.layers))
        ]
        self.out_indices = tuple(range(len(self.info)))

    def get(self, key: str, idx: Index = None) -> Any:
        """The value of ``key`` at one level, or a list of them at some; at all by default."""
        return self.info[idx][key] if isinstance(idx, int) else [entry[key] for entry in self._entries(idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: Index = None) -> Any:
        """The entry of one level, or a list of them of some, with all keys or some."""
        if isinstance(idx, int):
            return self.get_dicts(keys, [idx])[0]
        return [{key: entry[key] for key in keys or entry} for entry in self._entries(idx)]

    def channels(self, idx: Index = None) -> Any:
        """C."""
        return self.get("num_chs", idx)

    def reduction(self, idx: Index = None) -> Any:
        """Pixels per patch."""
        return self.get("reduction", idx)

    def module_name(self, idx: Index = None) -> Any:
        """Name of the module that gives the features."""
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)

    def _entries(self, idx: Sequence[int] | None) -> list[dict[str, Any]]:
        return [self.info[i] for i in (self.out_indices if idx is None else idx)]
